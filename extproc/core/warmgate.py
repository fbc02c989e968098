"""The warm gate: nobody is sent to a canary that is not ready, and a canary that flaps does not take users with it."""

from dataclasses import dataclass, replace

OPEN_AFTER = 2
"""Consecutive looks with enough ready canary hosts before the gate opens."""

CLOSE_AFTER = 3
"""Consecutive looks without, before it closes. Until then Envoy itself serves the canary's users from stable."""

LOST_CLOSURES = 2
LOST_WITHIN_S = 300.0
"""This many closures within this time are a lost canary."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One model's gate. `streak` counts looks in a row that spoke for the other state; `closures_s` are their times."""

    is_open: bool
    streak: int = 0
    closures_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the gate did: the gate after it, whether it changed, whether the canary counts as lost."""

    gate: Gate
    changed: bool = False
    lost: bool = False


def look(gate: Gate, now_s: float, ready: int, needed: int) -> Look:
    """Takes one look: `ready` canary hosts of at least `needed`, at a monotonic time in seconds.

    A look that could not be taken is not a look with 0 hosts: do not call this for it.
    """
    warm = ready >= needed and ready > 0
    if warm == gate.is_open:
        return Look(replace(gate, streak=0))
    streak = gate.streak + 1
    if streak < (OPEN_AFTER if warm else CLOSE_AFTER):
        return Look(replace(gate, streak=streak))
    if warm:
        return Look(replace(gate, is_open=True, streak=0), changed=True)
    closures = (*(at for at in gate.closures_s if now_s - at <= LOST_WITHIN_S), now_s)
    lost = len(closures) >= LOST_CLOSURES
    # A canary told lost starts counting anew, so that one event stands for one pair of closures.
    return Look(Gate(is_open=False, closures_s=() if lost else closures), changed=True, lost=lost)

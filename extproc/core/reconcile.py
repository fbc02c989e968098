"""Compares four counts of the same requests: decided by serve, assigned and served by the log, sent on by Envoy.

A log may lose entries without saying so, a route may send a request elsewhere than it was decided, an Envoy may run
that nobody knows of. Each shows as a difference. What is said here is a lower bound: requests under way, retries and
decisions that came too late are taken out in the direction that excuses the difference, so one that remains is one.
Without traffic during the comparison it is exact.

The log is compared as of an instant that lies two flush intervals back, when all it had to say of it has arrived;
Envoy's counters are read just before that instant and just after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from extproc.core.outcomes import Outcome

ALERT_SHARE = 0.001
"""Share of the requests from which a difference is an alert, if it is ALERT_LEAST at least."""
ALERT_LEAST = 10
_SAME_S = 2.0
"""Envoy tells its age in whole seconds; one that began at another time than this is another one."""


@dataclass(frozen=True, slots=True)
class Logged:
    """What the access log said.

    By flag: `assigned` requests with a decision, `mismatched` ones that went elsewhere than decided. By model: `served`
    requests that a model server answered, `answered` the same with probes, `attempts` to have one answer, with or
    without success and probes too, `undecided` requests without a decision, for whatever reason.
    """

    assigned: Mapping[str, int] = field(default_factory=dict)
    mismatched: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    answered: Mapping[str, int] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Entries:
    """Entries of one kind: how many, and the attempts that they took."""

    n: int = 0
    attempts: int = 0


class _Kind(NamedTuple):
    """What is counted apart. `flag` is None for an entry without a decision."""

    flag: str | None
    model: str
    served: bool
    inference: bool
    mismatched: bool


@dataclass(slots=True)
class LogLane:
    """Entries of one kind, those of before the cut and those of after it."""

    kind: _Kind
    until: _Entries = field(default_factory=_Entries)
    after: _Entries = field(default_factory=_Entries)


@dataclass(slots=True)
class LogCounts:
    """Running counts of the log, which can be read as of an instant: what ended after it is kept apart."""

    _cut_s: float = inf
    _lanes: dict[_Kind, LogLane] = field(default_factory=dict)

    def lane(self, outcome: Outcome) -> LogLane:
        """Where entries are counted that differ from this one in nothing but id, status, times and attempts."""
        flag = None if outcome.assignment is None else outcome.assignment.flag
        kind = _Kind(flag, outcome.model, bool(outcome.served), outcome.inference, outcome.mismatched)
        return self._lanes.get(kind) or self._lanes.setdefault(kind, LogLane(kind))

    def add(self, lane: LogLane, outcome: Outcome) -> None:
        """Counts one entry of the log in its lane."""
        entries = lane.until if outcome.ended_s <= self._cut_s else lane.after
        entries.n += 1
        entries.attempts += outcome.attempts

    def cut(self, now_s: float) -> None:
        """Begins to keep apart what ends after this instant, on Envoy's clock."""
        self.join()
        self._cut_s = now_s

    def join(self) -> None:
        """Ends it: everything counts again."""
        for lane in self._lanes.values():
            until, after = lane.until, lane.after
            until.n += after.n
            until.attempts += after.attempts
            lane.after = _Entries()
        self._cut_s = inf

    def logged(self, server: str = "") -> Logged:
        """The counts as of the cut. `server` is the model whose stable answers for the server as a whole."""
        parts: dict[str, dict[str, int]] = {}

        def count(name: str, of: str, n: int) -> None:
            part = parts.setdefault(name, {})
            part[of] = part.get(of, 0) + n

        for kind, lane in self._lanes.items():
            entries, model = lane.until, kind.model or server
            count("served", model, entries.n if kind.served and kind.inference else 0)
            count("answered", model, entries.n if kind.served else 0)
            count("attempts", model, entries.attempts)
            if kind.flag is None:
                count("undecided", model, entries.n if kind.inference else 0)
            else:
                count("assigned", kind.flag, entries.n)
                count("mismatched", kind.flag, entries.n if kind.mismatched else 0)
        return Logged(**parts)


@dataclass(frozen=True, slots=True)
class Sent:
    """Envoy's counters: attempts that the member clusters of each model have finished, and requests under way.

    `began_s` is when Envoy began, on any clock that does not step, in seconds.
    """

    finished: Mapping[str, int] = field(default_factory=dict)
    under_way: int = 0
    began_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one comparison needs.

    `decided` are the decisions by flag that were known at its instant, `later` those known when the log had settled;
    `processes` names the processes that reported theirs before it and again after it. `before` and `after` are Envoy's
    counters around the instant, None for an Envoy that did not answer.
    """

    decided: Mapping[str, int]
    later: Mapping[str, int]
    processes: frozenset[object]
    logged: Logged
    before: Sent | None
    after: Sent | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What one flag's reconciliation found, since the log has been read.

    `decided` are decisions since then: what serve had decided before the first comparison is taken as it was logged.
    `lost` are entries that the log owes; `surplus` entries that nobody we know of can have caused: another Envoy, or
    another serve; `mismatched` requests that went elsewhere than decided, a fall-back to stable not among them.
    """

    decided: int = 0
    assigned: int = 0
    served: int = 0
    lost: int = 0
    surplus: int = 0
    mismatched: int = 0

    def alerts(self) -> tuple[str, ...]:
        """What is beyond the threshold, as sentences."""
        of = max(self.decided, self.assigned)
        least = max(ALERT_LEAST, ALERT_SHARE * of)
        found = []
        if self.lost >= least:
            found.append(f"{self.lost} of {of} requests are missing in the access log; its numbers are incomplete")
        if self.surplus >= least:
            found.append(f"{self.surplus} requests in the access log that no known process caused; a second Envoy?")
        if self.mismatched >= least:
            found.append(
                f"{self.mismatched} of {of} requests were served by another arm than decided; see Envoy's routes"
            )
        return tuple(found)


@dataclass(slots=True)
class Reconciliation:
    """Compares again and again; `differences` are those of the last time, by flag.

    Counting begins with the first comparison. When Envoy or a process of serve began or fell silent, the last that it
    counted is not known: what was found until then is kept, and the comparison starts anew from here.
    """

    differences: dict[str, Difference] = field(default_factory=dict)
    _kept: dict[str, Difference] = field(default_factory=dict)
    _base: Evidence | None = None
    _last: Evidence | None = None

    def compare(self, flags: Mapping[str, str], evidence: Evidence) -> None:
        """Takes one comparison in. `flags` maps a flag to its model."""
        if self._base is None or self._began_again(evidence):
            self._kept, self._base = dict(self.differences), evidence
        self._last = evidence
        base = self._base
        self.differences = {
            flag: _sum(self._kept.get(flag, Difference()), _difference(flag, model, base, evidence))
            for flag, model in flags.items()
        }

    def _began_again(self, evidence: Evidence) -> bool:
        last = self._last or self._base
        if last is None:
            return False
        if evidence.processes != last.processes:
            return True
        return _another(last.before, evidence.before) or _another(last.after, evidence.after)


def _another(last: Sent | None, now: Sent | None) -> bool:
    """Whether the counters are not those of the Envoy that answered the last time."""
    if last is None or now is None:
        return (last is None) != (now is None)
    restarted = abs(now.began_s - last.began_s) > _SAME_S
    return restarted or any(n > now.finished.get(model, 0) for model, n in last.finished.items())


def _sum(kept: Difference, now: Difference) -> Difference:
    """Losses add up over restarts; the other counts are the log's own, which go on."""
    return Difference(
        now.decided, now.assigned, now.served, kept.lost + now.lost, kept.surplus + now.surplus, now.mismatched
    )


def _difference(flag: str, model: str, base: Evidence, now: Evidence) -> Difference:
    """One flag's difference since the base.

    Requests that were under way at one of the two instants, or decided and not yet reported, are on one side of it in
    one count and on the other side in another: of both readings that one is taken which makes the difference smaller.
    """

    def grown(name: str, of: str) -> int:
        return int(getattr(now.logged, name).get(of, 0) - getattr(base.logged, name).get(of, 0))

    def growth(new: Mapping[str, int], old: Mapping[str, int], of: str) -> int:
        return new.get(of, 0) - old.get(of, 0)

    under_way = now.before.under_way if now.before is not None else 0
    was_under_way = base.before.under_way if base.before is not None else 0
    assigned = grown("assigned", flag)
    lost = growth(now.decided, base.later, flag) - assigned - grown("undecided", model)
    surplus = assigned - growth(now.later, base.decided, flag)
    if now.before is not None and base.after is not None:
        lost = max(lost, growth(now.before.finished, base.after.finished, model) - grown("attempts", model))
    if now.after is not None and base.before is not None:
        surplus = max(surplus, grown("answered", model) - growth(now.after.finished, base.before.finished, model))
    return Difference(
        decided=base.logged.assigned.get(flag, 0) + growth(now.decided, base.decided, flag),
        assigned=now.logged.assigned.get(flag, 0),
        served=now.logged.served.get(model, 0),
        lost=max(0, lost - under_way),
        surplus=max(0, surplus - was_under_way),
        mismatched=now.logged.mismatched.get(flag, 0),
    )

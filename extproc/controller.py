"""Looks at what Envoy sees, decides with the core, and writes what serve follows. Owns no rule and no clock."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from extproc.core.exposure import with_caps
from extproc.core.flags import Exposures, Flag, effective_percent, wanted_percent
from extproc.core.warmgate import Gate, look

NAMED = 3
"""Flags named in an alert that may be about all of them."""


class Host(Protocol):
    """One upstream host as Envoy sees it."""

    @property
    def cluster(self) -> str:
        """The member cluster."""

    @property
    def healthy(self) -> bool:
        """Ready for traffic."""


class Model(Protocol):
    """What the controller has to know of a model."""

    @property
    def name(self) -> str:
        """Its name, which begins the names of its clusters."""

    @property
    def canary(self) -> Sequence[str]:
        """Addresses of its canary hosts."""

    @property
    def min_healthy(self) -> int:
        """Ready canary hosts that the gate asks for."""


@dataclass(frozen=True, slots=True)
class View:
    """What was seen in one look at Envoy: ready and known hosts by cluster. None instead of a View: it is silent."""

    ready: Mapping[str, int]
    known: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, hosts: Iterable[Host]) -> "View":
        """Counts the ready hosts of each cluster."""
        ready: dict[str, int] = {}
        known: dict[str, int] = {}
        for host in hosts:
            ready[host.cluster] = ready.get(host.cluster, 0) + host.healthy
            known[host.cluster] = known.get(host.cluster, 0) + 1
        return cls(ready, known)

    def stable(self, model: str) -> int:
        """Ready stable hosts of a model."""
        return self.ready.get(f"{model}_stable", 0)

    def canary(self, model: str) -> int:
        """Ready canary hosts of a model."""
        return self.ready.get(f"{model}_canary", 0)

    @property
    def ext_proc(self) -> int:
        """Ready ext_proc endpoints."""
        return self.ready.get("perch", 0)


@dataclass(slots=True)
class Controller:
    """Keeps the exposures. `write` puts them where serve reads them; `tell` is (kind, text, warning).

    What it decided is not what is served while it cannot be written: `_followed` is what serve reads meanwhile.
    """

    models: Sequence[Model]
    exposures: Exposures
    write: Callable[[Exposures], None]
    tell: Callable[[str, str, bool], None]
    flags: Mapping[str, Flag] = field(default_factory=dict)
    view: View | None = None
    version: str = ""
    _gates: dict[str, Gate] = field(default_factory=dict, init=False)
    _was_ready: bool = field(default=False, init=False)
    _unwritten: str = field(default="", init=False)
    _followed: Exposures = field(init=False)

    def __post_init__(self) -> None:
        """What earlier runs decided is what serve follows."""
        self._followed = self.exposures

    def take_flags(self, flags: Iterable[Flag], version: str, followed: Exposures | None = None) -> None:
        """A new flag file is served, or other exposures: `followed`, as they were read where serve reads them.

        A flag that is new begins with its model's gate as it stands.
        """
        before, self.flags = self.flags, {flag.key: flag for flag in flags}
        self.version = version
        if followed is not None:
            self._followed = followed
        for key, flag in self.flags.items():
            if key in before and self._wanted(before[key]) != self._wanted(flag):
                moved = f"{self._wanted(before[key]):g} % -> {self._wanted(flag):g} %"
                self.tell("share", f"{key}: canary {moved} of the users", False)
        for model in self.models:
            self._gate_of(model.name)
        self._save(self._caps())

    def tick(self, now_s: float, view: View | None) -> None:
        """One look, at a monotonic time in seconds. Without a view of Envoy everything stays as it is."""
        self.view = view
        if not self.version:
            return  # which flags there are is not known yet, so neither is what their gates were
        if view is not None:
            for model in self.models:
                self._look(model, now_s, view)
        self._save(self._caps())

    def _look(self, model: Model, now_s: float, view: View) -> None:
        gate = self._gate_of(model.name)
        ready = view.canary(model.name)
        seen = look(gate, now_s, ready, model.min_healthy)
        self._gates[model.name] = seen.gate
        if seen.changed:
            # A name may stand for many servers, and one that is gone may have left Envoy's list.
            known = max(len(model.canary), view.known.get(f"{model.name}_canary", 0))
            of = f"{model.name}: {ready} of {known} canary servers ready"
            if seen.gate.is_open:
                self.tell("canary_warm", f"{of}; its share of users is sent there", False)
            else:
                self.tell("canary_cold", f"{of}; everybody is served by stable", True)
        if seen.lost:
            self.tell("canary_lost", f"{model.name}: lost its canary twice within five minutes", True)

    def _gate_of(self, model: str) -> Gate:
        """The gate as it is, or as the exposures that were found at the start say it was.

        A flag without an exposure is being served, so its gate is open; a model without a flag has nobody to let in.
        """
        if model not in self._gates:
            flag = next((flag for flag in self.flags.values() if flag.model == model), None)
            exposure = self.exposures.of(flag) if flag is not None else None
            self._gates[model] = Gate(is_open=flag is not None and (exposure is None or exposure.cap > 0))
        return self._gates[model]

    def _caps(self) -> dict[str, tuple[str, int]]:
        """The cap that each flag should have by its model's gate."""
        return {flag.key: (flag.salt, 100 if self._gate_of(flag.model).is_open else 0) for flag in self.flags.values()}

    def _save(self, caps: Mapping[str, tuple[str, int]]) -> None:
        """Writes the exposures when they change; what could not be written is tried again at the next tick."""
        changed = with_caps(self.exposures, caps)
        if changed is self.exposures and not self._unwritten:
            return
        self.exposures = changed
        try:
            self.write(changed)
        except OSError as error:
            problem = f"{error.filename or 'the exposures'}: {error.strerror or error}"
            if problem != self._unwritten:
                self.tell("exposure_not_written", f"{problem}; tried again each tick", True)
            self._unwritten = problem
        else:
            self._followed, self._unwritten = changed, ""

    def alerts(self) -> list[str]:
        """What somebody should look into, a line each: decisions that serve cannot follow, for they are not written."""
        if not self._unwritten:
            return []
        others = []
        for flag in self.flags.values():
            served, decided = (effective_percent(flag, of.of(flag)) for of in (self._followed, self.exposures))
            if served != decided:
                others.append(f"{flag.key} has canary {float(served):g} %, not {float(decided):g} %")
        named = ", ".join(others[:NAMED]) + (f", and {len(others) - NAMED} more" if len(others) > NAMED else "")
        return [
            f"not written, so serve follows what was decided before: {self._unwritten}{'; ' if named else ''}{named}"
        ]

    def not_ready(self) -> str | None:
        """What is missing for the service to be ready, as a sentence; None when nothing is.

        The first time it needs the canary of every model whose flag wants users on it; later the path of stable alone.
        """
        view = self.view
        if view is None:
            return "Envoy does not answer"
        if not self.version:
            return "no flag file has been read yet"
        if view.ext_proc < 1:
            return "no ext_proc process is healthy"
        for model in self.models:
            if view.stable(model.name) < 1:
                return f"no stable server of {model.name} is ready"
            if not self._was_ready and self._wants_canary(model.name) and not self._gate_of(model.name).is_open:
                return f"the canary of {model.name} is not warm"
        self._was_ready = True
        return None

    def _wanted(self, flag: Flag) -> float:
        """The percentage that a flag asks for, before the warm gate."""
        return float(wanted_percent(flag, self.exposures.of(flag))) if flag.enabled else 0.0

    def _wants_canary(self, model: str) -> bool:
        return any(
            flag.enabled and wanted_percent(flag, self.exposures.of(flag)) > 0
            for flag in self.flags.values()
            if flag.model == model
        )

    def status(self) -> dict[str, Any]:
        """Each flag as serve follows it, and what the controller knows of it, as plain data."""
        return {key: self._flag_status(flag) for key, flag in self.flags.items()}

    def _flag_status(self, flag: Flag) -> dict[str, Any]:
        followed = self._followed.of(flag)
        wanted = self._wanted(flag)
        return {
            "model": flag.model,
            "enabled": flag.enabled,
            "effective_percent": float(effective_percent(flag, followed)),
            "wanted_percent": wanted,
            "held": wanted > 0 and followed is not None and followed.cap == 0,
            "version": self.version,
            "salt": flag.salt,
            "owner": flag.owner,
            "ready": {
                "stable": self.view.stable(flag.model) if self.view else None,
                "canary": self.view.canary(flag.model) if self.view else None,
            },
        }

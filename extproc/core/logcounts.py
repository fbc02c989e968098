"""Running counts of the access log, by what reconciliation tells apart, which can be read as of an instant."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from extproc.core.outcomes import Outcome

SKEW_S = 0.1
"""How far Envoy's clock and control's may be apart, in seconds: an entry that ended so near to the instant may have
ended on either side of it."""


@dataclass(frozen=True, slots=True)
class Logged:
    """What the access log said.

    By flag: `assigned` requests with a decision, `mismatched` ones that went elsewhere than decided. By model: `served`
    requests that a model server answered, `answered` the same with probes, `attempts` to have one answer, with or
    without success and probes too, `undecided` requests without a decision, for whatever reason, `failed_open` those of
    them for which ext_proc did not answer.
    """

    assigned: Mapping[str, int] = field(default_factory=dict)
    mismatched: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    answered: Mapping[str, int] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)
    failed_open: Mapping[str, int] = field(default_factory=dict)


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
    failed_open: bool


@dataclass(slots=True)
class LogLane:
    """Entries of one kind: those of before the cut, those that ended so near that they may be, those of after it."""

    kind: _Kind
    until: _Entries = field(default_factory=_Entries)
    near: _Entries = field(default_factory=_Entries)
    after: _Entries = field(default_factory=_Entries)


@dataclass(slots=True)
class LogCounts:
    """Running counts of the log, which can be read as of an instant: what ended after it is kept apart."""

    _until_s: float = inf
    _near_s: float = inf
    _lanes: dict[_Kind, LogLane] = field(default_factory=dict)

    def lane(self, outcome: Outcome) -> LogLane:
        """Where entries are counted that differ from this one in nothing but id, status, times and attempts."""
        flag = None if outcome.assignment is None else outcome.assignment.flag
        kind = _Kind(
            flag, outcome.model, bool(outcome.served), outcome.inference, outcome.mismatched, outcome.failed_open
        )
        return self._lanes.get(kind) or self._lanes.setdefault(kind, LogLane(kind))

    def add(self, lane: LogLane, outcome: Outcome) -> None:
        """Counts one entry of the log in its lane."""
        entries = lane.until
        if outcome.ended_s > self._until_s:
            entries = lane.near if outcome.ended_s <= self._near_s else lane.after
        entries.n += 1
        entries.attempts += outcome.attempts

    def cut(self, now_s: float) -> None:
        """Begins to keep apart what ends after this instant, on Envoy's clock."""
        self.join()
        self._until_s, self._near_s = now_s - SKEW_S, now_s + SKEW_S

    def join(self) -> None:
        """Ends it: everything counts again."""
        for lane in self._lanes.values():
            lane.until.n += lane.near.n + lane.after.n
            lane.until.attempts += lane.near.attempts + lane.after.attempts
            lane.near, lane.after = _Entries(), _Entries()
        self._until_s = self._near_s = inf

    def logged(self, server: str = "") -> tuple[Logged, Logged]:
        """The counts as of the cut, the least and the most that they may be.

        `server` is the model whose stable answers for the server as a whole.
        """
        least, most = _Parts(server), _Parts(server)
        for kind, lane in self._lanes.items():
            least.count(kind, lane.until)
            most.count(kind, lane.until)
            most.count(kind, lane.near)
        return least.logged(), most.logged()


@dataclass(slots=True)
class _Parts:
    """The counts of a Logged, while they are summed."""

    server: str
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, kind: _Kind, entries: _Entries) -> None:
        model = kind.model or self.server
        self._add("served", model, entries.n if kind.served and kind.inference else 0)
        self._add("answered", model, entries.n if kind.served else 0)
        self._add("attempts", model, entries.attempts)
        self._add("failed_open", model, entries.n if kind.failed_open and kind.inference else 0)
        if kind.flag is None:
            self._add("undecided", model, entries.n if kind.inference else 0)
        else:
            self._add("assigned", kind.flag, entries.n)
            self._add("mismatched", kind.flag, entries.n if kind.mismatched else 0)

    def _add(self, name: str, of: str, n: int) -> None:
        part = self.parts.setdefault(name, {})
        part[of] = part.get(of, 0) + n

    def logged(self) -> Logged:
        return Logged(**self.parts)

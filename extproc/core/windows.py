"""What each cohort really got: counts by second, latencies, predictions, of outcomes as they come.

Two views are kept. What is shown counts every inference request under (flag, cohort, model version). What may be judged
counts eligible ones only, under (flag, stratum, step, arm): the stratum is "" for the flag's own percentage and the
rule's name for a rule with one; the step belongs to the ruleset version that decided, never to the clock.

Intention to treat: requests, errors and fall-backs belong to the arm that was assigned; latencies and predictions to
requests that this arm also served. All counts are taken at the request's end and only grow, so that replicas merge by
adding what each of them counted.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from extproc.core.firsts import Firsts
from extproc.core.latency import count_bins
from extproc.core.outcomes import Assignment, Outcome
from extproc.core.predictions import MAX_LABELS, OTHER, Kind, PredictionComparison, shown_as, vote_of

RECENT_S = 60
"""Seconds that "the last minute" has."""
MAX_GROUPS = 2_048
MAX_CELLS = 2 * MAX_GROUPS
MAX_SERIES = 2_000
MAX_VERSIONS = 16
"""Model versions told apart in one cohort of a flag; a server that makes up more gets `(other)`."""
_MAX_LANES = 20_000
GIVEN_UP = ("unknown_version", "cells", "groups", "series")
"""All keys that `Windows.dropped` may have."""
NONE = "none"
"""Cohort and flag of a request that perch said nothing about."""


class CellKey(NamedTuple):
    """What is judged separately."""

    flag: str
    stratum: str
    step: int
    arm: str


class GroupKey(NamedTuple):
    """Two cells that are compared with each other."""

    flag: str
    stratum: str
    step: int


class SeriesKey(NamedTuple):
    """What is shown separately."""

    flag: str
    cohort: str
    model_version: str


@dataclass(slots=True)
class Tally:
    """Counts of some outcomes. `latency` maps a bin of `core.latency` to its number, `errors` a class to its number.

    `bad` is errors or fell back, each request once. `units` are units whose first outcome of the step is in here, and
    `bad_units` those for whom it was bad. `aborted` requests, given up by the client, are in none of the others.
    `served` are requests that were served by the arm they were assigned to, the only ones with a duration in here;
    a duration that is none is under REFUSED.
    """

    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    fell_back: int = 0
    failed_open: int = 0
    mismatched: int = 0
    aborted: int = 0
    units: int = 0
    bad_units: int = 0
    served: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    upstream: dict[int, int] = field(default_factory=dict)

    def merge(self, other: "Tally") -> None:
        """Adds another tally."""
        for name in _WHOLE:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        _add(self.errors, other.errors)
        _add(self.latency, other.latency)
        _add(self.upstream, other.upstream)

    def remove(self, other: "Tally") -> None:
        """Takes off a tally that was merged before."""
        for name in _WHOLE:
            setattr(self, name, getattr(self, name) - getattr(other, name))
        for name in _KEYED:
            into: dict[Any, int] = getattr(self, name)
            for key, n in getattr(other, name).items():
                into[key] -= n
                if not into[key]:
                    del into[key]

    def counts(self) -> Iterator[tuple[tuple[str, str | int], int]]:
        """Everything as flat whole numbers, for a G-counter; 0 is left out."""
        for name in _WHOLE:
            if n := getattr(self, name):
                yield (name, ""), n
        for name in _KEYED:
            for key, n in getattr(self, name).items():
                yield (name, key), n


_WHOLE = (
    "requests", "bad", "fell_back", "failed_open", "mismatched", "aborted", "units", "bad_units", "served",
)  # fmt: skip
_KEYED = ("errors", "latency", "upstream")


def _add(into: dict[Any, int], other: Mapping[Any, int]) -> None:
    for key, n in other.items():
        into[key] = into.get(key, 0) + n


@dataclass(slots=True)
class Window:
    """One series over time: all that was before this second, this second, and the last minute by the second."""

    before: Tally = field(default_factory=Tally)
    now: Tally = field(default_factory=Tally)
    _recent: deque[tuple[int, Tally]] = field(default_factory=deque)
    _minute: Tally = field(default_factory=Tally)

    def roll(self, second: int) -> Tally | None:
        """Ends the second: what it brought, None for nothing. Whatever left the last minute is forgotten there."""
        while self._recent and self._recent[0][0] <= second - RECENT_S:
            self._minute.remove(self._recent.popleft()[1])
        ended = self.now
        if not ended.requests and not ended.aborted:
            return None
        self.now = Tally()
        self.before.merge(ended)
        self._minute.merge(ended)
        self._recent.append((second, ended))
        return ended

    def total(self) -> Tally:
        """Everything so far, as a copy."""
        tally = Tally()
        tally.merge(self.before)
        tally.merge(self.now)
        return tally

    def last_minute(self) -> Tally:
        """The last RECENT_S seconds and the one that has begun, as a copy."""
        tally = Tally()
        tally.merge(self._minute)
        tally.merge(self.now)
        return tally


@dataclass(slots=True)
class Group:
    """What the two arms of one comparison share: their predictions, and which units were seen in this step.

    Of the latest outcomes, in their order: `units` are their hashes, `tallies` where each counts if the unit is new,
    `bad` whether it was bad.
    """

    predictions: PredictionComparison = field(default_factory=PredictionComparison)
    firsts: Firsts = field(default_factory=Firsts)
    units: "array[int]" = field(default_factory=lambda: array("I"))
    tallies: list[Tally] = field(default_factory=list)
    bad: list[bool] = field(default_factory=list)

    def settle(self) -> None:
        """Counts each unit where its first outcome was."""
        units, tallies, all_bad = self.units, self.tallies, self.bad
        self.units, self.tallies, self.bad = array("I"), [], []
        for at in self.firsts.new_among(units):
            tally, bad = tallies[at], all_bad[at]
            tally.units += 1
            if bad:
                tally.bad_units += 1


@dataclass(slots=True)
class Lane:
    """All outcomes of one kind, and what they have in common, found once. `now` is counted into the windows later."""

    shown: Window
    cell: Window | None
    group: Group | None
    arm: str
    fell_back: bool
    mismatched: bool
    failed_open: bool
    measured: bool
    labels: dict[str, int]
    kind: str
    vote: Callable[[str, int | None, int], str | None]
    unknown: bool = False
    now: Tally = field(default_factory=Tally)
    votes: dict[str, int] = field(default_factory=dict)
    total_ms: "array[float]" = field(default_factory=lambda: array("d"))
    upstream_ms: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(slots=True)
class Windows:
    """All series. `step_of` is (flag, ruleset version) -> step, None for a version nobody knows.

    `kind_of` is what a model's predictions are declared to be. Everything is bounded; `dropped` counts, by kind, what
    was given up for it. `seconds` is how many have ended.
    """

    step_of: Callable[[str, str], int | None]
    kind_of: Callable[[str], str] = lambda _model: Kind.AUTO
    shown: dict[SeriesKey, Window] = field(default_factory=dict)
    cells: OrderedDict[CellKey, Window] = field(default_factory=OrderedDict)
    groups: OrderedDict[GroupKey, Group] = field(default_factory=OrderedDict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: int = 0
    generation: int = 0
    _labels: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    _lanes: dict[object, Lane] = field(default_factory=dict)
    _strays: list[Lane] = field(default_factory=list)
    _versions: dict[tuple[str, str], int] = field(default_factory=dict)

    def lane(self, outcome: Outcome) -> Lane | None:
        """Where outcomes are counted that differ from this one only in how they ended; None for no inference route.

        It is good until `generation` changes. That of an unknown version is good once: the version may become known.
        """
        if not outcome.inference:
            return None
        assignment = outcome.assignment
        key = (assignment, outcome.model, outcome.arm, outcome.served, outcome.failed_open, outcome.model_version)
        return self._lanes.get(key) or self._new_lane(key, outcome)

    def add(self, lane: Lane, outcome: Outcome) -> None:
        """Counts one outcome in its lane.

        The path of every entry of the log, so it does once what two views need: `settle` adds it to both, and finds
        for many at once the bins of durations and the units that are new.
        """
        unit_hash = outcome.hash
        status, _, deadline, aborted, upstream_ms, total_ms, _, predictions, count = outcome[7:16]
        tally = lane.now
        if aborted:
            tally.aborted += 1
            return
        tally.requests += 1
        bad = lane.fell_back
        if deadline or not 0 < status < 500:
            bad = True
            # Outcome.error, without a call for each of the many that went well.
            _count_error(tally, "deadline" if deadline else "5xx" if status else "no_answer")
        if bad:
            tally.bad += 1
        if lane.measured:
            lane.total_ms.append(total_ms)
            if upstream_ms is not None:
                lane.upstream_ms.append(upstream_ms)
            if predictions:
                alone = count == 1 and "," not in predictions
                item = predictions if alone else lane.vote(predictions, count, unit_hash or 0)
                if item is not None:
                    votes = lane.votes
                    votes[item] = votes.get(item, 0) + 1
        group = lane.group
        if group is not None and unit_hash is not None:
            group.units.append(unit_hash)
            group.tallies.append(tally)
            group.bad.append(bad)

    def settle(self) -> None:
        """Brings everything that was added into the windows: before anybody reads them."""
        lanes = (*self._lanes.values(), *self._strays)
        self._strays = []
        for lane in lanes:  # not the groups, of which there may be thousands: whatever one waits with came by a lane
            if lane.group is not None and lane.group.units:
                lane.group.settle()
        for lane in lanes:
            tally = lane.now
            if not tally.requests and not tally.aborted:
                continue
            lane.now = Tally()
            tally.served = len(lane.total_ms)
            tally.latency, lane.total_ms = count_bins(lane.total_ms), array("d")
            tally.upstream, lane.upstream_ms = count_bins(lane.upstream_ms), array("d")
            for name in ("fell_back", "mismatched", "failed_open"):
                if getattr(lane, name):
                    setattr(tally, name, tally.requests)
            lane.shown.now.merge(tally)
            if lane.cell is not None:
                lane.cell.now.merge(tally)
            self._settle_votes(lane)

    def _settle_votes(self, lane: Lane) -> None:
        votes, lane.votes = lane.votes, {}
        labels, predictions = lane.labels, None if lane.group is None else lane.group.predictions
        kind = lane.kind if predictions is None else predictions.told
        for item, n in votes.items():
            label = shown_as(kind, item)
            known = label if label in labels or len(labels) < MAX_LABELS else OTHER
            labels[known] = labels.get(known, 0) + n
            if predictions is not None:
                predictions.add(lane.arm, item, n)

    def roll(self, second: int) -> tuple[dict[SeriesKey, Tally], dict[CellKey, Tally]]:
        """Ends a second: what it brought to each series that is shown, and to each cell that is judged."""
        self.settle()
        self.seconds += 1
        shown = {key: tally for key, window in self.shown.items() if (tally := window.roll(second)) is not None}
        judged = {key: tally for key, window in self.cells.items() if (tally := window.roll(second)) is not None}
        return shown, judged

    def labels(self, flag: str, arm: str) -> Mapping[str, int]:
        """What an arm of a flag predicted, as `shown_as` says it; beyond MAX_LABELS different predictions `(other)`."""
        return self._labels.get((flag, arm), {})

    def newest(self, flag: str, stratum: str = "") -> GroupKey | None:
        """The comparison of the highest step that a flag has, or None."""
        found = [key for key in self.groups if key.flag == flag and key.stratum == stratum]
        return max(found, key=lambda key: key.step, default=None)

    def counts(self) -> dict[tuple[str | int, ...], int]:
        """What was judged, as flat whole numbers that only grow: what a replica tells the others."""
        found: dict[tuple[str | int, ...], int] = {}
        for key, window in self.cells.items():
            for name, n in window.total().counts():
                found[*key, *name] = n
        return found

    def _new_lane(self, key: tuple[object, ...], outcome: Outcome) -> Lane:
        if len(self._lanes) >= _MAX_LANES:
            self._forget_lanes()
        assignment = outcome.assignment
        flag, cohort = (assignment.flag or NONE, assignment.cohort) if assignment is not None else (NONE, NONE)
        kind = self.kind_of(assignment.model if assignment is not None else outcome.model)
        cell_key = self._cell_key(outcome)
        group = self._group(cell_key, kind) if cell_key is not None else None
        measured = bool(outcome.served) and (assignment is None or outcome.served == cohort)
        lane = Lane(
            shown=self._series(flag, cohort, outcome.model_version),
            cell=self._cell(cell_key) if cell_key is not None else None,
            group=group,
            arm=cohort,
            fell_back=outcome.fell_back,
            mismatched=outcome.mismatched,
            failed_open=outcome.failed_open,
            measured=measured and not outcome.mismatched,
            labels=self._labels_of(flag, cohort),
            kind=kind,
            vote=vote_of(kind),
            unknown=cell_key is None and self._may_judge(outcome),
        )
        if lane.unknown:
            self._strays.append(lane)
        else:
            self._lanes[key] = lane
        return lane

    def _may_judge(self, outcome: Outcome) -> bool:
        return outcome._replace(aborted=False).eligible

    def _forget_lanes(self) -> None:
        """Nothing is lost: a lane only remembers where its series are."""
        self.settle()
        self._lanes.clear()
        self.generation += 1

    def _cell_key(self, outcome: Outcome) -> CellKey | None:
        assignment = outcome.assignment
        if assignment is None or not self._may_judge(outcome):
            return None
        step = self.step_of(assignment.flag, assignment.version)
        if step is None:
            self._drop("unknown_version")
            return None
        return CellKey(assignment.flag, stratum_of(assignment), step, assignment.cohort)

    def _cell(self, key: CellKey) -> Window:
        if key not in self.cells:
            if len(self.cells) >= MAX_CELLS:
                self.cells.popitem(last=False)
                self._forget_lanes()
                self._drop("cells")
            self.cells[key] = Window()
        return self.cells[key]

    def _group(self, key: CellKey, kind: str) -> Group:
        group = GroupKey(key.flag, key.stratum, key.step)
        if group not in self.groups:
            if len(self.groups) >= MAX_GROUPS:
                self._forget_lanes()
                self.groups.popitem(last=False)
                self._drop("groups")
            self.groups[group] = Group(PredictionComparison(kind))
        return self.groups[group]

    def _series(self, flag: str, cohort: str, version: str) -> Window:
        key = SeriesKey(flag, cohort, version or NONE)
        if key in self.shown:
            return self.shown[key]
        versions = self._versions.get((flag, cohort), 0)
        if versions >= MAX_VERSIONS or len(self.shown) >= MAX_SERIES:
            self._drop("series")
            key = SeriesKey(flag, cohort, OTHER) if len(self.shown) < MAX_SERIES else SeriesKey(OTHER, OTHER, OTHER)
        if key not in self.shown:
            self.shown[key] = Window()
            self._versions[key.flag, key.cohort] = self._versions.get((key.flag, key.cohort), 0) + 1
        return self.shown[key]

    def _labels_of(self, flag: str, cohort: str) -> dict[str, int]:
        key = (flag, cohort)
        if key not in self._labels and len(self._labels) >= MAX_SERIES:
            key = (OTHER, OTHER)
        return self._labels.setdefault(key, {})

    def _drop(self, what: str) -> None:
        self.dropped[what] = self.dropped.get(what, 0) + 1


def _count_error(tally: Tally, error: str) -> None:
    tally.errors[error] = tally.errors.get(error, 0) + 1


def stratum_of(assignment: Assignment) -> str:
    """The stratum: "" for a flag's own percentage, the rule's name for a rule with one."""
    return assignment.rule if assignment.reason == "RULE_SPLIT" else ""

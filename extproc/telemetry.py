"""What each cohort really got: takes outcomes from the access log, keeps windows, KPIs and the log's own counts.

Knows no clock: the time is an argument, as in the core that it puts together.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from extproc.core.flags import Exposures, Flag
from extproc.core.kpis import Kpis, Reported, Result, Served, unit_prefixes
from extproc.core.kpis import Lane as KpiLane
from extproc.core.logcounts import LogCounts, LogLane
from extproc.core.outcomes import Assignment, Outcome
from extproc.core.predictions import Kind
from extproc.core.windows import Lane as WindowLane
from extproc.core.windows import Windows, stratum_of

_MAX_SEQS = 4_096
_MAX_LANES = 20_000
_kind = itemgetter(0, 2, 3, 4, 5, 6, 13)
"""Of an outcome: assignment, model, arm, served, inference, failed_open, model_version."""


@dataclass(slots=True)
class Steps:
    """Which step of its rollout a flag was at when a ruleset version was served.

    `kept` reads the exposures of a version that was served before this process began, None for one that is unknown.
    """

    kept: Callable[[str], Exposures | None]
    _known: OrderedDict[str, Exposures] = field(default_factory=OrderedDict)

    def learn(self, exposures: Exposures) -> None:
        """Exposures that are written now; their seq is the end of the versions that they make."""
        self._keep(str(exposures.seq), exposures)

    def of(self, flag: str, version: str) -> int | None:
        """The step, 0 for a flag without exposure, None for a version that nobody knows."""
        _, _, seq = version.rpartition(".")
        exposures = self._known.get(seq)
        if exposures is None:
            exposures = self.kept(version)
            if exposures is None:
                return None
            self._keep(seq, exposures)
        exposure = exposures.flags.get(flag)
        return 0 if exposure is None else exposure.step

    def _keep(self, seq: str, exposures: Exposures) -> None:
        self._known[seq] = exposures
        if len(self._known) > _MAX_SEQS:
            self._known.popitem(last=False)


@dataclass(slots=True)
class _Lane:
    """What the outcomes of one kind have in common: where each part of the telemetry counts them.

    Its key is the outcome without what differs: hash, ending, times, predictions, id. `kept` says whether values that
    are reported later can be about them.
    """

    generation: int
    window: WindowLane | None
    log: LogLane
    kept: bool
    kpi: KpiLane | None


@dataclass(slots=True)
class Telemetry:
    """All counts of one control process. `kinds` maps a model to what its predictions are."""

    steps: Steps
    kinds: Mapping[str, str] = field(default_factory=dict)
    windows: Windows = field(init=False)
    log: LogCounts = field(default_factory=LogCounts)
    kpis: Kpis = field(default_factory=Kpis)
    _flags: tuple[Flag, ...] = ()
    _models: Mapping[str, str] = field(default_factory=dict)
    _lanes: dict[tuple[object, ...], _Lane] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Ties the windows to the steps."""
        self.windows = Windows(self.steps.of, self._kind_of)

    def take_flags(self, flags: Iterable[Flag], exposures: Exposures) -> None:
        """The flags that are served now: what values may be reported about."""
        self._flags = tuple(flags)
        self._models = {flag.key: flag.model for flag in self._flags}
        self.take_exposures(exposures)

    def _kind_of(self, model: str) -> str:
        return self.kinds.get(model, Kind.AUTO)

    def take_exposures(self, exposures: Exposures) -> None:
        """What the controller decided: the steps, and the salts that units are hashed with."""
        self.steps.learn(exposures)
        found = {}
        for flag in self._flags:
            exposure = exposures.of(flag)
            found[flag.key] = unit_prefixes(flag, exposure.attempt if exposure is not None else 0)
        self.kpis.take_flags(found)

    def take(self, outcomes: Iterable[Outcome], now_s: float) -> None:
        """Counts what became of some requests, at a time that never steps, in seconds.

        The path of every entry of the log: what many of them have in common is found once, in their lane.
        """
        windows, kpis, lanes = self.windows, self.kpis, self._lanes
        add, count = windows.add, self.log.add
        kpis.keep_time(now_s)
        kept: list[tuple[KpiLane | None, str, int | None]] = []
        for outcome in outcomes:
            lane = lanes.get(_kind(outcome))
            if lane is None or lane.generation != windows.generation:
                lane = self._new_lane(outcome, now_s)
            count(lane.log, outcome)
            if lane.window is not None:
                add(lane.window, outcome)
            if lane.kept and outcome.request_id:
                kpi = lane.kpi if not outcome.aborted else kpis.lane(self._served(outcome, now_s))
                kept.append((kpi, outcome.request_id, outcome.hash))
        kpis.remember_all(kept, max(0, int(now_s)))

    def _new_lane(self, outcome: Outcome, now_s: float) -> _Lane:
        window = self.windows.lane(outcome)
        kept = outcome.assignment is not None and bool(outcome.served)
        lane = _Lane(
            generation=self.windows.generation,
            window=window,
            log=self.log.lane(outcome),
            kept=kept,
            kpi=self.kpis.lane(self._served(outcome._replace(aborted=False), now_s)) if kept else None,
        )
        if window is None or not window.unknown:
            if len(self._lanes) >= _MAX_LANES:
                self._lanes.clear()
            self._lanes[_kind(outcome)] = lane
        return lane

    def report(self, reported: Reported, now_s: float) -> Result:
        """A value that somebody reports about a request or a unit, at the same clock as `take`."""
        return self.kpis.report(reported, now_s)

    def _served(self, outcome: Outcome, now_s: float) -> Served:
        assignment = outcome.assignment or Assignment("", "", "", "", "", "")
        step = self.steps.of(assignment.flag, assignment.version)
        return Served(
            flag=assignment.flag,
            stratum=stratum_of(assignment),
            step=step or 0,
            arm=outcome.served,
            cohort=assignment.cohort,
            hash=outcome.hash,
            eligible=outcome.eligible and step is not None,
            time_s=now_s,
        )

    def model_of(self) -> Mapping[str, str]:
        """Each flag's model."""
        return self._models

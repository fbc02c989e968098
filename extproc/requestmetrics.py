"""`perch.request.*`: what the telemetry knows, as StatsD lines each second and as Prometheus text when asked.

Both come from the same samples. Series are bounded whatever the traffic holds: the windows tell apart so many series,
and what has a series of its own here is settled the first time it is seen, up to a limit; the rest is counted as
`(other)`, or not shown and counted in `request.dropped`. So a counter never shrinks. Two texts that are shown alike are
one series. Prometheus gets a counter at 0 before it first grows, wherever it can be known that it may: what a series
begins with is no increase to it. StatsD hears each second of the cohorts that had traffic in the last minute, and of
nothing else; of so many that not all fit into LINES, each gets its turn, and a counter is told later with what has come
meanwhile.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import nlargest
from itertools import accumulate, chain
from math import fsum, isfinite
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from extproc.accesslog import Counts as LogCounts
from extproc.cohorts import kpi_means, newest_drift, percentiles
from extproc.core.drift import Drift
from extproc.core.latency import bin_of, edge_of, value_of
from extproc.core.outcomes import Arm
from extproc.core.predictions import OTHER
from extproc.core.reconcile import Difference
from extproc.core.windows import GIVEN_UP, MAX_SERIES, MAX_VERSIONS, NONE, RECENT_S, SeriesKey, Tally, Window
from extproc.metricnames import BY_NAME, Kind, Metric
from extproc.metrics import Metrics
from extproc.telemetry import Telemetry

MAX_PREDICTIONS = 19
"""Predictions of a cohort with a series of their own; with `(other)` 20."""
MAX_LABELLED = 4_000
"""Predictions of all cohorts with a series of their own."""
MAX_KPIS = 1_000
"""Series of reported values: flag, cohort and name."""
MAX_HISTOGRAMS = 250
"""Series with histograms of their own, 32 lines each; the durations of the rest are in one more."""
MAX_VALUE = 64
"""Characters of a tag that anybody may make up: a model version, a prediction."""
LINES = 750
"""Lines to StatsD in one second from which on further cohorts wait for the next; one cohort has some 160 at most.

With those of two seconds, and the timers, what `Metrics` takes between two flushes is not exceeded."""
TIMED = 60
"""Series whose durations are sent in one second, two timers each: the busiest."""
TIMINGS = 64
"""Durations sent per timer and second: quantiles of that second, with the sample rate that they stand for."""
DRIFTS_A_SECOND = 20
"""Drifts computed in one second: some milliseconds each. With more flags each gets its turn."""
REPEAT_S = 10
"""Gauges that have not changed are told again this often: some collectors forget those that are silent."""
BUCKETS = tuple(bin_of(ms) for ms in (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 15_000))
"""The histograms' buckets, each up to the edge of one of the telemetry's bins, so that their counts are exact."""

_LE = (*(f"{edge_of(place) / 1000:.6g}" for place in BUCKETS), "+Inf")
_ERRORS = ("5xx", "deadline", "no_answer")
_WHOLE = ("fell_back", "failed_open", "mismatched", "aborted")
_NOTHING = Window()
_THE_REST = SeriesKey(OTHER, OTHER, OTHER)

Cohort = tuple[str, str]
"""A flag and a cohort."""
Series = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its tags."""


class Sample(NamedTuple):
    """One series now: the total so far of a counter, the value of a gauge. Durations are in milliseconds."""

    name: str
    tags: tuple[str, ...]
    value: float


@lru_cache(16_384)
def tag_of(text: str) -> str:
    """A text that anybody may have made up, as the value of a tag: one line of MAX_VALUE characters, and not empty."""
    shown = (
        text
        if text.isprintable()
        else "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
    )
    return shown[:MAX_VALUE] or NONE


@dataclass(slots=True)
class Places:
    """Who has a series of its own: the first `most` that ask, for good."""

    most: int
    _taken: set[Hashable] = field(default_factory=set)

    def has(self, key: Hashable) -> bool:
        """Whether this one has, or gets, a place."""
        if key not in self._taken and len(self._taken) < self.most:
            self._taken.add(key)
        return key in self._taken


@dataclass(slots=True)
class RequestMetrics:
    """Makes the samples. `log` are the access log's counts, `differences` the reconciliation's by flag."""

    telemetry: Telemetry
    log: LogCounts
    differences: Callable[[], Mapping[str, Difference]]
    _labels: dict[Cohort, Places] = field(default_factory=dict)
    _labelled: Places = field(default_factory=lambda: Places(MAX_LABELLED))
    _kpi_places: Places = field(default_factory=lambda: Places(MAX_KPIS))
    _histograms: Places = field(default_factory=lambda: Places(MAX_HISTOGRAMS))
    _counted: dict[Series, float] = field(default_factory=dict)
    _gauged: dict[Series, tuple[float, int]] = field(default_factory=dict)
    _cohorts: dict[Cohort, list[tuple[SeriesKey, Window]]] = field(default_factory=dict)
    _expected: dict[Cohort, list[SeriesKey]] = field(default_factory=dict)
    _indexed: int = -1
    _served: Mapping[str, str] = field(default_factory=dict)
    _recent: dict[Cohort, int] = field(default_factory=dict)
    _waiting: dict[Cohort, None] = field(default_factory=dict)
    _untimed: int = 0
    _drift: dict[str, Drift | None] = field(default_factory=dict)
    _drift_due: dict[str, None] = field(default_factory=dict)
    _kpis: dict[Cohort, list[Sample]] = field(default_factory=dict)
    _kpis_of: int = 0
    _kpis_unshown: int = 0

    def second(self, second: int, metrics: Metrics) -> None:
        """Ends a second: everything that happened in it goes to StatsD."""
        shown, _ = self.telemetry.windows.roll(second)
        self.telemetry.kpis.advance(second)  # also where nothing comes: what waits in vain is settled in time
        self._recent.update({(key.flag, key.cohort): second for key in shown})
        self._recent = {cohort: last for cohort, last in self._recent.items() if second - last <= RECENT_S}
        self._find_drift({key.flag for key in shown})
        self._settle()
        self._tell(second, metrics)
        self._time(shown, metrics)

    def _find_drift(self, flags: Iterable[str]) -> None:
        """Drifts that may have changed, those first that wait longest; forgets flags that are served no more."""
        served = self.telemetry.model_of()
        self._drift_due.update(dict.fromkeys(flags))
        for flag in list(self._drift_due)[:DRIFTS_A_SECOND]:
            del self._drift_due[flag]
            self._drift[flag] = newest_drift(self.telemetry.windows, flag)
        self._drift = {flag: drift for flag, drift in self._drift.items() if flag in served}

    def _settle(self) -> None:
        """Which series belong to which cohort; and the sums of reported values, when something was joined."""
        shown, served = self.telemetry.windows.shown, self.telemetry.model_of()
        if len(shown) != self._indexed or served is not self._served:
            self._indexed, self._served, self._cohorts = len(shown), served, {}
            for key, window in shown.items():
                self._cohorts.setdefault((key.flag, key.cohort), []).append((_shown(key), window))
            known = {cohort: [key.model_version for key, _ in series] for cohort, series in self._cohorts.items()}
            self._expected = expected(known, served, MAX_SERIES - len(shown))
        joined = self.telemetry.kpis.counts.joined
        if joined != self._kpis_of:
            self._kpis_of = joined
            self._sum_kpis()

    def _sum_kpis(self) -> None:
        self._kpis, self._kpis_unshown = {}, 0
        for (flag, name), arm, n, mean in kpi_means(self.telemetry):
            if self._kpi_places.has((flag, arm, name)):
                samples = self._kpis.setdefault((flag, arm), [])
                samples += (
                    Sample("request.kpi_count", (flag, arm, name), n),
                    Sample("request.kpi_mean", (flag, arm, name), mean),
                )
            else:
                self._kpis_unshown += 1
        self._waiting.update(dict.fromkeys(self._kpis))

    def _tell(self, second: int, metrics: Metrics) -> None:
        lines = sum(self._told(sample, second, metrics) for sample in _once(self._of_all()))
        self._waiting.update(dict.fromkeys(self._recent))
        while self._waiting and lines < LINES:
            cohort = next(iter(self._waiting))
            del self._waiting[cohort]
            lines += sum(self._told(sample, second, metrics) for sample in _once(self._of_cohort(cohort)))

    def _told(self, sample: Sample, second: int, metrics: Metrics) -> bool:
        """Whether there was anything to tell."""
        name, tags, value = sample
        metric, key = BY_NAME[name], (name, tags)
        if metric.kind is Kind.GAUGE:
            before, told = self._gauged.get(key, (None, 0))
            if before == value and second - told < REPEAT_S:
                return False
            self._gauged[key] = (value, second)
            metrics.gauge(name, value, **dict(zip(metric.tags, tags, strict=True)))
            return True
        grown = value - self._counted.get(key, 0)
        if grown > 0:
            self._counted[key] = value
            metrics.count(name, int(grown), **dict(zip(metric.tags, tags, strict=True)))
        return grown > 0

    def _time(self, shown: Mapping[SeriesKey, Tally], metrics: Metrics) -> None:
        busiest = nlargest(TIMED, shown.items(), key=lambda item: item[1].served)
        self._untimed += len(shown) - len(busiest)
        for key, tally in busiest:
            _send_durations(metrics, "request.latency_ms", key, tally.latency)
            _send_durations(metrics, "request.upstream_ms", key, tally.upstream)

    def samples(self) -> Iterator[Sample]:
        """Every counter and gauge as it stands, each series once; and series at 0 that may come."""
        self.telemetry.windows.settle()
        self._settle()
        yield from _once(self._of_all())
        for cohort in {**self._cohorts, **self._expected, **self._kpis}:
            zeros = (_of_series(key, _NOTHING) for key in self._expected.get(cohort, ()))
            yield from _once(chain(self._of_cohort(cohort), *zeros))

    def _of_all(self) -> Iterator[Sample]:
        """What belongs to no cohort."""
        yield Sample("request.log_entries", (), self.log.entries)
        yield Sample("request.log_unreadable", (), self.log.unreadable + self.log.unreadable_messages)
        yield Sample("request.log_streams", (), self.log.open)
        counts = self.telemetry.kpis.counts
        for result in ("joined", "unknown", "late", "duplicates", "refused"):
            yield Sample("request.outcomes", (result,), getattr(counts, result))
        yield Sample("request.outcomes_pending", (), counts.pending)
        given_up = {
            **dict.fromkeys(GIVEN_UP, 0),
            **self.telemetry.windows.dropped,
            "kpi_requests": counts.pushed_out,
            "kpi_groups": counts.unkept,
            "kpi_keys": counts.keys_forgotten,
            "kpi_series": self._kpis_unshown,
            "timers": self._untimed,
        }
        for what, n in given_up.items():
            yield Sample("request.dropped", (what,), n)
        for flag, found in self.differences().items():
            yield Sample("request.lost", (flag,), found.lost)
            yield Sample("request.surplus", (flag,), found.surplus)

    def _of_cohort(self, cohort: Cohort) -> Iterator[Sample]:
        series = self._cohorts.get(cohort, [])
        for key, window in series:
            yield from _of_series(key, window)
        yield from _of_minute(cohort, [window for _, window in series])
        yield from self._of_labels(cohort)
        yield from self._kpis.get(cohort, ())
        yield from self._of_drift(*cohort)

    def _of_drift(self, flag: str, cohort: str) -> Iterator[Sample]:
        """Told with the arms that it compares: how many predictions with each, the distances with canary."""
        drift = self._drift.get(flag)
        if drift is not None and cohort == Arm.STABLE:
            yield Sample("request.drift_n", (flag, cohort), drift.n_stable)
        elif drift is not None and cohort == Arm.CANARY:
            yield Sample("request.drift_n", (flag, cohort), drift.n_canary)
            for measure in ("js", "wasserstein_sd", "psi", "ks"):
                value = getattr(drift, measure)
                if value is not None:
                    yield Sample("request.drift", (flag, measure), value)

    def _of_labels(self, cohort: Cohort) -> Iterator[Sample]:
        """The predictions of a cohort: which of them have a series of their own is settled as they come."""
        labels = self.telemetry.windows.labels(*cohort)
        places = self._labels.setdefault(cohort, Places(MAX_PREDICTIONS))
        for label in sorted(labels, key=lambda one: (-labels[one], one)):
            shown = tag_of(label)
            if label == OTHER or not (places.has(shown) and self._labelled.has((*cohort, shown))):
                shown = OTHER
            yield Sample("request.predictions", (*cohort, shown), labels[label])

    def prometheus(self) -> bytes:
        """The text that `GET /metrics` answers with, in Prometheus' own format (0.0.4)."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Once(self))
        return generate_latest(registry)

    def histograms(self, name: str) -> Iterator[tuple[SeriesKey, list[int], float]]:
        """(series, number of each bucket without those below it, sum in milliseconds) of `latency` or `upstream`."""
        places: dict[SeriesKey, dict[int, int]] = {}
        for key, window in self.telemetry.windows.shown.items():
            shown = _shown(key)
            counts = places.setdefault(shown if self._histograms.has(shown) else _THE_REST, {})
            for tally in (window.before, window.now):
                for place, n in getattr(tally, name).items():
                    counts[place] = counts.get(place, 0) + n
        for shown, counts in places.items():
            numbers = [0] * len(_LE)
            for place, n in counts.items():
                if place >= 0:
                    numbers[bisect_left(BUCKETS, place)] += n
            # Summed exactly: rounding must not make a sum smaller than it was.
            yield shown, numbers, fsum(value_of(place) * n for place, n in counts.items() if place >= 0)


class _Once(Collector):
    """One scrape."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """Every metric of the table that has samples."""
        by_name: dict[str, list[Sample]] = {}
        for sample in self.metrics.samples():
            by_name.setdefault(sample.name, []).append(sample)
        for name, samples in by_name.items():
            metric = BY_NAME[name]
            family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            made = family(metric.prometheus.removesuffix("_total"), metric.about, labels=metric.tags)
            unit = 1000 if name.endswith("_ms") else 1
            for sample in samples:
                made.add_metric(sample.tags, sample.value / unit)
            yield made
        for name in ("latency", "upstream"):
            yield self._histogram(BY_NAME[f"request.{name}_ms"], name)

    def _histogram(self, metric: Metric, name: str) -> HistogramMetricFamily:
        made = HistogramMetricFamily(metric.prometheus, metric.about, labels=metric.tags)
        for key, numbers, sum_ms in self.metrics.histograms(name):
            buckets = list(zip(_LE, map(float, accumulate(numbers)), strict=True))
            made.add_metric(key, buckets, sum_value=sum_ms / 1000)
        return made


def _shown(key: SeriesKey) -> SeriesKey:
    return SeriesKey(key.flag, key.cohort, tag_of(key.model_version))


def expected(
    known: Mapping[Cohort, Collection[str]], served: Iterable[str], most: int
) -> dict[Cohort, list[SeriesKey]]:
    """Series that requests may bring next: of each arm of a flag, of all versions that answered any of its requests.

    A fall-back and a request of the wrong arm have the other arm's version, an answer that never came has none, and a
    request without decision has no flag, and the version of whoever served it. `known` are the versions of each cohort
    that has a series; no cohort has more than MAX_VERSIONS with those to come, and all together get `most`.
    """
    of_flag: dict[str, dict[str, None]] = {NONE: {NONE: None}}
    for (flag, _), versions in known.items():
        of_flag.setdefault(flag, {NONE: None}).update(dict.fromkeys(versions))
        of_flag[NONE].update(dict.fromkeys(versions))
    for flag in served:
        of_flag.setdefault(flag, {NONE: None})
    found: dict[Cohort, list[SeriesKey]] = {}
    for flag, versions in of_flag.items():
        for cohort in (NONE,) if flag == NONE else Arm if flag != OTHER else ():
            there = known.get((flag, cohort), ())
            room = max(0, min(most, MAX_VERSIONS - len(there)))
            keys = [SeriesKey(flag, cohort, version) for version in versions if version not in there][:room]
            most -= len(keys)
            if keys:
                found[flag, cohort] = keys
    return found


def _of_series(key: SeriesKey, window: Window) -> Iterator[Sample]:
    before, now = window.before, window.now
    yield Sample("request.count", key, before.requests + now.requests)
    for error in dict.fromkeys((*_ERRORS, *before.errors, *now.errors)):
        yield Sample("request.errors", (*key, error), before.errors.get(error, 0) + now.errors.get(error, 0))
    for name in _WHOLE:
        yield Sample(f"request.{name}", key, getattr(before, name) + getattr(now, name))


def _of_minute(cohort: Cohort, windows: Iterable[Window]) -> Iterator[Sample]:
    minute = Tally()
    for window in windows:
        minute.merge(window.last_minute())
    for name, ms in percentiles(minute).items():
        if ms is not None:
            yield Sample(f"request.latency_{name}", cohort, ms)


def _once(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each series once: what is shown alike belongs together. What is no number is left out."""
    merged: dict[Series, float] = {}
    for name, tags, value in samples:
        if isfinite(value):
            merged[name, tags] = merged.get((name, tags), 0) + value
    for (name, tags), value in merged.items():
        yield Sample(name, tags, value)


def _send_durations(metrics: Metrics, name: str, key: SeriesKey, counts: Mapping[int, int]) -> None:
    """Sends a second's durations: all of them if they are few, else TIMINGS quantiles that stand for them."""
    ordered = sorted(item for item in counts.items() if item[0] >= 0)
    total = sum(n for _, n in ordered)
    few = min(total, TIMINGS)
    upto = list(accumulate(n for _, n in ordered))
    ranks = ((2 * i + 1) * total // (2 * few) for i in range(few))
    values = [value_of(ordered[bisect_left(upto, rank + 1)][0]) for rank in ranks]
    metrics.timings(name, values, total, **dict(zip(BY_NAME[name].tags, _shown(key), strict=True)))

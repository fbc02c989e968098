"""`perch.request.*`: what the telemetry knows, as StatsD lines each second and as Prometheus text when asked.

Both come from the same samples. Series are bounded: flags and cohorts are the flag file's, model versions and
predictions are limited to the first so many, the rest is `other`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from extproc.core.windows import SeriesKey, Tally, Window
from extproc.metricnames import BY_NAME, Kind, Metric
from extproc.metrics import Metrics
from extproc.telemetry import Telemetry

MAX_PREDICTIONS = 19
"""Predictions of a cohort with a series of their own; with `other` 20."""
MAX_KPIS = 64
TIMINGS = 64
"""Durations sent per series and second: quantiles of that second, with the sample rate that they stand for."""
BUCKETS_MS = tuple(edge_of(bin_of(ms)) for ms in (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 15_000))
_WHOLE = ("aborted", "fell_back", "failed_open", "mismatched")


class Sample(NamedTuple):
    """One series now: the total so far of a counter, the value of a gauge."""

    name: str
    tags: tuple[str, ...]
    value: float


@dataclass(slots=True)
class RequestMetrics:
    """Makes the samples. `log` are the access log's counts, `differences` the reconciliation's by flag."""

    telemetry: Telemetry
    log: LogCounts
    differences: Callable[[], Mapping[str, Difference]]
    _predictions: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)
    _sent: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    _drift: dict[str, Drift | None] = field(default_factory=dict)

    def second(self, second: int, metrics: Metrics) -> None:
        """Ends a second: everything that happened in it goes to StatsD."""
        shown, _ = self.telemetry.windows.roll(second)
        for flag in {key.flag for key in shown}:
            self._drift[flag] = newest_drift(self.telemetry.windows, flag)
        for key, tally in shown.items():
            _time(metrics, "request.latency_ms", key, tally.latency)
            _time(metrics, "request.upstream_ms", key, tally.upstream)
        for name, tags, value in self.samples():
            metric = BY_NAME[name]
            named = dict(zip(metric.tags, tags, strict=True))
            if metric.kind is Kind.GAUGE:
                metrics.gauge(name, value, **named)
            elif grown := value - self._sent.get((name, tags), 0):
                self._sent[name, tags] = value
                # A counter that shrank is one that began again, as after a new step: all of it is new.
                metrics.count(name, int(grown if grown > 0 else value), **named)

    def samples(self) -> Iterator[Sample]:
        """Every counter and gauge as it stands."""
        self.telemetry.windows.settle()
        for key, window in self.telemetry.windows.shown.items():
            yield from _of_series(key, window)
        for flag in sorted({key.flag for key in self.telemetry.windows.shown} & set(self.telemetry.model_of())):
            yield from self._of_flag(flag)
        yield from self._of_kpis()
        for flag, found in self.differences().items():
            yield Sample("request.lost", (flag,), found.lost)
            yield Sample("request.surplus", (flag,), found.surplus)
        yield Sample("request.log_entries", (), self.log.entries)
        yield Sample("request.log_unreadable", (), self.log.unreadable + self.log.unreadable_messages)
        yield Sample("request.log_streams", (), self.log.open)
        for what, n in sorted(self._dropped().items()):
            yield Sample("request.dropped", (what,), n)

    def _of_flag(self, flag: str) -> Iterator[Sample]:
        windows = self.telemetry.windows
        yield from self._of_drift(flag)
        for arm in Arm:
            minute = Tally()
            for key, window in windows.shown.items():
                if key.flag == flag and key.cohort == arm:
                    minute.merge(window.last_minute())
            for name, ms in percentiles(minute).items():
                if ms is not None:
                    yield Sample(f"request.latency_{name}", (flag, arm), ms)
            for prediction, n in self._of_labels(flag, arm).items():
                yield Sample("request.predictions", (flag, arm, prediction), n)

    def _of_drift(self, flag: str) -> Iterator[Sample]:
        drift = self._drift.get(flag)
        if drift is None:
            return
        for measure in ("js", "wasserstein_sd", "psi", "ks"):
            value = getattr(drift, measure)
            if value is not None:
                yield Sample("request.drift", (flag, measure), value)
        yield Sample("request.drift_n", (flag, Arm.STABLE), drift.n_stable)
        yield Sample("request.drift_n", (flag, Arm.CANARY), drift.n_canary)

    def _of_labels(self, flag: str, arm: str) -> dict[str, int]:
        """The predictions of a cohort. Which ones have a series of their own is settled once, so that none shrinks."""
        labels = self.telemetry.windows.labels(flag, arm)
        named = self._predictions.setdefault((flag, arm), {})
        if len(named) < MAX_PREDICTIONS:
            for label in sorted(labels, key=lambda one: (-labels[one], one)):
                if label not in named and len(named) < MAX_PREDICTIONS:
                    named[label] = None
        found = {label: labels[label] for label in named if label in labels}
        rest = sum(labels.values()) - sum(found.values())
        return {**found, OTHER: rest} if rest else found

    def _of_kpis(self) -> Iterator[Sample]:
        for (flag, name), arm, n, mean in kpi_means(self.telemetry):
            yield Sample("request.kpi_count", (flag, arm, name), n)
            yield Sample("request.kpi_mean", (flag, arm, name), mean)
        counts = self.telemetry.kpis.counts
        for result in ("joined", "unknown", "late", "duplicates", "refused"):
            yield Sample("request.outcomes", (result,), getattr(counts, result))

    def _dropped(self) -> dict[str, int]:
        counts = self.telemetry.kpis.counts
        forgotten = {"kpi_requests": counts.pushed_out, "kpi_groups": counts.unkept, "kpi_keys": counts.keys_forgotten}
        return {**self.telemetry.windows.dropped, **{what: n for what, n in forgotten.items() if n}}

    def prometheus(self) -> bytes:
        """The text that `GET /metrics` answers with, in Prometheus' own format (0.0.4)."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Once(self))
        return generate_latest(registry)


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
            for sample in samples:
                made.add_metric(sample.tags, sample.value)
            yield made
        for name in ("latency", "upstream"):
            yield self._histogram(BY_NAME[f"request.{name}_ms"], name)

    def _histogram(self, metric: Metric, name: str) -> HistogramMetricFamily:
        made = HistogramMetricFamily(metric.prometheus, metric.about, labels=metric.tags)
        for key, window in self.metrics.telemetry.windows.shown.items():
            counts: Mapping[int, int] = getattr(window.total(), name)
            total_ms = sum(value_of(place) * n for place, n in counts.items())
            buckets = [
                (f"{ms / 1000:.6g}", float(sum(n for place, n in counts.items() if edge_of(place) <= ms)))
                for ms in BUCKETS_MS
            ]
            made.add_metric(key, [*buckets, ("+Inf", float(sum(counts.values())))], sum_value=total_ms / 1000)
        return made


def _of_series(key: SeriesKey, window: Window) -> Iterator[Sample]:
    before, now = window.before, window.now
    yield Sample("request.count", key, before.requests + now.requests)
    for error in sorted({*before.errors, *now.errors}):
        yield Sample("request.errors", (*key, error), before.errors.get(error, 0) + now.errors.get(error, 0))
    for name in _WHOLE:
        if n := getattr(before, name) + getattr(now, name):
            yield Sample(f"request.{name}", key, n)


def _time(metrics: Metrics, name: str, key: SeriesKey, counts: Mapping[int, int]) -> None:
    """Sends a second's durations: all of them if they are few, else TIMINGS quantiles that stand for them."""
    total = sum(counts.values())
    if not total:
        return
    tags = dict(zip(BY_NAME[name].tags, key, strict=True))
    ordered = iter(sorted(counts.items()))
    place, upto = next(ordered)
    few = min(total, TIMINGS)
    values = []
    for i in range(few):
        rank = (2 * i + 1) * total // (2 * few)
        while rank >= upto:
            place, n = next(ordered)
            upto += n
        values.append(value_of(place))
    metrics.timings(name, values, total, **tags)

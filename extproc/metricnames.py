"""The names and tags of everything perch measures, in one table. What is emitted is looked up here."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a metric is to StatsD and to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    TIMER = "timer"
    """A timer of StatsD in milliseconds; a histogram of Prometheus in seconds, where Prometheus has it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `name` without the prefix `perch.`, its tags in the order of the table, and what it counts."""

    name: str
    kind: Kind
    tags: tuple[str, ...]
    about: str

    @property
    def prometheus(self) -> str:
        """The name in Prometheus' text, as it is to be queried."""
        plain = "perch_" + self.name.replace(".", "_")
        if self.kind is Kind.COUNTER:
            return f"{plain}_total"
        return plain.removesuffix("_ms") + "_seconds" if self.kind is Kind.TIMER else plain


_SERIES = ("flag", "cohort", "model_version")

REQUEST_METRICS = tuple(
    Metric(f"request.{name}", kind, tags, about)
    for name, kind, tags, about in (
        ("count", Kind.COUNTER, _SERIES, "inference requests, by the cohort that was assigned"),
        ("errors", Kind.COUNTER, (*_SERIES, "class"), "of them failed by the server: `5xx`, `deadline`, `no_answer`"),
        ("aborted", Kind.COUNTER, _SERIES, "of them given up by the client"),
        ("fell_back", Kind.COUNTER, _SERIES, "of them assigned to canary and served by stable: no canary was there"),
        ("failed_open", Kind.COUNTER, _SERIES, "of them let through to stable because ext_proc did not answer"),
        ("mismatched", Kind.COUNTER, _SERIES, "of them served by another arm than decided, fall-backs aside"),
        ("latency_ms", Kind.TIMER, _SERIES, "from the first byte of the request to the last of the answer"),
        ("upstream_ms", Kind.TIMER, _SERIES, "the model server's part of it"),
        ("latency_p50_ms", Kind.GAUGE, ("flag", "cohort"), "median of the last minute, within 2 %"),
        ("latency_p95_ms", Kind.GAUGE, ("flag", "cohort"), "95th percentile of the last minute, within 2 %"),
        ("latency_p99_ms", Kind.GAUGE, ("flag", "cohort"), "99th percentile of the last minute, within 2 %"),
        ("predictions", Kind.COUNTER, ("flag", "cohort", "prediction"), "one prediction of each request: 20 at most"),
        ("drift", Kind.GAUGE, ("flag", "measure"), "canary against stable: `js`, `wasserstein_sd`, `psi`, `ks`"),
        ("drift_n", Kind.GAUGE, ("flag", "cohort"), "predictions that the drift is computed from"),
        ("kpi_count", Kind.COUNTER, ("flag", "cohort", "kpi"), "values reported and joined to a request"),
        ("kpi_mean", Kind.GAUGE, ("flag", "cohort", "kpi"), "their mean"),
        ("outcomes", Kind.COUNTER, ("result",), "values reported, by what became of them"),
        ("lost", Kind.GAUGE, ("flag",), "requests that the access log should have and has not, at least"),
        ("surplus", Kind.GAUGE, ("flag",), "requests in the access log that no known process caused, at least"),
        ("log_entries", Kind.COUNTER, (), "entries of the access log that were read"),
        ("log_unreadable", Kind.COUNTER, (), "entries or messages of it that were not"),
        ("log_streams", Kind.GAUGE, (), "open streams of the access log: one per worker thread of each Envoy"),
        ("dropped", Kind.COUNTER, ("what",), "given up because a limit was reached, by what it was"),
    )
)
BY_NAME = {metric.name: metric for metric in REQUEST_METRICS}

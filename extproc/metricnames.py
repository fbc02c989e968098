"""The names and tags of everything perch measures, in one table. docs/metrics.md shows it; what is emitted is in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a metric is to StatsD and to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    TIMER = "timer"
    """A timer of StatsD in milliseconds, or in the unit that `about` names; a histogram of Prometheus in seconds."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `name` without the prefix `perch.`, its tags, what it counts, its name in Prometheus' text if any.

    Every line has all of `tags`; `sometimes` are tags that only some lines have.
    """

    name: str
    kind: Kind
    tags: tuple[str, ...]
    about: str
    prometheus: str = ""
    sometimes: tuple[str, ...] = ()


_DECISION = ("cohort", "flag", "model", "reason")
_SERIES = ("flag", "cohort", "model_version")
_COHORT = ("flag", "cohort")
_SERVER = ("cohort", "model")
_VERSION = (*_SERVER, "model_version")
_MINUTE = "of the last minute's latencies, within 2 %"

SERVE_METRICS = (
    Metric(
        "decision.count",
        Kind.COUNTER,
        _DECISION,
        "answers of ext_proc, by what was decided; `rule` where one decided",
        sometimes=("rule",),
    ),
    Metric("decision.canary_percent", Kind.GAUGE, ("flag", "model"), "the percentage that is served now"),
    Metric("decision.heaviest_unit_share", Kind.GAUGE, ("flag",), "share, 0 to 1, of the unit that asks most"),
    Metric("decision.ruleset", Kind.GAUGE, ("version",), "always 1; the tag is the ruleset that is served"),
    Metric("decision.reload", Kind.COUNTER, ("result",), "flag files read: `accepted`, `rejected`"),
)


def _request(name: str, kind: Kind, tags: tuple[str, ...], about: str) -> Metric:
    """One of `perch.request.*`, under the name that Prometheus' conventions ask for: seconds, totals."""
    plain = f"perch_request_{name.removesuffix('_ms')}" + ("_seconds" if name.endswith("_ms") else "")
    return Metric(f"request.{name}", kind, tags, about, plain + ("_total" if kind is Kind.COUNTER else ""))


REQUEST_METRICS = (
    _request("count", Kind.COUNTER, _SERIES, "inference requests, by the cohort that was assigned"),
    _request("errors", Kind.COUNTER, (*_SERIES, "class"), "of them failed: `5xx`, `deadline`, `no_answer`"),
    _request("fell_back", Kind.COUNTER, _SERIES, "assigned to canary, served by stable: no canary server could"),
    _request("failed_open", Kind.COUNTER, _SERIES, "let through to stable because ext_proc did not answer"),
    _request("mismatched", Kind.COUNTER, _SERIES, "served by another arm than decided, fall-backs aside"),
    _request("aborted", Kind.COUNTER, _SERIES, "given up by the client; in none of the others"),
    _request("latency_ms", Kind.TIMER, _SERIES, "first byte in to last byte out, where the assigned arm served"),
    _request("upstream_ms", Kind.TIMER, _SERIES, "the model server's part of it"),
    _request("latency_p50_ms", Kind.GAUGE, _COHORT, f"median {_MINUTE}"),
    _request("latency_p95_ms", Kind.GAUGE, _COHORT, f"95th percentile {_MINUTE}"),
    _request("latency_p99_ms", Kind.GAUGE, _COHORT, f"99th percentile {_MINUTE}"),
    _request(
        "predictions", Kind.COUNTER, (*_COHORT, "prediction"), "one of each request: 19 of a cohort, and `(other)`"
    ),
    _request("drift", Kind.GAUGE, ("flag", "measure"), "canary against stable: `js`, `wasserstein_sd`, `psi`, `ks`"),
    _request("drift_n", Kind.GAUGE, _COHORT, "predictions that the drift is computed from"),
    _request("kpi_count", Kind.COUNTER, (*_COHORT, "kpi"), "values reported and joined to who served"),
    _request("kpi_mean", Kind.GAUGE, (*_COHORT, "kpi"), "their mean"),
    _request("outcomes", Kind.COUNTER, ("result",), "reports: `joined`, `unknown`, `late`, `duplicates`, `refused`"),
    _request("outcomes_pending", Kind.GAUGE, (), "reports that wait for their request; after ten seconds `unknown`"),
    _request("lost", Kind.GAUGE, ("flag",), "requests that the access log owes, at least"),
    _request("surplus", Kind.GAUGE, ("flag",), "requests in it that no known process caused, at least"),
    _request("log_entries", Kind.COUNTER, (), "entries of the access log that were read"),
    _request("log_unreadable", Kind.COUNTER, (), "entries or messages of it that could not be read"),
    _request("log_streams", Kind.GAUGE, (), "open streams of it: one per worker thread of each Envoy"),
    _request("dropped", Kind.COUNTER, ("what",), "given up because a limit was reached, by what it was"),
)

CONTROL_METRICS = (Metric("cluster.ready", Kind.GAUGE, _SERVER, "servers of an arm that Envoy finds healthy"),)

MODEL_METRICS = (
    Metric("model.requests", Kind.COUNTER, (*_VERSION, "status"), "inference requests answered, by HTTP status"),
    Metric("model.errors", Kind.COUNTER, _VERSION, "of them with a status of 500 or above"),
    Metric(
        "model.predictions", Kind.COUNTER, (*_VERSION, "prediction"), "all predictions: 64 of a version, and `other`"
    ),
    Metric("model.queue_ms", Kind.TIMER, _VERSION, "waiting of the first request of a call of the model"),
    Metric("model.inference_ms", Kind.TIMER, _VERSION, "a call of the model"),
    Metric("model.batch_rows", Kind.TIMER, _VERSION, "rows (not milliseconds) of a call"),
    Metric("model.batch_requests", Kind.TIMER, _VERSION, "requests (not milliseconds) that shared a call"),
    Metric("model.reloads", Kind.COUNTER, (*_VERSION, "result"), "new versions: `ok`, `rejected`"),
    Metric("model.warm_ms", Kind.GAUGE, _VERSION, "time that the last warm-up took"),
    Metric("model.rss_bytes", Kind.GAUGE, _SERVER, "resident memory of the process"),
)

EVERYWHERE = (
    Metric(
        "metrics.dropped",
        Kind.COUNTER,
        ("why",),
        "measurements that StatsD did not get: `send`, `series`, `line`, `value`; a model server's have its tags",
        sometimes=_SERVER,
    ),
)

METRICS = (*SERVE_METRICS, *REQUEST_METRICS, *CONTROL_METRICS, *MODEL_METRICS, *EVERYWHERE)
BY_NAME = {metric.name: metric for metric in METRICS}


def markdown_table(metrics: Iterable[Metric] = METRICS) -> str:
    """The table as docs/metrics.md shows it, with the line end of its last row."""
    rows = ["| StatsD | kind | tags | Prometheus | what it is |", "|---|---|---|---|---|"]
    for metric in metrics:
        tags = ", ".join((*metric.tags, *(f"({tag})" for tag in metric.sometimes)))
        prometheus = f"`{metric.prometheus}`" if metric.prometheus else ""
        rows.append(f"| `perch.{metric.name}` | {metric.kind} | {tags} | {prometheus} | {metric.about} |")
    return "\n".join(rows) + "\n"

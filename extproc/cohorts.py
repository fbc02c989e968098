"""The cohorts of each flag side by side, as plain data: what `GET /v1/status` and `perch status` show of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from extproc.core.drift import Drift, drift_of
from extproc.core.latency import LatencyHistogram
from extproc.core.numberbins import NumberBins
from extproc.core.outcomes import Arm
from extproc.core.predictions import Kind, kind_of
from extproc.core.windows import RECENT_S, Tally, Windows
from extproc.telemetry import Telemetry

SHARES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
TOP = 20


def cohorts_of(telemetry: Telemetry, flag: str) -> dict[str, Any]:
    """A flag's `cohorts`, `drift` and `kpis`; each key only once there is something to show.

    `requests` are those assigned to the cohort since control runs, `errors` and `fell_back` are among them. The
    percentiles are of requests that the cohort also served, over the same time; `last_minute` has them for RECENT_S.
    `predictions` are labels, or ranges where they are numbers; none while the ranges are not known yet (`learning`),
    none of vectors.
    """
    windows = telemetry.windows
    windows.settle()
    found: dict[str, Any] = {}
    cohorts = {arm.value: row for arm in Arm if (row := _cohort(telemetry, flag, arm)) is not None}
    if cohorts:
        assigned = sum(row["requests"] for row in cohorts.values())
        for row in cohorts.values():
            row["share"] = round(row["requests"] / assigned, 5) if assigned else 0.0
        found["cohorts"] = cohorts
    drift = newest_drift(windows, flag)
    if drift is not None:
        found["drift"] = plain_drift(drift)
    kpis = kpis_of(telemetry, flag)
    if kpis:
        found["kpis"] = kpis
    return found


def _cohort(telemetry: Telemetry, flag: str, arm: Arm) -> dict[str, Any] | None:
    windows = telemetry.windows
    series = [window for key, window in windows.shown.items() if key.flag == flag and key.cohort == arm]
    if not series:
        return None
    total, minute = Tally(), Tally()
    for window in series:
        total.merge(window.total())
        minute.merge(window.last_minute())
    return {
        "requests": total.requests,
        "errors": sum(total.errors.values()),
        "errors_by_class": dict(sorted(total.errors.items())),
        "fell_back": total.fell_back,
        "mismatched": total.mismatched,
        "aborted": total.aborted,
        **percentiles(total),
        **_predictions(telemetry, flag, arm),
        "model_versions": _versions(windows, flag, arm),
        "last_minute": {
            "requests_per_s": round(minute.requests / min(RECENT_S, max(1, windows.seconds)), 3),
            "error_rate": round(sum(minute.errors.values()) / minute.requests, 5) if minute.requests else None,
            **percentiles(minute),
        },
    }


def _predictions(telemetry: Telemetry, flag: str, arm: Arm) -> dict[str, Any]:
    """What the arm predicted most, and what it is: labels as they came, ranges of numbers, nothing of vectors."""
    windows = telemetry.windows
    labels, key = windows.labels(flag, arm), windows.newest(flag)
    comparison = None if key is None else windows.groups[key].predictions
    kind = _declared(telemetry, flag, labels) if comparison is None else comparison.looks_like()
    ranges = comparison is not None and isinstance(comparison.reference, NumberBins)
    shown: dict[str, int] = {}
    if comparison is not None and ranges:
        shown = dict(comparison.top(arm, TOP))
    elif kind is Kind.LABELS:
        shown = dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:TOP])
    return {"predictions": shown, "prediction_kind": kind, "learning": kind is Kind.NUMBERS and not ranges}


def _declared(telemetry: Telemetry, flag: str, labels: Mapping[str, int]) -> Kind:
    """What predictions are of which none was compared."""
    kind = Kind(telemetry.windows.kind_of(telemetry.model_of().get(flag, "")))
    return kind_of(labels) if kind is Kind.AUTO else kind


def percentiles(tally: Tally) -> dict[str, float | None]:
    """The percentiles of a tally's latencies in milliseconds, within 2 %; None without any."""
    found = LatencyHistogram(tally.latency).quantiles(*SHARES.values())
    return {name: None if ms is None else round(ms, 3) for name, ms in zip(SHARES, found, strict=True)}


def _versions(windows: Windows, flag: str, arm: Arm) -> dict[str, int]:
    return {
        key.model_version: total
        for key, window in windows.shown.items()
        if key.flag == flag and key.cohort == arm and (total := window.total().requests)
    }


def newest_drift(windows: Windows, flag: str) -> Drift | None:
    """The drift of the flag's own percentage at its highest step; None until both arms have predicted something."""
    key = windows.newest(flag)
    return None if key is None else drift_of(windows.groups[key].predictions)


def plain_drift(drift: Drift) -> dict[str, Any]:
    """The drift as JSON can hold it, rounded to what a person reads; `n` are the canary's predictions."""
    measures = {name: getattr(drift, name) for name in ("js", "wasserstein_sd", "psi", "ks")}
    rounded = {name: None if value is None else round(value, 5) for name, value in measures.items()}
    return {**rounded, "n": drift.n_canary, "n_stable": drift.n_stable}


def kpis_of(telemetry: Telemetry, flag: str) -> dict[str, dict[str, Any]]:
    """Number and mean of each reported name, by the arm that served; what was judged only."""
    found: dict[str, dict[str, Any]] = {}
    for name, arm, n, mean in kpi_means(telemetry):
        if name[0] == flag:
            found.setdefault(name[1], {})[arm] = {"n": n, "mean": round(mean, 6)}
    return found


def kpi_means(telemetry: Telemetry) -> Iterable[tuple[tuple[str, str], str, int, float]]:
    """((flag, name), arm, number, mean) over all strata and steps of what may be judged."""
    sums: dict[tuple[str, str, str], tuple[int, float]] = {}
    for key, moments in telemetry.kpis.totals().items():
        if key.judged:
            n, total = sums.get((key.flag, key.name, key.arm), (0, 0.0))
            sums[key.flag, key.name, key.arm] = (n + moments.n, total + moments.sum)
    for (flag, name, arm), (n, total) in sorted(sums.items()):
        yield (flag, name), arm, n, total / n

"""What a bench measured, and what follows from it. Pure.

Ratios are taken within a round, because a machine's speed changes between rounds; of the rounds' ratios the smallest,
the median and the largest are told.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

OFF, FAST, GRPCIO, LOGGED = "off", "fast", "grpcio", "fast+log"
"""Paths: no filter at all, perch's two transports, and the fast one with Envoy's access log on."""
RATE_PER_S = 1_000
"""At which latencies are measured: far below what any path can do, so that nothing waits for its turn."""
FIGURES = ("requests_per_s", "p50_us", "p99_us", "server_us", "envoy_us")


@dataclass(frozen=True, slots=True)
class Sample:
    """One path in one round. CPU is per request, in microseconds.

    Latencies are at RATE_PER_S, None where nothing could measure them; the path without a filter has no server.
    """

    path: str
    round: int
    requests_per_s: float
    server_us: float | None
    envoy_us: float
    p50_us: float | None
    p99_us: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """The smallest, the median and the largest of the rounds' ratios."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f}  ({self.min:.{digits}f} to {self.max:.{digits}f})"


def paths_of(samples: Iterable[Sample]) -> list[str]:
    """The paths in the order they were first measured."""
    return list(dict.fromkeys(sample.path for sample in samples))


def values(samples: Iterable[Sample], path: str, figure: str) -> list[float]:
    """A figure of one path, round by round; empty where it was not measured."""
    found = (getattr(sample, figure) for sample in samples if sample.path == path)
    return [value for value in found if value is not None]


def medians(samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """The median of each figure by path; None where it was not measured."""
    return {
        path: {
            figure: statistics.median(found) if (found := values(samples, path, figure)) else None for figure in FIGURES
        }
        for path in paths_of(samples)
    }


def ratios(samples: Sequence[Sample]) -> dict[str, Spread]:
    """Every ratio that says something, by what it is of. Latency is compared as what it adds to the one without."""
    by_round: dict[int, dict[str, Sample]] = {}
    for sample in samples:
        by_round.setdefault(sample.round, {})[sample.path] = sample
    rounds = list(by_round.values())
    found = {f"requests/s, {path} to off": _spread(rounds, partial(_per_s, path)) for path in paths_of(samples)[1:]}
    for path in paths_of(samples):
        if path not in {OFF, FAST, LOGGED}:
            found[f"server CPU, {path} to fast"] = _spread(rounds, partial(_server_cpu, path))
            found[f"added p50, fast to {path}"] = _spread(rounds, partial(_added_p50, path))
    return {name: spread for name, spread in found.items() if spread is not None}


def _spread(rounds: list[dict[str, Sample]], ratio: Callable[[dict[str, Sample]], float]) -> Spread | None:
    """None where a part of it was not measured, or is nothing to divide by."""
    try:
        found = [ratio(one) for one in rounds]
    except (TypeError, ZeroDivisionError):
        return None
    return Spread(min(found), statistics.median(found), max(found))


def _per_s(path: str, one: dict[str, Sample]) -> float:
    return one[path].requests_per_s / one[OFF].requests_per_s


def _server_cpu(path: str, one: dict[str, Sample]) -> float:
    return _there(one[path].server_us) / _there(one[FAST].server_us)


def _added_p50(path: str, one: dict[str, Sample]) -> float:
    base = _there(one[OFF].p50_us)
    return (_there(one[FAST].p50_us) - base) / (_there(one[path].p50_us) - base)


def _there(value: float | None) -> float:
    if value is None:
        raise TypeError("not measured")
    return value


def document(samples: Sequence[Sample], about: dict[str, Any]) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        **about,
        "medians": medians(samples),
        "ratios": {name: asdict(spread) for name, spread in ratios(samples).items()},
        "samples": [asdict(sample) for sample in samples],
    }

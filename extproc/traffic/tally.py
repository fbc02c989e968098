"""What came of the traffic, by the client's own record."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from extproc.core.latency import LatencyHistogram

UNKNOWN = "unknown"
"""Cohort or version of an answer that does not say."""


NO_ANSWER, ABANDONED = "no answer", "abandoned"
"""Statuses that are no number; what is abandoned was stopped before its answer came."""

SUCCESS = range(200, 300)
"""Statuses that are no error: nothing is asked that a model should refuse."""


@dataclass(slots=True)
class Group:
    """Answers of one cohort; `errors` those of any status but a SUCCESS.

    `judged` are those with a prediction, `correct` those that saw the digit that it is.
    """

    requests: int = 0
    errors: int = 0
    judged: int = 0
    correct: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it; `accuracy` is None without a prediction."""
        accuracy = round(self.correct / self.judged, 4) if self.judged else None
        counts = {"requests": self.requests, "errors": self.errors, "judged": self.judged, "correct": self.correct}
        return {**counts, "accuracy": accuracy, "latency_ms": latency_of(self.latency)}


@dataclass(slots=True)
class Tally:
    """Counts that only grow. `skipped` were due and never sent: too many waited for a connection.

    `behind_s` is the most that this program was late by itself: beyond some ten milliseconds, latencies tell of it.
    """

    sent: int = 0
    skipped: int = 0
    behind_s: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    cohorts: dict[str, Group] = field(default_factory=dict)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    @property
    def answered(self) -> int:
        """Requests that had an answer, whatever it was."""
        return sum(group.requests for group in self.cohorts.values())

    @property
    def errors(self) -> int:
        """Answers that were errors, and requests that had no answer. What was abandoned is neither."""
        return sum(group.errors for group in self.cohorts.values()) + self.statuses[NO_ANSWER]

    def unanswered(self, status: str, problem: str) -> None:
        """A request that was sent and not answered."""
        self.statuses[status] += 1
        self.problems[problem] += 1

    def answer(self, status: int, cohort: str, version: str, ms: float, correct: bool | None) -> None:  # noqa: FBT001  the fact itself
        """An answer. `correct` is None for one without a prediction."""
        self.statuses[str(status)] += 1
        self.versions[version] += 1
        group = self.cohorts.setdefault(cohort, Group())
        group.requests += 1
        group.errors += status not in SUCCESS
        group.judged += correct is not None
        group.correct += correct is True
        group.latency.add(ms)
        self.latency.add(ms)

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "sent": self.sent,
            "answered": self.answered,
            "errors": self.errors,
            "skipped": self.skipped,
            "behind_ms": round(self.behind_s * 1000, 1),
            "statuses": dict(sorted(self.statuses.items())),
            "problems": dict(self.problems.most_common()),
            "versions": dict(sorted(self.versions.items())),
            "cohorts": {cohort: group.plain() for cohort, group in sorted(self.cohorts.items())},
            "latency_ms": latency_of(self.latency),
        }


def latency_of(histogram: LatencyHistogram) -> dict[str, float | None]:
    """Three quantiles in milliseconds, within 2 %."""
    found = histogram.quantiles(0.5, 0.95, 0.99)
    return {name: None if ms is None else round(ms, 2) for name, ms in zip(("p50", "p95", "p99"), found, strict=True)}

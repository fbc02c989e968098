"""What serve decided, counted where it happens and summed where it is shown. Loss and repeats of messages are harmless.

Each process of serve sends its own counts, which only grow, and `gcounter` sums them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from extproc.core.gcounter import GCounter, Message, Process

MAX_PROCESSES = 1_000
"""Beyond this many, the one that was silent longest is folded into the sum for good."""


class Key(NamedTuple):
    """What is counted separately."""

    flag: str
    model: str
    version: str
    cohort: str
    reason: str
    rule: str


@dataclass(frozen=True, slots=True)
class Report:
    """One message: who sends (a worker's address and the id of its boot), its `seq`, its counts, its heavy units.

    `heavy` is the largest share of one unit of each flag, 0 .. 1, and that unit if it is configured to be shown.
    """

    worker: str
    boot: str
    seq: int
    counts: Mapping[Key, int]
    heavy: Mapping[str, tuple[float, str | None]]


def plain_report(report: Report) -> dict[str, Any]:
    """The report as JSON can hold it."""
    return {
        "worker": report.worker,
        "boot": report.boot,
        "seq": report.seq,
        "counts": [[*key, n] for key, n in report.counts.items()],
        "heavy": {flag: list(found) for flag, found in report.heavy.items()},
    }


def parse_report(data: Any) -> Report:
    """A report from what JSON gave. Raises ValueError for anything else."""
    try:
        counts = {Key(*map(str, row[:-1])): int(row[-1]) for row in data["counts"]}
        heavy = {
            str(flag): (float(share), None if unit is None else str(unit))
            for flag, (share, unit) in data["heavy"].items()
        }
        return Report(str(data["worker"]), str(data["boot"]), int(data["seq"]), counts, heavy)
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"no report: {error}") from None


@dataclass(slots=True)
class Decided:
    """The sum over all processes that ever reported."""

    _sums: GCounter[Key] = field(default_factory=lambda: GCounter(MAX_PROCESSES))
    _latest: dict[Process, Report] = field(default_factory=dict)

    def take(self, report: Report) -> None:
        """Merges one report."""
        process = Process(report.worker, report.boot)
        folded = self._sums.take(Message(process, report.seq, report.counts))
        if folded is not None:
            self._latest.pop(folded, None)
        if report.seq == self._sums.seq(process):
            for other in [other for other in self._latest if other.replica == report.worker and other != process]:
                del self._latest[other]  # an earlier boot of this worker says nothing about now
            self._latest[process] = report

    def totals(self) -> dict[Key, int]:
        """Decisions by key."""
        return self._sums.totals()

    def by_flag(self) -> dict[str, int]:
        """Decisions by flag."""
        found: dict[str, int] = {}
        for key, n in self.totals().items():
            found[key.flag] = found.get(key.flag, 0) + n
        return found

    def heard(self) -> dict[Process, int]:
        """Every process that reported, with the `seq` of its newest report."""
        return {process: self._sums.seq(process) or 0 for process in self._sums.processes()}

    def by_reason(self, flag: str) -> dict[str, dict[str, int]]:
        """Decisions of one flag: cohort, then reason."""
        found: dict[str, dict[str, int]] = {}
        for key, n in self.totals().items():
            if key.flag == flag:
                reasons = found.setdefault(key.cohort, {})
                reasons[key.reason] = reasons.get(key.reason, 0) + n
        return found

    def heaviest(self, flag: str) -> tuple[float, str | None] | None:
        """The largest share that one unit has of a flag's traffic in any process, and the unit if it is shown."""
        found = [report.heavy[flag] for report in self._latest.values() if flag in report.heavy]
        return max(found, key=lambda heavy: heavy[0], default=None)

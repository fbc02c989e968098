"""What the two arms of one comparison predicted, one vote per request, in memory that does not grow with traffic."""

from dataclasses import dataclass, field
from typing import NamedTuple

from extproc.core.outcomes import Arm

SHOWN = 32
"""Predictions that the response header shows at most."""

OTHER = "(other)"
MAX_DISTINCT = 2_000


def vote(header: str, count: int | None, unit_hash: int) -> str | None:
    """The one prediction of a response that counts, as it stands in the header; None when there is none."""
    if not header and count != 1:
        return None
    items = header.split(",", SHOWN)
    n = min(len(items), SHOWN) if count is None else min(len(items), SHOWN, count)
    return items[unit_hash % n].strip() if n > 0 else None


class Table(NamedTuple):
    """Counts of both arms over the same categories. `positions` are the categories' places on a line, None without."""

    stable: list[int]
    canary: list[int]
    names: list[str]
    positions: list[float | None] | None


@dataclass(slots=True)
class PredictionComparison:
    """Predictions of stable and canary side by side. `kind` is labels, numbers, vector or auto."""

    kind: str = "auto"
    _counts: dict[str, dict[str, int]] = field(default_factory=lambda: {arm: {} for arm in Arm})
    _overflow: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Arm, 0))

    def observe(self, arm: str, header: str, count: int | None, unit_hash: int) -> None:
        """Counts the vote of one response of an arm."""
        item = vote(header, count, unit_hash)
        if item is not None:
            self.add(arm, item)

    def add(self, arm: str, item: str) -> None:
        """Counts one vote of an arm."""
        counts = self._counts[arm]
        if item in counts or len(counts) < MAX_DISTINCT:
            counts[item] = counts.get(item, 0) + 1
        else:
            self._overflow[arm] += 1

    def tables(self) -> list[Table]:
        """One table of counts; for vectors one for each of the 18 features."""
        stable, canary = self._counts[Arm.STABLE], self._counts[Arm.CANARY]
        names = sorted(stable, key=lambda label: (-stable[label], label))[:19]
        rows = [[counts.get(name, 0) for name in names] for counts in (stable, canary)]
        for arm, row in zip(Arm, rows, strict=True):
            row.append(sum(self._counts[arm].values()) + self._overflow[arm] - sum(row))
        return [Table(rows[0], rows[1], [*names, OTHER], None)]

    def counts(self) -> tuple[list[int], list[int], list[str]]:
        """Stable's counts, canary's counts, and the names of the categories."""
        stable, canary, names, _ = self.tables()[0]
        return stable, canary, names

    def export(self) -> dict[str, int]:
        """All counts as one flat mapping."""
        return {f"{arm}={label}": n for arm, counts in self._counts.items() for label, n in counts.items()}

    def top(self, arm: str, limit: int = 5) -> list[tuple[str, int]]:
        """What an arm predicted most."""
        counts = self._counts[arm]
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]

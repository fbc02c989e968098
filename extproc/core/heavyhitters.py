"""Which units make up an unusual share of the traffic: `anonymous`, `null`, a load test. Bounded memory.

A summary of Misra and Gries with k counters, halved every half-life so that it forgets: a unit's count is never too
high, and too low by at most total / (k + 1). Source: J. Misra, D. Gries, Finding repeated elements, 1982; merging as in
P. Agarwal et al., Mergeable summaries, 2012.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

COUNTERS = 100
"""Enough to find every unit above 1 % of the traffic; what is asked for is 5 %."""

HALF_LIFE_S = 60.0
HEAVY_SHARE = 0.05
MIN_REQUESTS = 1_000
"""With fewer requests seen, a busy minute of one user looks like a share of all."""


@dataclass(slots=True)
class HeavyHitters:
    """Counts units, given as their hashes, of one flag. Times are monotonic, in seconds."""

    counts: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    _halved_s: float | None = None

    def add(self, counts: Mapping[int, int], now_s: float, others: int = 0) -> None:
        """Takes the requests of some units since the last call; of others, which cannot be heavy, their number."""
        self._forget(now_s)
        self.total += others
        for unit, n in counts.items():
            self.counts[unit] = self.counts.get(unit, 0.0) + n
            self.total += n
        if len(self.counts) > COUNTERS:
            floor = sorted(self.counts.values(), reverse=True)[COUNTERS]
            self.counts = {unit: n - floor for unit, n in self.counts.items() if n > floor}

    def _forget(self, now_s: float) -> None:
        if self._halved_s is None:
            self._halved_s = now_s
        factor = 0.5 ** ((now_s - self._halved_s) / HALF_LIFE_S)
        self._halved_s = now_s
        self.total *= factor
        self.counts = {unit: n * factor for unit, n in self.counts.items()}

    def heaviest(self) -> tuple[int, float] | None:
        """The unit with the largest share and that share, 0 .. 1; None before enough requests were seen."""
        if self.total < MIN_REQUESTS or not self.counts:
            return None
        unit = max(self.counts, key=self.counts.__getitem__)
        return unit, self.counts[unit] / self.total

"""Latencies in fixed logarithmic bins, the same on every replica, so that merging is adding.

The mapping is DDSketch's: bin i > 0 holds (LOWEST * GAMMA**(i-1), LOWEST * GAMMA**i]. Source: C. Masson, J. E. Rim,
H. K. Lee, DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees, VLDB 2019.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np

GAMMA = 1.04
LOWEST_MS = 0.1
BINS = 512
REFUSED = -1
"""Where bin_of puts what is no duration: below 0, NaN, infinite."""

EDGES_MS: tuple[float, ...] = tuple(104**i / (10 * 100**i) for i in range(BINS))
"""Upper edges of the bins, 0.1 ms .. 14 hours. A quotient of two integers is rounded correctly on every machine, which
a power or a logarithm is not: a latency on an edge must not change its bin from one replica to the next."""

_INNER = EDGES_MS[:-1]  # the last bin has no end
_INNER_ARRAY = np.array(_INNER)


def bin_of(ms: float) -> int:
    """The bin 0 .. BINS-1 of a duration, or REFUSED. Bin 0 is up to 0.1 ms, the last bin everything above 13.9 h."""
    return bisect_left(_INNER, ms) if 0.0 <= ms < inf else REFUSED


def count_bins(durations_ms: Sequence[float]) -> dict[int, int]:
    """How often each bin of `bin_of` occurs among the durations: for many of them at once."""
    ms = np.asarray(durations_ms, dtype=np.float64)
    bins = np.where((ms >= 0.0) & (ms < inf), np.searchsorted(_INNER_ARRAY, ms), REFUSED)
    found, counts = np.unique(bins, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def edge_of(bin_: int) -> float:
    """The upper edge of a bin in milliseconds, which belongs to it."""
    return EDGES_MS[bin_]


def value_of(bin_: int) -> float:
    """What stands for a bin, in milliseconds: at most 2 % from everything in it, between 0.1 ms and 14 h.

    Source: 2 * GAMMA**i / (GAMMA + 1), Masson et al., 2019, equation 2.
    """
    return EDGES_MS[bin_] * 2.0 / (1.0 + GAMMA)


@dataclass(slots=True)
class LatencyHistogram:
    """How often each bin occurred; what was refused is counted under REFUSED and belongs to no quantile."""

    counts: dict[int, int] = field(default_factory=dict)

    def add(self, ms: float) -> None:
        """Counts one duration."""
        counts = self.counts
        bin_ = bisect_left(_INNER, ms) if 0.0 <= ms < inf else REFUSED  # bin_of, without a second call
        counts[bin_] = counts.get(bin_, 0) + 1

    @property
    def total(self) -> int:
        """Durations counted, without the refused."""
        return sum(self.counts.values()) - self.refused

    @property
    def refused(self) -> int:
        """Values that were no duration."""
        return self.counts.get(REFUSED, 0)

    def merge(self, other: "LatencyHistogram") -> None:
        """Adds what the other counted."""
        for bin_, n in other.counts.items():
            self.counts[bin_] = self.counts.get(bin_, 0) + n

    def above(self, bin_: int) -> int:
        """Durations in bins above this one: how many exceeded its edge."""
        return sum(n for each, n in self.counts.items() if each > bin_)

    def quantile_bins(self, shares: Iterable[float]) -> list[int | None]:
        """The bin of the duration that `share` (0 .. 1) of all do not exceed, for each share; None without any.

        The nearest rank: the ceil(share * total)-th smallest, at least the first.
        """
        ordered = sorted(item for item in self.counts.items() if item[0] != REFUSED)
        total = sum(n for _, n in ordered)
        return [_bin_at(ordered, max(1, ceil(round(share * total, 6)))) for share in shares]

    def quantile(self, share: float) -> float | None:
        """The quantile in milliseconds, within 2 %; None without any duration."""
        (found,) = self.quantile_bins((share,))
        return None if found is None else value_of(found)

    def quantiles(self, *shares: float) -> list[float | None]:
        """Several quantiles for the price of one."""
        return [None if found is None else value_of(found) for found in self.quantile_bins(shares)]


def _bin_at(ordered: list[tuple[int, int]], rank: int) -> int | None:
    for bin_, n in ordered:
        rank -= n
        if rank <= 0:
            return bin_
    return ordered[-1][0] if ordered else None


def parse_latency(counts: Mapping[int | str, int]) -> LatencyHistogram:
    """A histogram from its counts, also with the texts that JSON makes of bins. ValueError for anything else."""
    try:
        parsed = {int(bin_): n for bin_, n in counts.items()}
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"no latency counts: {error}") from None
    for bin_, n in parsed.items():
        if not REFUSED <= bin_ < BINS or type(n) is not int or n < 0:
            raise ValueError(f"no latency counts: bin {bin_} has {n!r}")
    return LatencyHistogram(parsed)

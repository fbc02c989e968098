"""How far what the canary predicted lies from what stable predicted at the same time: measures for the panel.

All are computed from counts of the same categories in both arms. They are effect sizes, not tests: with few votes they
are large by chance, so the numbers of votes belong beside them. None stands for what is not defined.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import log, log2, sqrt
from typing import NamedTuple

from extproc.core.predictions import PredictionComparison, Table


class Drift(NamedTuple):
    """`js` 0 .. 1, `wasserstein_sd` in standard deviations of stable, `psi` without an upper end, `ks` 0 .. 1."""

    js: float | None
    wasserstein_sd: float | None
    psi: float | None
    ks: float | None
    n_stable: int
    n_canary: int


def shares(counts: Sequence[int]) -> list[float]:
    """Each category's share of all; of no votes, none."""
    total = sum(counts)
    return [n / total for n in counts] if total else []


def _pairs(stable: Sequence[int], canary: Sequence[int]) -> list[tuple[float, float]]:
    return list(zip(shares(stable), shares(canary), strict=True)) if sum(stable) and sum(canary) else []


def js_distance(stable: Sequence[int], canary: Sequence[int]) -> float | None:
    """Jensen-Shannon distance, base 2: the root of the divergence, 0 for equal shares, 1 for nothing in common.

    An empty category adds nothing on its side, so zeros need no care. Biased upwards with few votes: sqrt((K - 1) / 8
    (1/n_c + 1/n_s) / ln 2) is its usual size when nothing changed. Sources: J. Lin, Divergence measures based on the
    Shannon entropy, 1991; D. M. Endres, J. E. Schindelin, A new metric for probability distributions, 2003.
    """
    pairs = _pairs(stable, canary)
    if not pairs:
        return None
    middles = [(s + c) / 2 for s, c in pairs]
    divergence = sum(
        p * log2(p / middle) / 2 for pair, middle in zip(pairs, middles, strict=True) for p in pair if p > 0
    )
    return sqrt(min(1.0, max(0.0, divergence)))


def psi(stable: Sequence[int], canary: Sequence[int]) -> float | None:
    """Population stability index without its bias: about 0 when nothing changed, also with few votes; may be negative.

    PSI = sum (q - p) ln(q / p), whose expectation without any change is (K - 1) (1/n_c + 1/n_s), which is taken off
    (B. Yurdakul, J. Naranjo, Statistical properties of the population stability index, 2020). K counts the categories
    that either arm has used. Half a vote is added to each of them in both arms, so that one without votes is rare and
    not impossible.
    """
    if not sum(stable) or not sum(canary):
        return None
    used = [(s + 0.5, c + 0.5) for s, c in zip(stable, canary, strict=True) if s or c]
    n_stable, n_canary = sum(s for s, _ in used), sum(c for _, c in used)
    index = sum((c / n_canary - s / n_stable) * log((c * n_stable) / (s * n_canary)) for s, c in used)
    return index - (len(used) - 1) * (1 / sum(stable) + 1 / sum(canary))


def ks_distance(stable: Sequence[int], canary: Sequence[int], *, ordered: bool) -> float | None:
    """Kolmogorov-Smirnov distance of ordered categories: the largest difference of the shares up to one of them.

    Of categories without order, which have no "up to": the largest difference of the share of one. Both are what the
    drift guardrail's margins are about.
    """
    differences = [c - s for s, c in _pairs(stable, canary)]
    if ordered:
        differences = list(accumulate(differences))
    return min(1.0, max(map(abs, differences))) if differences else None


def wasserstein_sd(
    stable: Sequence[int], canary: Sequence[int], positions: Sequence[float | None] | None
) -> float | None:
    """Wasserstein-1 distance over stable's standard deviation: how far a vote has moved on average.

    The area between the two distribution functions (L. N. Vaserstein, 1969; for one dimension S. S. Vallender, 1974).
    Every vote stands at its category's position, so what moved beyond the ends of the reference counts as moved to
    them. Categories without a position are left out. None without positions, without votes that have one in both arms,
    and where stable has one value only.
    """
    placed = [
        (x, s, c) for x, s, c in zip(positions or [None] * len(stable), stable, canary, strict=True) if x is not None
    ]
    p, q = shares([s for _, s, _ in placed]), shares([c for *_, c in placed])
    if not p or not q:
        return None
    places = [x for x, _, _ in placed]
    mean = sum(x * share for x, share in zip(places, p, strict=True))
    sd = sqrt(sum((x - mean) ** 2 * share for x, share in zip(places, p, strict=True)))
    gaps = [abs(c - s) for s, c in zip(accumulate(p), accumulate(q), strict=True)]
    area = sum(gap * (right - left) for gap, (left, right) in zip(gaps, pairwise(places), strict=False))
    return area / sd if sd > 0 else None


def drift(stable: Sequence[int], canary: Sequence[int], positions: Sequence[float | None] | None = None) -> Drift:
    """All measures of two count vectors of the same categories; ordered ones have `positions`."""
    if not sum(stable) or not sum(canary):
        return Drift(None, None, None, None, sum(stable), sum(canary))
    return Drift(
        js=js_distance(stable, canary),
        wasserstein_sd=wasserstein_sd(stable, canary, positions),
        psi=psi(stable, canary),
        ks=ks_distance(stable, canary, ordered=positions is not None),
        n_stable=sum(stable),
        n_canary=sum(canary),
    )


def mean_drift(tables: Sequence[Table]) -> Drift:
    """The drift of one table, or of a vector's features on average; a measure that a feature has not is left out."""
    found = [drift(table.stable, table.canary, table.positions) for table in tables]
    js, wasserstein, index, ks = (_mean(column) for column in list(zip(*found, strict=True))[:4])
    return Drift(js, wasserstein, index, ks, found[0].n_stable, found[0].n_canary)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def drift_of(comparison: PredictionComparison) -> Drift | None:
    """The drift between the arms of a comparison; None until both have predicted something."""
    found = mean_drift(comparison.tables())
    return found if found.n_stable and found.n_canary else None

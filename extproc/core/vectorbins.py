"""Vectors as 18 numbers each, all of them binned: 16 random projections, the length, the cosine to the stable mean.

The projections are Gaussian and the same on every machine and for ever: they come from a hash, not from a generator
whose sequence a new version of a library may change. Sources: W. B. Johnson, J. Lindenstrauss, Extensions of Lipschitz
mappings into a Hilbert space, 1984; G. E. P. Box, M. E. Muller, A note on the generation of random normal deviates,
1958.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import cos, inf, log, pi, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from extproc.core.numberbins import LARGEST, NumberBins, Table, cut, parse_bins, plain_bins

COMPONENTS = 32
"""Of a longer vector the first ones."""
PROJECTIONS = 16
BINS = 10
FEATURES = [*(f"projection {i + 1}" for i in range(PROJECTIONS)), "norm", "cosine"]

Floats = npt.NDArray[np.float64]


def _gaussian(row: int, column: int) -> float:
    digest = hashlib.sha256(b"perch projection %d %d" % (row, column)).digest()
    first, second = (int.from_bytes(part, "big") for part in (digest[:6], digest[6:12]))
    return sqrt(-2.0 * log((first + 1) / 2**48)) * cos(2.0 * pi * second / 2**48)


@cache
def projections(components: int) -> Floats:
    """Shape (components, PROJECTIONS), standard normal; a longer vector's begin with a shorter one's."""
    return np.array([[_gaussian(row, column) for column in range(PROJECTIONS)] for row in range(components)])


def _numbers(text: str) -> list[float]:
    """The first COMPONENTS numbers of a comma list; nothing when one of them is no number."""
    try:
        return list(map(float, text.split(",", COMPONENTS)[:COMPONENTS]))
    except ValueError:
        return []


def vectors_of(texts: Mapping[str, int], components: int) -> tuple[Floats, list[int]]:
    """The finite vectors of that length, shape (n, components), and how often each came."""
    parsed = [(vector, n) for text, n in texts.items() if len(vector := _numbers(text)) == components]
    vectors = np.array([vector for vector, _ in parsed], dtype=np.float64).reshape(len(parsed), components)
    finite = (np.abs(vectors) <= LARGEST).all(axis=1)  # false for a NaN too
    return vectors[finite], [parsed[index][1] for index in np.flatnonzero(finite)]


def features_of(vectors: Floats, mean: Floats) -> Floats:
    """Shape (n, 18) for vectors of shape (n, components). The cosine with a vector of length 0 is 0."""
    norms = np.sqrt((vectors * vectors).sum(axis=1))
    lengths = norms * sqrt(float(mean @ mean))
    cosines = np.divide(vectors @ mean, lengths, out=np.zeros_like(norms), where=lengths > 0)
    return np.column_stack([vectors @ projections(mean.size), norms, cosines])


@dataclass(frozen=True, slots=True)
class VectorBins:
    """The reference: the mean vector of a sample of the stable arm and its bins of each feature."""

    mean: tuple[float, ...]
    features: tuple[NumberBins, ...]
    _edges: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        edges = np.full((len(FEATURES), BINS - 1), inf)
        for row, bins in zip(edges, self.features, strict=True):
            row[: len(bins.edges)] = bins.edges
        object.__setattr__(self, "_edges", edges)

    @property
    def size(self) -> int:
        """Counts: BINS of each feature, and the vectors that are none."""
        return len(FEATURES) * BINS + 1

    def place(self, texts: Mapping[str, int]) -> list[int]:
        """Counts of texts as counts of bins, feature by feature. A vector of another length is none."""
        vectors, weights = vectors_of(texts, len(self.mean)) if self.mean else (np.empty((0, 0)), [])
        strange = sum(texts.values()) - sum(weights)
        if not weights:
            return [0] * (self.size - 1) + [strange]
        values = features_of(vectors, np.array(self.mean))
        bins = (values[:, :, None] > self._edges).sum(axis=2) + np.arange(len(FEATURES)) * BINS
        slots = np.zeros(self.size - 1, dtype=np.int64)
        np.add.at(slots, bins.ravel(), np.repeat(weights, len(FEATURES)))
        return [*slots.tolist(), strange]

    def tables(self, stable: Sequence[int], canary: Sequence[int]) -> list[Table]:
        """One table of each feature."""
        tables = []
        for number, (name, bins) in enumerate(zip(FEATURES, self.features, strict=True)):
            start = number * BINS
            end = start + len(bins.edges) + 1
            rows = [[*counts[start:end], counts[-1]] for counts in (stable, canary)]
            tables.append(bins.table(name, *rows))
        return tables


def vector_bins(texts: Mapping[str, int]) -> VectorBins:
    """The reference from a sample: its vectors of the most frequent length."""
    lengths: dict[int, int] = {}
    for text, n in texts.items():
        length = len(_numbers(text))
        lengths[length] = lengths.get(length, 0) + n
    lengths.pop(0, None)
    length = max(lengths, key=lambda each: (lengths[each], -each), default=0)
    vectors, weights = vectors_of(texts, length) if length else (np.empty((0, 0)), [])
    if not weights:
        return VectorBins((), tuple(cut((), BINS) for _ in FEATURES))
    vectors = np.repeat(vectors, weights, axis=0)
    mean = vectors.mean(axis=0)
    columns = features_of(vectors, mean).T.tolist()
    return VectorBins(tuple(mean.tolist()), tuple(cut(column, BINS) for column in columns))


def plain_vector_bins(bins: VectorBins) -> dict[str, Any]:
    """The reference as JSON can hold it."""
    return {"mean": list(bins.mean), "features": [plain_bins(each) for each in bins.features]}


def parse_vector_bins(data: Any) -> VectorBins:
    """A reference from what JSON gave. Raises ValueError for anything else."""
    try:
        mean = tuple(float(value) for value in data["mean"])
        features = tuple(parse_bins(each) for each in data["features"])
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"no reference: {error}") from None
    small = all(len(each.edges) < BINS for each in features)
    finite = all(-LARGEST <= value <= LARGEST for value in mean)
    if len(features) != len(FEATURES) or not small or not finite or len(mean) > COMPONENTS:
        raise ValueError("no reference: a mean vector and bins of 18 features are needed")
    return VectorBins(mean, features)

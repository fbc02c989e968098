"""Numbers in bins that a sample of the stable arm has cut, as evenly filled as it allows."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from math import ceil, inf, nextafter
from typing import Any, NamedTuple

UNPARSABLE = "(unparsable)"
LARGEST = 1e100
"""A number beyond this is none: its square must still be a float."""


class Table(NamedTuple):
    """Counts of both arms over the same categories.

    `name` tells the tables of one comparison apart, "" where there is one. `positions` are the categories' places on a
    line, ascending, None for a category that has none; the whole is None for categories without order.
    """

    name: str
    stable: list[int]
    canary: list[int]
    names: list[str]
    positions: list[float | None] | None


def number_of(text: str) -> float | None:
    """The finite number that a text is, or None: NaN and infinity are answers of a broken model, not large scores."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if -LARGEST <= number <= LARGEST else None


class NumberBins(NamedTuple):
    """Bin i holds `edges[i - 1] < x <= edges[i]`; a last one, for what is no number, follows.

    `positions` is where the sample had its values of each bin, on average.
    """

    edges: tuple[float, ...]
    positions: tuple[float, ...]

    @property
    def size(self) -> int:
        """How many counts there are, the one of what is no number included."""
        return len(self.edges) + 2

    def place(self, texts: Mapping[str, int]) -> list[int]:
        """Counts of texts as counts of bins."""
        slots = [0] * self.size
        for text, n in texts.items():
            slots[slot_of(self.edges, text)] += n
        return slots

    def table(self, name: str, stable: Sequence[int], canary: Sequence[int]) -> Table:
        """The counts of both arms, with names that a person can read."""
        return Table(name, list(stable), list(canary), [*_names(self.edges), UNPARSABLE], [*self.positions, None])


def _names(edges: tuple[float, ...]) -> list[str]:
    if not edges:
        return ["all"]
    alone = [nextafter(low, inf) == high for low, high in pairwise((*edges, inf))]  # the bin above holds one value
    shown = [
        f"{high if single else low:.6g}" for low, high, single in zip(edges, (*edges[1:], inf), alone, strict=True)
    ]
    inner = [high if single else f"{low} .. {high}" for low, high, single in zip(shown, shown[1:], alone, strict=False)]
    return [f"{'<' if alone[0] else '<='} {shown[0]}", *inner, f"> {shown[-1]}"]


def slot_of(edges: tuple[float, ...], text: str) -> int:
    """The bin of a text; -1, which is the last one, for what is no number."""
    try:
        number = float(text)
    except ValueError:
        return -1
    return bisect_left(edges, number) if -LARGEST <= number <= LARGEST else -1


def cut(values: Sequence[float], bins: int) -> NumberBins:
    """At most `bins` bins at the quantiles of a sample of finite numbers.

    A value that makes up more than a bin's share gets a bin of its own: otherwise, of scores that are mostly 0.5, a
    fall to 0.1 would stay in the bin of 0.5.
    """
    ordered = sorted(values)
    n = len(ordered)
    quantiles = [ordered[ceil(i * n / bins) - 1] for i in range(1, bins)] if n else []
    edges: list[float] = []
    for value, same in groupby(quantiles):
        if len(list(same)) > 1:
            edges.append(nextafter(value, -inf))
        edges.append(value)
    unique = tuple(dict.fromkeys(edges))
    return NumberBins(unique, _positions(ordered, unique))


def _positions(ordered: Sequence[float], edges: tuple[float, ...]) -> tuple[float, ...]:
    """The mean of each bin's values; of a bin without any, its edge, or the last one's lower edge."""
    parts: list[list[float]] = [[] for _ in range(len(edges) + 1)]
    for value in ordered:
        parts[bisect_left(edges, value)].append(value)
    ends = (*edges, edges[-1] if edges else 0.0)
    return tuple(sum(part) / len(part) if part else end for part, end in zip(parts, ends, strict=True))


def plain_bins(bins: NumberBins) -> dict[str, Any]:
    """The bins as JSON can hold them."""
    return {"edges": list(bins.edges), "positions": list(bins.positions)}


def parse_bins(data: Any) -> NumberBins:
    """Bins from what JSON gave. Raises ValueError for anything else."""
    try:
        edges, positions = ([float(value) for value in data[name]] for name in ("edges", "positions"))
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"no bins: {error}") from None
    finite = all(-LARGEST <= value <= LARGEST for value in (*edges, *positions))
    if not finite or len(positions) != len(edges) + 1 or edges != sorted(set(edges)):
        raise ValueError("no bins: edges ascend, and one position more than edges is needed, all finite")
    return NumberBins(tuple(edges), tuple(positions))

"""Is this the first time that a unit is seen? Asked with its 32-bit hash, in fixed memory.

A Bloom filter: a unit that was seen is never called new, so none is counted twice; a new one is taken for seen with a
small probability that `expected_missed` tells. Source: B. H. Bloom, Space/time trade-offs in hash coding with
allowable errors, 1970; positions from two hashes as in A. Kirsch, M. Mitzenmacher, Less hashing, same performance,
2006.
"""

from dataclasses import dataclass
from math import exp

BYTES = 1 << 20
BITS = BYTES * 8
MARKS = 4
"""Bits set for one unit. Four are the most that pay: more cost time, and 32-bit hashes collide more often by then."""

_MASK = BITS - 1
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio. The arm was chosen by the high bits of the hash, so all bits must take part in a position."""


@dataclass(slots=True)
class Firsts:
    """Remembers units. Takes 1 MiB from the first one on."""

    _bits: bytearray | None = None

    def first(self, unit_hash: int) -> bool:
        """Marks the unit; whether it was new."""
        bits = self._bits
        if bits is None:
            bits = self._bits = bytearray(BYTES)
        mixed = unit_hash * _GOLDEN & _WORD
        at = mixed >> 41
        step = mixed >> 18 & _MASK | 1
        new = False
        for _ in range(MARKS):
            mark = 1 << (at & 7)
            if not bits[at >> 3] & mark:
                bits[at >> 3] |= mark
                new = True
            at = at + step & _MASK
        return new


def expected_missed(units: int) -> float:
    """How many of so many different hashes are expected to be taken for seen: 0.1 of 100,000, 4,800 of 1,000,000.

    The sum of (1 - exp(-MARKS * i / BITS)) ** MARKS over i < units (Bloom, 1970), here by steps of a thousandth.
    """
    width = max(1, units // 1000)
    return sum((1.0 - exp(-MARKS * (start + width / 2) / BITS)) ** MARKS * width for start in range(0, units, width))

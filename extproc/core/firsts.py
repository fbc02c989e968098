"""Is this the first time that a unit is seen? Asked with its 32-bit hash, in fixed memory.

A Bloom filter: a unit that was seen is never called new, so none is counted twice; a new one is taken for seen with a
small probability that `expected_missed` tells. Source: B. H. Bloom, Space/time trade-offs in hash coding with
allowable errors, 1970; positions from two hashes as in A. Kirsch, M. Mitzenmacher, Less hashing, same performance,
2006.

Of 100,000 units 0.1 are missed on average, of 1,000,000 half a percent, of 3,000,000 a tenth, of 10,000,000 more than
half: whoever expects that many needs more BYTES. Units whose hashes are equal are one unit here:
1.2 pairs among 100,000, 116 among 1,000,000 (units ** 2 / 2 ** 33), which no filter behind the hash can tell apart.
"""

from dataclasses import dataclass, field
from math import exp

BYTES = 1 << 20
BITS = BYTES * 8
MARKS = 4
"""Bits set for one unit. With four, 100,000 units lose less to the filter than to equal hashes; more cost only time."""
LATELY = 32_768

_MASK = BITS - 1
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio. The high bits of a hash chose the arm, so the positions must depend on all of them alike."""


@dataclass(slots=True)
class Firsts:
    """Remembers units. Takes 1 MiB from the first one on, and up to 3 MiB more for a fast answer about the latest."""

    _bits: bytearray | None = None
    _lately: set[int] = field(default_factory=set)

    def first(self, unit_hash: int) -> bool:
        """Marks the unit with this hash, 0 .. 2**32 - 1; whether it was new."""
        bits = self._bits
        if bits is None:
            bits = self._bits = bytearray(BYTES)
        mixed = unit_hash * _GOLDEN & _WORD
        mixed = (mixed ^ mixed >> 32) * _GOLDEN & _WORD
        a = mixed >> 41
        step = mixed >> 18 & _MASK | 1
        b = a + step & _MASK  # four positions written out: a loop takes twice as long
        c = b + step & _MASK
        d = c + step & _MASK
        mark_a, mark_b, mark_c, mark_d = 1 << (a & 7), 1 << (b & 7), 1 << (c & 7), 1 << (d & 7)
        a, b, c, d = a >> 3, b >> 3, c >> 3, d >> 3
        if bits[a] & mark_a and bits[b] & mark_b and bits[c] & mark_c and bits[d] & mark_d:
            return False
        bits[a] |= mark_a
        bits[b] |= mark_b
        bits[c] |= mark_c
        bits[d] |= mark_d
        return True


def expected_missed(units: int) -> float:
    """How many of so many different hashes are expected to be taken for seen: 0.1 of 100,000, 4,800 of 1,000,000.

    The sum of (1 - exp(-MARKS * i / BITS)) ** MARKS over i < units (Bloom, 1970), here in a thousand steps.
    """
    width = units / 1000
    middles = ((step + 0.5) * width for step in range(1000))
    return sum((1.0 - exp(-MARKS * seen / BITS)) ** MARKS for seen in middles) * width

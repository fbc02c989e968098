"""Where a unit falls on the line from 0 to 100 %: integers only, the same on every machine, for ever."""

from decimal import Decimal

import mmh3

BUCKETS = 100_000
"""Parts of the whole; one bucket is 0.001 %."""

HASHES = 1 << 32
"""murmur3_x86_32 gives an unsigned 32-bit integer."""


def effective_salt(salt: str, attempt: int) -> str:
    """The salt that is hashed: the flag's own, or `salt#attempt` once a person has reseeded the rollout."""
    return f"{salt}#{attempt}" if attempt else salt


def rule_salt(salt: str, rule: str) -> str:
    """The salt of a rule that has a percentage of its own, so that its split is independent of the flag's."""
    return f"{salt}/{rule}"


def hash_prefix(salt: str) -> bytes:
    """What stands before the unit in the hashed bytes. ':' cannot occur in a salt, so no two salts share a prefix."""
    return salt.encode() + b":"


def hash_unit(prefix: bytes, unit: bytes) -> int:
    """murmur3_x86_32 with seed 0 of prefix + unit, in 0 .. 2**32 - 1. The unit is raw bytes: never trimmed or decoded.

    Source: Austin Appleby, SMHasher, MurmurHash3_x86_32 (verification value 0xB0F57EE3).
    """
    return mmh3.hash(prefix + unit, 0, False)


def bucket_of(unit_hash: int) -> int:
    """The bucket 0 .. 99_999 of a 32-bit hash; multiply and shift, so every bucket gets 42,949 or 42,950 hashes."""
    return unit_hash * BUCKETS >> 32


def threshold_of(percent: Decimal | float) -> int:
    """The number of buckets that `percent` (0 .. 100) covers: a unit is exposed when its bucket is below this."""
    return round(percent * 1000)


def first_hash_outside(threshold: int) -> int:
    """The smallest hash whose bucket is not below `threshold`: comparing hashes with it equals comparing buckets."""
    return -(-(threshold << 32) // BUCKETS)

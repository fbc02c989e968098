"""When which user asks about which digit: drawn from a seed, the same every time."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request: when it is due, in seconds from the start, of whom, and the number of the digit."""

    due_s: float
    user: str
    digit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Who asks: user k of `users` in proportion to 1 / k**zipf, at `rate` requests per second, at any moment."""

    users: int
    zipf: float
    rate: float
    digits: int
    seed: int | None = None


def arrivals(crowd: Crowd) -> Iterator[Arrival]:
    """Requests without end: a Poisson process."""
    chance = random.Random(crowd.seed)  # noqa: S311  traffic, not a secret
    weights = list(accumulate(rank**-crowd.zipf for rank in range(1, crowd.users + 1)))
    names = [f"user-{rank}" for rank in range(1, crowd.users + 1)]
    due_s = 0.0
    while True:
        due_s += chance.expovariate(crowd.rate)
        (user,) = chance.choices(names, cum_weights=weights)
        yield Arrival(due_s, user, chance.randrange(crowd.digits))

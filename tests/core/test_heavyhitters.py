import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from extproc.core.heavyhitters import COUNTERS, HALF_LIFE_S, MIN_REQUESTS, HeavyHitters


def test_a_unit_with_a_tenth_of_the_traffic_is_found_among_thousands():
    draw = random.Random(7)
    heavy = HeavyHitters()
    for second in range(120):
        heavy.add(Counter([1] * 50 + [draw.randrange(2, 1 << 32) for _ in range(450)]), float(second))
    unit, share = heavy.heaviest()
    assert unit == 1
    assert 0.08 < share <= 0.1


def test_ordinary_traffic_has_no_heavy_unit():
    draw = random.Random(8)
    heavy = HeavyHitters()
    for second in range(60):
        heavy.add(Counter(draw.randrange(50_000) for _ in range(500)), float(second))
    assert heavy.heaviest() is None or heavy.heaviest()[1] < 0.01


def test_few_requests_say_nothing():
    heavy = HeavyHitters()
    heavy.add({1: MIN_REQUESTS - 1}, 0.0)
    assert heavy.heaviest() is None


def test_requests_of_units_that_are_not_named_count_for_the_share():
    heavy = HeavyHitters()
    heavy.add({1: 100}, 0.0, others=1900)
    assert heavy.heaviest() == (1, 0.05)


def test_what_was_long_ago_is_forgotten():
    heavy = HeavyHitters()
    heavy.add({1: 10_000}, 0.0)
    heavy.add(dict.fromkeys(range(2, 2002), 5), HALF_LIFE_S * 10)
    assert heavy.heaviest() is None or heavy.heaviest()[1] < 0.01


@given(st.lists(st.lists(st.integers(0, 300), max_size=400), max_size=20))
def test_a_count_is_never_too_high_and_too_low_by_at_most_a_hundredth(batches):
    heavy, truth = HeavyHitters(), Counter()
    for batch in batches:
        heavy.add(Counter(batch), 0.0)
        truth.update(batch)
    assert len(heavy.counts) <= COUNTERS
    for unit, n in truth.items():
        assert n - truth.total() / (COUNTERS + 1) <= heavy.counts.get(unit, 0) <= n

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.bucketing import BUCKETS, HASHES, hash_unit
from extproc.core.firsts import BYTES, Firsts, expected_missed


def different_hashes(n, below=HASHES, seed=1):
    return random.Random(seed).sample(range(below), n)


@given(st.lists(st.integers(0, HASHES - 1), max_size=200))
def test_a_unit_is_new_once_however_often_it_comes(hashes):
    seen, told = Firsts(), set()
    for unit in hashes + hashes:
        if seen.first(unit):
            assert unit not in told
            told.add(unit)
    assert len(told) == len(set(hashes))


@given(
    st.lists(st.integers(0, 300), max_size=400),
    st.lists(st.integers(0, HASHES - 1), max_size=400),
    st.sampled_from((1, 50, 8192)),
)
def test_many_units_at_once_are_as_new_as_one_after_the_other(often, rarely, at_once):
    together, alone = Firsts(), Firsts()
    hashes = often + rarely + often
    for start in range(0, len(hashes), at_once):
        some = hashes[start : start + at_once]
        assert together.new_among(some) == [at for at, unit in enumerate(some) if alone.first(unit)]
    assert together._bits == alone._bits


def test_many_units_at_once_are_as_new_as_one_after_the_other_also_in_a_crowded_filter():
    together, alone = Firsts(), Firsts()
    for seed in range(4):
        hashes = different_hashes(300_000, seed=seed)
        assert together.new_among(hashes) == [at for at, unit in enumerate(hashes) if alone.first(unit)]
    assert together._bits == alone._bits


def test_of_a_hundred_thousand_units_none_is_missed_but_those_with_equal_hashes():
    hashes = [hash_unit(b"digits:", b"user-%d" % i) for i in range(100_000)]
    seen = Firsts()
    new = sum(seen.first(unit) for unit in hashes)
    assert len(set(hashes)) - 2 <= new <= len(set(hashes))  # 0.1 expected; more than 2 once in 6,000 runs
    assert sum(seen.first(unit) for unit in hashes) == 0


@pytest.mark.parametrize(
    "below",
    [HASHES, HASHES // BUCKETS * 1_000],
    ids=["everybody", "canary_1_percent"],
)
def test_hundreds_of_thousands_of_units_are_undercounted_as_the_formula_says_also_in_a_small_arm(below):
    seen = Firsts()
    missed = sum(not seen.first(unit) for unit in different_hashes(600_000, below))
    assert missed == pytest.approx(expected_missed(600_000), rel=0.2)  # 5 % of it is three deviations


def test_hashes_in_a_row_are_as_good_as_any():
    seen = Firsts()
    missed = sum(not seen.first(unit) for unit in range(600_000))
    assert missed == pytest.approx(expected_missed(600_000), rel=0.2)


def test_the_expected_undercount_is_the_sum_over_all_units():
    exact = sum((1.0 - 2.718281828459045 ** (-4 * i / (1 << 23))) ** 4 for i in range(200_000))
    assert expected_missed(200_000) == pytest.approx(exact, rel=1e-3)
    assert expected_missed(100_000) < 0.1
    assert expected_missed(0) == 0.0


def test_memory_is_taken_with_the_first_unit_and_never_grows():
    seen = Firsts()
    assert seen._bits is None
    for unit in range(1000):
        seen.first(unit * 4_000_037 % HASHES)
    assert len(seen._bits) == BYTES

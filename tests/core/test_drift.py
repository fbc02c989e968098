import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from extproc.core.drift import Drift, drift, drift_of, js_distance, ks_distance, mean_drift, psi, wasserstein_sd
from extproc.core.predictions import OTHER, PredictionComparison, Table

COUNTS = st.integers(1, 25).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 5000), min_size=k, max_size=k).filter(any)] * 2)
)


def shares(counts):
    return np.array(counts) / sum(counts)


@given(COUNTS)
def test_the_jensen_shannon_distance_is_scipys(counts):
    assert js_distance(*counts) == pytest.approx(jensenshannon(*counts, base=2), abs=1e-7)


def test_the_jensen_shannon_distance_has_its_known_values():
    assert js_distance([5, 5], [50, 50]) == 0.0
    assert js_distance([7, 0], [0, 3]) == 1.0
    # by hand: middles 3/4 and 1/4; divergence = (log2(4/3) + 1/2 log2(2/3) + 1/2 log2(2)) / 2 = 0.311278
    assert js_distance([1, 0], [1, 1]) == pytest.approx(math.sqrt(0.3112781244591328))


@given(COUNTS)
def test_the_ks_distance_of_ordered_categories_is_that_of_the_votes(counts):
    stable, canary = counts
    votes = [np.repeat(np.arange(len(each)), each) for each in counts]
    up_to = [[(each <= at).mean() for at in range(len(stable))] for each in votes]
    assert ks_distance(stable, canary, ordered=True) == pytest.approx(np.abs(np.subtract(*up_to)).max())


def test_the_ks_distance_is_scipys_for_ordinary_samples():
    draw = np.random.default_rng(8)
    votes = [np.clip(draw.poisson(mean, size=n), 0, 19) for mean, n in ((6, 900), (7, 300))]
    counts = [np.bincount(each, minlength=20).tolist() for each in votes]
    assert ks_distance(*counts, ordered=True) == pytest.approx(stats.ks_2samp(*votes).statistic)


@given(COUNTS)
def test_the_ks_distance_without_order_is_the_largest_difference_of_a_share(counts):
    assert ks_distance(*counts, ordered=False) == pytest.approx(np.abs(shares(counts[0]) - shares(counts[1])).max())


@given(COUNTS, st.data())
def test_the_wasserstein_distance_is_scipys_over_the_deviation_of_stables_votes(counts, data):
    k = len(counts[0])
    positions = sorted(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=k, max_size=k)))
    sd = np.repeat(positions, counts[0]).std()
    found = wasserstein_sd(*counts, positions)
    if sd > 1e-6:
        expected = stats.wasserstein_distance(positions, positions, *counts) / sd
        assert found == pytest.approx(expected, abs=1e-9, rel=1e-6)
    elif sd == 0:
        assert found is None or found >= 0


def test_a_shift_of_every_vote_by_one_deviation_is_one():
    stable = [0, 50, 50, 0, 0]  # at -1 and 1: a deviation of 1
    assert wasserstein_sd(stable, [0, 0, 50, 50, 0], [-3, -1, 1, 3, 5]) == pytest.approx(2.0)
    assert wasserstein_sd(stable, [0, 50, 50, 0, 0], [-3, -1, 1, 3, 5]) == 0.0


def test_what_has_no_position_counts_for_ks_and_not_for_the_distance_moved():
    found = drift([50, 50, 0], [40, 40, 20], [0.0, 1.0, None])
    assert found.wasserstein_sd == 0.0
    assert found.ks == pytest.approx(0.2)


def test_without_order_there_is_no_distance_moved():
    assert drift([5, 5], [5, 6]).wasserstein_sd is None
    assert drift([5, 0], [3, 2], [0.0, 1.0]).wasserstein_sd is None, "one value has no deviation"
    assert drift([5, 5, 0], [0, 0, 9], [0.0, 1.0, None]).wasserstein_sd is None, "no canary vote has a position"


@pytest.mark.parametrize("counts", [([], []), ([0, 0], [0, 0]), ([3, 4], [0, 0]), ([0, 0], [3, 4])])
def test_an_arm_without_votes_has_no_drift(counts):
    stable, canary = counts
    assert drift(stable, canary, [0.0, 1.0][: len(stable)]) == Drift(None, None, None, None, sum(stable), sum(canary))
    assert js_distance(stable, canary) is psi(stable, canary) is ks_distance(stable, canary, ordered=True) is None


def test_psi_is_that_of_the_textbook_for_many_votes():
    stable, canary = [4_000_000, 3_000_000, 3_000_000], [3_000_000, 3_000_000, 4_000_000]
    expected = -0.1 * math.log(0.3 / 0.4) + 0.1 * math.log(0.4 / 0.3)
    assert psi(stable, canary) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("categories", "n_stable", "n_canary"), [(10, 100_000, 100), (10, 2000, 2000), (20, 5000, 500), (20, 100_000, 200)]
)
def test_psi_without_any_change_is_zero_on_average_where_the_usual_one_is_not(categories, n_stable, n_canary):
    draw = np.random.default_rng(5)
    p = draw.dirichlet(np.full(categories, 5.0))
    rows = [draw.multinomial(n, p, size=3000).tolist() for n in (n_stable, n_canary)]
    found = np.array([psi(stable, canary) for stable, canary in zip(*rows, strict=True)])
    bias = (categories - 1) * (1 / n_stable + 1 / n_canary)
    assert abs(found.mean()) < 0.12 * bias
    assert found.mean() + bias > 0.85 * bias


def test_the_bias_of_ten_categories_and_a_hundred_votes_is_the_published_nine_hundredths():
    draw = np.random.default_rng(6)
    p = np.full(10, 0.1)
    rows = draw.multinomial(100, p, size=4000)
    smoothed = (rows + 0.5) / 105
    plain = ((smoothed - p) * np.log(smoothed / p)).sum(axis=1)
    assert plain.mean() == pytest.approx(0.09, abs=0.01)
    debiased = np.array([psi([10**9] * 10, row.tolist()) for row in rows])
    assert debiased.mean() == pytest.approx(0.0, abs=0.01)
    assert (plain > 0.1).mean() > 0.2
    assert (debiased > 0.1).mean() < 0.04  # where n PSI is chi squared with 9 degrees of freedom: 0.025


@pytest.mark.parametrize("n", [200, 2000])
def test_the_usual_size_of_js_without_any_change_is_as_told(n):
    draw = np.random.default_rng(7)
    p = draw.dirichlet(np.full(10, 5.0))
    rows = [draw.multinomial(n, p, size=1500).tolist() for _ in range(2)]
    found = np.array([js_distance(*pair) for pair in zip(*rows, strict=True)])
    expected = math.sqrt(9 / 8 * (2 / n) / math.log(2))
    assert math.sqrt((found**2).mean()) == pytest.approx(expected, rel=0.1)


@given(COUNTS, st.booleans())
def test_every_measure_is_finite_in_its_range_and_zero_for_equal_counts(counts, ordered):
    positions = [float(i) for i in range(len(counts[0]))] if ordered else None
    found = drift(*counts, positions)
    assert all(value is None or math.isfinite(value) for value in found)
    assert 0 <= found.js <= 1
    assert 0 <= found.ks <= 1
    assert (found.n_stable, found.n_canary) == (sum(counts[0]), sum(counts[1]))
    same = drift(counts[0], counts[0], positions)
    assert (same.js, same.ks, same.wasserstein_sd or 0.0) == (0.0, 0.0, 0.0)
    assert same.psi <= 0


def test_a_category_that_neither_arm_uses_changes_nothing():
    assert drift([5, 9], [7, 2]) == drift([5, 0, 9, 0], [7, 0, 2, 0])


def test_of_several_tables_the_mean_is_told():
    tables = [Table("a", [5, 5], [5, 5], ["x", "y"], None), Table("b", [10, 0], [0, 10], ["x", "y"], [0.0, 1.0])]
    found = mean_drift(tables)
    assert (found.js, found.ks, found.wasserstein_sd) == (0.5, 0.5, None)
    assert (found.n_stable, found.n_canary) == (10, 10)


def test_the_drift_of_a_comparison_is_that_of_its_counts():
    comparison = PredictionComparison("labels")
    for arm, votes in (("stable", "aabbbc"), ("canary", "aaxx")):
        for label in votes:
            comparison.add(arm, label)
    assert comparison.counts() == ([3, 2, 1, 0], [0, 2, 0, 2], ["b", "a", "c", OTHER])
    assert drift_of(comparison) == drift([3, 2, 1, 0], [0, 2, 0, 2])


def test_counts_of_different_categories_are_an_error_of_the_caller():
    for measure in (js_distance, psi):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            measure([1, 2, 3], [1, 2])

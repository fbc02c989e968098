import json
import math
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.latency import (
    BINS,
    EDGES_MS,
    GAMMA,
    LOWEST_MS,
    REFUSED,
    LatencyHistogram,
    bin_of,
    count_bins,
    edge_of,
    parse_latency,
    value_of,
)

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hdrhistogram"
SHARES = (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)


def outside(name):
    path = VECTORS / name
    if not path.exists():
        pytest.skip("the recorded pauses are not beside this checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def histogram(values):
    counted = LatencyHistogram()
    for value in values:
        counted.add(value)
    return counted


def nearest_rank(values, share):
    """Independently: the value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


@given(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0.0, 1e8))
def test_every_float_has_a_bin_or_is_refused(ms):
    found = bin_of(ms)
    if math.isnan(ms) or math.isinf(ms) or ms < 0:
        assert found == REFUSED
    else:
        assert 0 <= found < BINS
        assert found == 0 or edge_of(found - 1) < ms
        assert found == BINS - 1 or ms <= edge_of(found)


@given(st.floats(LOWEST_MS, edge_of(BINS - 1)))
def test_what_stands_for_a_bin_is_within_two_percent_of_all_in_it(ms):
    assert abs(value_of(bin_of(ms)) - ms) <= 0.02 * ms


@given(st.floats(LOWEST_MS * 1.0001, edge_of(BINS - 2)))
def test_the_bins_are_those_of_ddsketch(ms):
    exact = math.log(ms / LOWEST_MS) / math.log(GAMMA)
    if abs(exact - round(exact)) > 1e-9:  # on an edge a logarithm may fall to either side
        assert bin_of(ms) == math.ceil(exact)


def test_an_edge_belongs_to_the_bin_that_it_ends():
    assert [bin_of(edge) for edge in EDGES_MS] == list(range(BINS))
    assert [bin_of(math.nextafter(edge, math.inf)) for edge in EDGES_MS[:-1]] == list(range(1, BINS))


def test_the_bins_reach_from_a_tenth_of_a_millisecond_to_fourteen_hours():
    assert edge_of(0) == 0.1
    assert edge_of(BINS - 2) > 13.5 * 3_600_000
    assert bin_of(0.0) == bin_of(-0.0) == 0
    assert bin_of(1e300) == BINS - 1


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200))
def test_a_quantile_is_in_the_bin_of_the_exact_one(values):
    counted = histogram(values)
    assert counted.quantile_bins(SHARES) == [bin_of(nearest_rank(values, share)) for share in SHARES]
    assert counted.quantiles(*SHARES) == [counted.quantile(share) for share in SHARES]


def test_one_bad_value_in_a_hundred_is_counted_and_moves_no_quantile():
    counted = histogram([10.0] * 99 + [math.nan, -1.0, math.inf, -math.inf])
    assert (counted.total, counted.refused) == (99, 4)
    assert bin_of(10.0) == bin_of(counted.quantile(1.0)) == bin_of(counted.quantile(0.0))


def test_without_a_duration_there_is_no_quantile():
    assert histogram([]).quantile(0.5) is None
    assert histogram([math.nan]).quantiles(0.5, 0.99) == [None, None]


def test_what_exceeds_an_edge_is_counted_from_the_bins():
    counted = histogram([1.0, 10.0, 100.0, 1000.0, math.nan])
    assert counted.above(bin_of(10.0)) == 2
    assert counted.above(REFUSED) == 4


VALUES = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0.0, 1e4), max_size=50)


@given(VALUES, VALUES, VALUES)
def test_merged_parts_are_the_whole_in_any_order(first, second, third):
    forward, backward = histogram(first), histogram(third)
    forward.merge(histogram(second))
    forward.merge(histogram(third))
    backward.merge(histogram(first))
    backward.merge(histogram(second))
    assert forward.counts == backward.counts == histogram(first + second + third).counts


@given(VALUES)
def test_counts_survive_json(values):
    counted = histogram(values)
    assert parse_latency(json.loads(json.dumps(counted.counts))) == counted


@pytest.mark.parametrize("bad", [{"512": 1}, {"-2": 1}, {"x": 1}, {"1": -1}, {"1": 1.5}, {"1": None}, {None: 1}, [], 3])
def test_counts_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="no latency counts"):
        parse_latency(bad)


def test_memory_stays_the_same_whatever_comes():
    counted = histogram(10 ** (exponent / 100) for exponent in range(-2000, 30_000))
    assert len(counted.counts) <= BINS + 1


def recorded(case):
    """The pauses of some intervals in milliseconds, as (value, count)."""
    intervals = outside("jhiccup_decoded.json")["intervals"]
    start, end = case["range"] or (0, math.inf)
    chosen = [interval for interval in intervals if start <= interval["t"] < end]
    return [[(low / 1e6, n) for low, _, n in interval["counts"]] for interval in chosen]


@pytest.mark.parametrize("number", range(3))
def test_recorded_pauses_have_the_percentiles_that_another_implementation_found(number):
    case = outside("expected.json")["cases"][number]
    merged = LatencyHistogram()
    for interval in recorded(case):
        part = LatencyHistogram()
        for value, n in interval:
            for _ in range(n):
                part.add(value)
        merged.merge(part)
    assert merged.total == case["total_count"]
    for share, expected_ns in ((0.999, case["p99_9"]), (1.0, case["max"])):
        (found,) = merged.quantile_bins((share,))
        assert abs(found - bin_of(expected_ns / 1e6)) <= 1
        assert abs(merged.quantile(share) - expected_ns / 1e6) <= 0.021 * expected_ns / 1e6


@pytest.mark.parametrize("number", range(3))
def test_recorded_pauses_have_every_percentile_in_the_bin_of_the_exact_one(number):
    values = [v for part in recorded(outside("expected.json")["cases"][number]) for v, n in part for _ in range(n)]
    shares = [rank / 1000 for rank in range(1001)]
    found = histogram(values).quantile_bins(shares)
    assert found == [bin_of(nearest_rank(values, share)) for share in shares]
    assert len(list(groupby(found))) > 20, "so many different bins that the comparison says something"


@given(st.lists(st.one_of(st.floats(), st.sampled_from(EDGES_MS), st.floats(0, 1e5)), max_size=50))
def test_many_durations_at_once_fall_into_the_bins_that_each_alone_does(durations):
    counted = histogram(durations)
    assert count_bins(durations) == counted.counts

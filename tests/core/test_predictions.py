import json
import math
import random
from collections import Counter
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from extproc.core.drift import drift_of
from extproc.core.numberbins import NumberBins, cut, slot_of
from extproc.core.predictions import (
    MAX_LABEL,
    MAX_LABELS,
    MAX_TEXTS,
    NUMBER,
    OTHER,
    REFERENCE_VOTES,
    TOP_LABELS,
    UNPARSABLE,
    VECTOR,
    Kind,
    LabelBins,
    PredictionComparison,
    kind_of,
    parse_reference,
    plain_reference,
    shown_as,
    vote,
    vote_of,
)
from extproc.core.vectorbins import FEATURES, VectorBins, projections
from model_servers.answers import prediction_list

LABELS = st.lists(st.text(max_size=20), min_size=1, max_size=40)


def compared(kind, stable, canary):
    comparison = PredictionComparison(kind)
    for arm, items in (("stable", stable), ("canary", canary)):
        for item in items:
            comparison.add(arm, item)
    return comparison


@given(LABELS, st.integers(0, (1 << 32) - 1))
def test_a_batch_of_the_model_server_is_one_vote_chosen_by_the_units_hash(labels, unit_hash):
    header = prediction_list(labels)
    item = vote(header, len(labels), unit_hash)
    comparison = PredictionComparison("labels")
    comparison.add("stable", item)
    assert comparison.top("stable") == [(labels[unit_hash % min(len(labels), 32)], 1)]


@given(st.text(max_size=100), st.none() | st.integers(-5, 1 << 40), st.integers(0, (1 << 32) - 1))
def test_any_header_with_any_count_gives_one_of_its_items_or_nothing(header, count, unit_hash):
    item = vote(header, count, unit_hash)
    assert item is None or item in [part.strip() for part in header.split(",", 32)]
    assert (item is None) == (not header if count is None else count < 1 or (not header and count != 1))


def test_a_header_shorter_than_its_count_is_taken_as_long_as_it_is():
    assert {vote("a,b", 32, unit_hash) for unit_hash in range(10)} == {"a", "b"}
    assert {vote("a,b,c", 2, unit_hash) for unit_hash in range(10)} == {"a", "b"}
    assert vote(",".join(map(str, range(50))), None, 31) == "31"
    assert vote(",".join(map(str, range(50))), 50, 32) == "0"


def test_an_empty_answer_is_a_label_and_a_missing_one_is_no_vote():
    assert vote("", 1, 7) == ""
    assert vote("", None, 7) is vote("", 5, 7) is vote("3", 0, 7) is None


def test_all_of_a_vectors_header_is_one_vote():
    assert vote_of("vector")("1,2,3", 3, 1) == "1,2,3"
    assert vote_of("vector")("", 3, 1) is vote_of("vector")("1", 0, 1) is None
    assert vote_of("auto") is vote_of("labels") is vote


def test_two_encodings_of_a_label_are_one_label():
    comparison = compared("labels", ["%C3%A9t%c3%a9", "été", quote("été")], ["%E9"])
    assert comparison.top("stable") == [("été", 3)]
    assert comparison.top("canary") == [("\N{REPLACEMENT CHARACTER}", 1)]


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ([str(i % 10) for i in range(2000)], Kind.LABELS),
        ([str(i) for i in range(10)], Kind.LABELS),
        (["3"], Kind.LABELS),
        (["cat", "dog"], Kind.LABELS),
        (["true", "false"], Kind.LABELS),
        (["nan"], Kind.LABELS),
        ([], Kind.LABELS),
        (["0.731"], Kind.NUMBERS),
        ([f"{i / 2000:.6g}" for i in range(2000)], Kind.NUMBERS),
        (["0"] * 900 + ["1"] * 50 + [f"0.{i}1" for i in range(50)], Kind.NUMBERS),
        ([str(i) for i in range(1000)], Kind.NUMBERS),
        (["1e-05", "2e+06", "-0.5"], Kind.NUMBERS),
        (["0.5"] * 90 + ["refused"] * 10, Kind.LABELS),
        (["3", "4"] * 200 + ["0.5"] * 2, Kind.LABELS),
        (["0.5"] * 96 + ["error"] * 4, Kind.NUMBERS),
    ],
)
def test_what_the_first_predictions_are_is_told_from_them(items, kind):
    assert kind_of(Counter(items)) == kind


@pytest.mark.parametrize(
    ("kind", "item", "shown"),
    [
        ("labels", "0.25", "0.25"),
        ("labels", "a%2Cb", "a,b"),
        ("labels", "x" * 999, "x" * MAX_LABEL),
        ("auto", "7", "7"),
        ("auto", "cat", "cat"),
        ("auto", "nan", "nan"),
        ("auto", "", ""),
        ("auto", "-0.000454214", NUMBER),
        ("auto", "1e-05", NUMBER),
        ("auto", "0%2E5", NUMBER),
        ("numbers", "7", NUMBER),
        ("numbers", "0.5", NUMBER),
        ("numbers", "cat", UNPARSABLE),
        ("numbers", "inf", UNPARSABLE),
        ("vector", "1,2,3", VECTOR),
        ("vector", "%", VECTOR),
    ],
)
def test_people_see_labels_and_of_numbers_and_vectors_that_they_are(kind, item, shown):
    assert shown_as(kind, item) == shown


def test_what_predictions_look_like_may_change_until_it_is_told():
    comparison = compared("auto", ["3", "4"], [])
    assert (comparison.told, comparison.looks_like()) == (Kind.AUTO, Kind.LABELS)
    for text in scores(100, 1):
        comparison.add("stable", text)
    assert (comparison.told, comparison.looks_like()) == (Kind.AUTO, Kind.NUMBERS)
    for text in scores(REFERENCE_VOTES, 2):
        comparison.add("stable", text)
    assert (comparison.looks_like(), comparison.told) == (Kind.NUMBERS, Kind.NUMBERS)
    assert compared("auto", [], ["0.5"]).looks_like() is Kind.NUMBERS
    assert compared("labels", ["0.5"], []).looks_like() is Kind.LABELS
    assert compared("vector", ["1,2"] * REFERENCE_VOTES, []).looks_like() is Kind.VECTOR
    told = compared("auto", ["7"] * REFERENCE_VOTES, [])
    assert (told.looks_like(), told.told) == (Kind.LABELS, Kind.LABELS)


def test_the_nineteen_most_frequent_labels_of_stable_are_told_apart():
    stable = [label for i in range(30) for label in [f"class-{i:02}"] * (100 - i)]
    canary = ["class-00"] * 50 + ["class-25"] * 20 + ["made up"] * 5
    table = compared("labels", stable, canary).tables()[0]
    assert table.names == [f"class-{i:02}" for i in range(TOP_LABELS)] + [OTHER]
    assert table.stable == [100 - i for i in range(TOP_LABELS)] + [sum(100 - i for i in range(TOP_LABELS, 30))]
    assert table.canary == [50] + [0] * 18 + [25]
    assert table.positions is None


def test_labels_that_the_canary_makes_up_displace_none_of_stable():
    made_up = [f"made up {i}" for i in range(5 * MAX_LABELS)]
    comparison = compared("labels", [str(i % 10) for i in range(500)], made_up + ["3"] * 40)
    stable, canary, names = comparison.counts()
    assert canary[names.index("3")] == 40
    assert (sum(stable), canary[-1]) == (500, len(made_up))
    assert len(comparison._texts["canary"]) == MAX_LABELS + 1


@pytest.mark.parametrize("kind", ["labels", "auto", "numbers", "vector"])
def test_any_number_of_different_texts_takes_bounded_memory_and_every_vote_is_accounted_for(kind):
    comparison = compared(kind, (f"text {i} " + "x" * 3000 for i in range(9000)), (f"t{i}" for i in range(9000)))
    kept = [text for texts in comparison._texts.values() for text in texts]
    assert len(kept) <= 2 * MAX_TEXTS
    assert max(map(len, kept), default=0) <= MAX_LABEL or kind != "labels"
    for arm, counts in zip(("stable", "canary"), comparison.counts()[:2], strict=True):
        assert (sum(counts) // (18 if kind == "vector" else 1)) + comparison.unplaced(arm) == 9000


def scores(n, seed, mean=0.0):
    draw = random.Random(seed)
    return [f"{draw.gauss(mean, 1):.6g}" for _ in range(n)]


def test_numbers_are_counted_in_twenty_bins_that_the_sample_fills_evenly():
    comparison = compared("numbers", scores(REFERENCE_VOTES, 1), scores(500, 2))
    (table,) = comparison.tables()
    assert table.stable == [100] * 20 + [0]
    assert sum(table.canary) == 500
    assert table.names[-1] == UNPARSABLE
    assert table.positions[:-1] == sorted(table.positions[:-1])
    assert comparison._texts == {"stable": {}, "canary": {}}, "no prediction is kept once it is counted"


def test_frozen_bins_count_what_comes_later_as_an_independent_count_does():
    first, later = scores(REFERENCE_VOTES, 1), scores(3000, 3, mean=0.3)
    comparison = compared("auto", first, scores(100, 2))
    comparison.tables()
    assert comparison.settled
    for item in later:
        comparison.add("canary", item)
    edges = [-math.inf, *np.sort(np.array(first, float))[99:-1:100], math.inf]
    expected, _ = np.histogram(-np.array(scores(100, 2) + later, float), bins=-np.array(edges)[::-1])
    assert comparison.counts()[1] == [*expected[::-1].tolist(), 0]  # negated: numpy's bins are closed on the left


def test_a_batch_of_votes_that_comes_sorted_does_not_make_its_beginning_the_reference():
    comparison = PredictionComparison("auto")
    for label in range(10):
        comparison.add("stable", str(label), REFERENCE_VOTES)
    assert len(comparison.tables()[0].names) == 11


def test_the_categories_stay_once_frozen_whatever_stable_does_later():
    for kind, change in (("labels", ["new"] * 90_000), ("numbers", scores(9000, 5, mean=9.0))):
        comparison = compared(kind, scores(REFERENCE_VOTES, 1) if kind == "numbers" else ["a", "b"] * 1000, [])
        before = comparison.counts()
        for item in change:
            comparison.add("stable", item)
        after = comparison.counts()
        assert after[2] == before[2]
        assert all(n >= earlier for n, earlier in zip(after[0], before[0], strict=True))


def test_text_and_nan_from_a_canary_whose_stable_returns_numbers_is_a_category_that_drift_sees():
    stable = scores(3000, 1)
    for broken in ("refused", "nan", "inf", "-inf", "1e999", ""):
        comparison = compared("auto", stable, scores(900, 2) + [broken] * 100)
        _, canary, names = comparison.counts()
        assert canary[names.index(UNPARSABLE)] == 100
        drift = drift_of(comparison)
        assert drift.ks == pytest.approx(0.1, abs=0.02)
        assert drift.wasserstein_sd < 0.1


def test_numbers_from_a_canary_whose_stable_returns_labels_are_other_labels():
    comparison = compared("auto", ["cat", "dog"] * 1000, ["0.5"] * 100)
    assert comparison.counts() == ([1000, 1000, 0], [0, 0, 100], ["cat", "dog", OTHER])
    assert drift_of(comparison).js == pytest.approx(1.0)


@pytest.mark.parametrize("moved", ["0.1", "0.9"])
def test_a_move_away_from_the_one_value_that_stable_returns_is_seen_in_both_directions(moved):
    assert drift_of(compared("auto", ["0.5"] * 2000, [moved] * 50)).ks == 1.0


@given(st.lists(st.integers(-6, 6).map(lambda n: n / 2) | st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_bins_never_hold_more_than_a_share_but_for_single_values(values):
    bins = cut(values, 10)
    assert len(bins.edges) <= 9
    held = {}
    for value in values:
        held.setdefault(slot_of(bins.edges, repr(value)), []).append(value)
    for inside in held.values():
        ordinary = [n for n in Counter(inside).values() if n <= len(values) / 10]
        assert len(set(inside)) == 1 or len(inside) <= 2 * math.ceil(len(values) / 10) + max(ordinary, default=0)


def test_a_value_that_is_common_has_a_bin_and_a_name_of_its_own():
    bins = cut([0.0] * 50 + [i / 100 for i in range(1, 51)], 10)
    table = bins.table("", [0] * bins.size, [0] * bins.size)
    assert table.names[:3] == ["< 0", "0", "0 .. 0.1"]
    assert [slot_of(bins.edges, text) for text in ("-1e-9", "0", "-0", "1e-9", "x")] == [0, 1, 1, 2, -1]


def vectors(n, seed, shift=0.0, size=32):
    draw = random.Random(seed)
    return [",".join(f"{draw.gauss(shift, 1):.6g}" for _ in range(size)) for _ in range(n)]


def test_a_vector_is_eighteen_numbers_binned_in_ten_each():
    comparison = compared("vector", vectors(REFERENCE_VOTES, 1), vectors(700, 2))
    tables = comparison.tables()
    assert [table.name for table in tables] == FEATURES
    assert all(table.stable == [200] * 10 + [0] for table in tables)
    assert all(sum(table.canary) == 700 for table in tables)


def test_vectors_are_counted_as_numpy_counts_them_from_the_definition():
    first, later = vectors(REFERENCE_VOTES, 1), vectors(300, 2, shift=0.2)
    comparison = compared("vector", first, [])
    comparison.tables()
    for item in later:
        comparison.add("canary", item)
    stable, canary = (np.array([item.split(",") for item in items], float) for items in (first, later))
    mean = stable.mean(axis=0)
    for number, table in enumerate(comparison.tables()):
        if number < 16:
            known, new = (x @ projections(32)[:, number] for x in (stable, canary))
        elif number == 16:
            known, new = (np.linalg.norm(x, axis=1) for x in (stable, canary))
        else:
            known, new = (x @ mean / np.linalg.norm(x, axis=1) / np.linalg.norm(mean) for x in (stable, canary))
        cuts = np.sort(known)[199:-1:200]
        expected = np.bincount(np.searchsorted(cuts, new, side="left"), minlength=10)
        assert np.abs(np.array(table.canary[:-1]) - expected).sum() <= 2, table.name  # rounding at an edge


def test_the_projections_are_standard_normal_and_the_same_for_ever():
    drawn = projections(32)
    assert drawn.shape == (32, 16)
    assert abs(drawn.mean()) < 0.15
    assert drawn.std() == pytest.approx(1.0, abs=0.1)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(16)).max() < 0.6
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01
    assert [*drawn[0, :3], drawn[31, 15]] == pytest.approx([0.83943182, -0.12466278, -0.58622384, -1.77406678])
    assert np.array_equal(projections(5), drawn[:5])


def test_a_changed_model_of_vectors_drifts_and_an_unchanged_one_does_not():
    same = drift_of(compared("vector", vectors(4000, 1), vectors(4000, 2)))
    other = drift_of(compared("vector", vectors(4000, 1), vectors(4000, 3, shift=0.3)))
    assert same.js < 0.05
    assert same.psi < 0.01
    assert other.js > 2 * same.js
    assert other.psi > 0.05


@pytest.mark.parametrize("broken", ["nan", "1,2", "", "0.5,text", ",".join(["1e308"] * 32), "inf" + ",1" * 31])
def test_what_is_no_vector_of_stables_length_is_a_category_of_its_own(broken):
    comparison = compared("vector", vectors(2500, 1), vectors(90, 2) + [broken] * 10)
    assert all(table.canary[-1] == 10 and table.stable[-1] == 0 for table in comparison.tables())


def test_vectors_without_length_have_a_cosine_too():
    zero = ",".join(["0"] * 32)
    tables = compared("vector", [zero] * 2000, [zero] * 5 + vectors(5, 1)).tables()
    assert all(max(table.stable) == 2000 and sum(table.canary) == 10 for table in tables)


def test_stable_answers_that_are_no_vectors_at_all_leave_everything_unparsable():
    tables = compared("vector", ["text"] * 2500, vectors(10, 1)).tables()
    assert all((table.stable[-1], table.canary[-1]) == (2500, 10) for table in tables)


SAMPLES = {
    "labels": (["a", "b", "c", "=~#"] * 700, ["b"] * 40 + ["z%20"]),
    "auto": (["3", "4"] * 1200, ["3", "9"]),
    "numbers": (scores(2500, 1), [*scores(100, 2), "x"]),
    "vector": (vectors(2100, 1, size=4), [*vectors(60, 2, size=4), "x"]),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("votes", [300, 2500])
def test_exported_counts_and_reference_are_the_comparison_again(kind, votes):
    stable, canary = SAMPLES[kind]
    sent = compared(kind, stable[:votes], canary)
    exported = json.loads(json.dumps(sent.export()))
    assert all(type(n) is int for n in exported.values())
    plain = json.loads(json.dumps(plain_reference(sent.reference))) if sent.reference else None
    received = PredictionComparison(kind, parse_reference(plain) if plain else None)
    received.absorb(exported)
    assert received.counts() == sent.counts()
    assert received.export() == exported


@pytest.mark.parametrize("kind", SAMPLES)
def test_what_replicas_with_one_reference_counted_is_merged_by_adding_in_any_order(kind):
    stable, canary = SAMPLES[kind]
    first = compared(kind, stable, canary)
    first.counts()
    parts = []
    for part in range(3):
        counted = PredictionComparison(kind, first.reference)
        for item in canary[part::3]:
            counted.add("canary", item)
        for item in stable[part::3]:
            counted.add("stable", item)
        parts.append(counted.export())
    merged = [PredictionComparison(kind, first.reference) for _ in range(2)]
    for part in parts:
        merged[0].absorb(part)
    for part in reversed(parts):
        merged[1].absorb(part)
    assert merged[0].counts() == merged[1].counts() == first.counts()


@pytest.mark.parametrize("kind", SAMPLES)
def test_settled_counts_only_grow(kind):
    stable, canary = SAMPLES[kind]
    comparison, before = PredictionComparison(kind), {}
    draw = random.Random(1)
    for _ in range(6000):
        arm, items = draw.choice([("stable", stable), ("canary", canary)])
        comparison.add(arm, draw.choice(items))
        if draw.random() < 0.01:
            now = comparison.export()
            if comparison.settled:
                assert all(now.get(key, 0) >= n for key, n in before.items())
                before = now
    assert before


def test_declared_labels_only_grow_however_many_there_are():
    comparison, before = PredictionComparison("labels"), {}
    for i in range(4 * MAX_LABELS):
        comparison.add("canary", f"made up {i}")
        comparison.add("stable", f"class {i % (MAX_LABELS // 2)}")
        if i > MAX_LABELS:  # by then it has made up as many as are kept
            comparison.add("canary", f"class {i % (MAX_LABELS // 2)}")
        if i % 400 == 0:
            now = comparison.export()
            assert all(now.get(key, 0) >= n for key, n in before.items())
            before = now


def test_vectors_that_nobody_reads_are_not_kept():
    comparison = compared("vector", vectors(REFERENCE_VOTES, 1, size=2), [])
    comparison.counts()
    for item in vectors(1000, 2, size=2):
        comparison.add("canary", item)
        assert sum(map(len, comparison._pending.values())) < 300
    assert sum(comparison.tables()[0].canary) == 1000


@pytest.mark.parametrize(
    "bad", [{"stable#0": 1}, {"canary": 1}, {"other=3": 1}, {"stable=3": -1}, {"stable=3": 1.5}, {"stable~x": 1}]
)
def test_counts_of_something_else_are_refused_whole(bad):
    comparison = PredictionComparison("labels")
    with pytest.raises(ValueError, match="no counts"):
        comparison.absorb({"stable=ok": 1, **bad})
    assert comparison.export() == {}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {"labels": [1]},
        {"labels": "ab"},
        {"edges": [1, 0], "positions": [0, 0, 0]},
        {"edges": [1], "positions": [0]},
        {"edges": ["x"], "positions": [0, 0]},
        {"edges": [math.nan], "positions": [0, 0]},
        {"edges": 3, "positions": [0]},
        {"mean": [1.0], "features": []},
        {"mean": [math.inf], "features": [{"edges": [], "positions": [0]}] * 18},
        {"mean": [1.0], "features": [{"edges": list(range(10)), "positions": [0] * 11}] * 18},
        {"mean": None, "features": None},
    ],
)
def test_a_reference_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=r"no reference|no bins"):
        parse_reference(bad)


def test_each_kind_of_reference_survives_json():
    for kind, wanted in (("labels", LabelBins), ("numbers", NumberBins), ("vector", VectorBins)):
        comparison = compared(kind, *SAMPLES[kind])
        comparison.counts()
        assert isinstance(comparison.reference, wanted)
        assert parse_reference(json.loads(json.dumps(plain_reference(comparison.reference)))) == comparison.reference


def test_an_arm_or_a_kind_that_there_is_not_is_an_error_of_the_caller():
    with pytest.raises(KeyError):
        PredictionComparison("labels").add("baseline", "3")
    with pytest.raises(ValueError, match="picture"):
        PredictionComparison("picture")


def test_what_an_arm_predicted_most_is_shown_in_its_own_terms():
    assert compared("auto", ["7"] * 3 + ["1"], ["1", "1", "x"]).top("canary", 2) == [("1", 2), ("x", 1)]
    shown = compared("numbers", scores(2000, 1), ["99"] * 7).top("canary")
    assert [n for _, n in shown] == [7]
    assert shown[0][0].startswith("> 1.")
    assert compared("vector", vectors(10, 1), []).top("stable") == []


def test_without_votes_there_is_no_drift():
    for kind in Kind:
        assert drift_of(PredictionComparison(kind)) is None
        assert drift_of(compared(kind, ["1.5"] * 2500, [])) is None
        assert drift_of(compared(kind, [], ["1.5"] * 2500)) is None


def test_numbers_that_came_before_stable_had_any_and_were_too_many_to_keep_are_told():
    comparison = compared("numbers", [], scores(MAX_TEXTS + 50, 1))
    assert comparison.unplaced("canary") == pytest.approx(50, abs=10)
    assert PredictionComparison("labels").unplaced("canary") == 0

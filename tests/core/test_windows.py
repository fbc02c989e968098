"""Windows against a second computation that keeps every outcome and counts when asked."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import good_outcome

from extproc.core.gcounter import GCounter, Message, Process
from extproc.core.latency import bin_of
from extproc.core.outcomes import Assignment
from extproc.core.predictions import OTHER, REFERENCE_VOTES, Kind
from extproc.core.windows import (
    MAX_VERSIONS,
    NONE,
    RECENT_S,
    CellKey,
    GroupKey,
    SeriesKey,
    Windows,
)

ids = itertools.count()


def assigned(cohort="stable", *, flag="digits", reason="SPLIT", rule="", version="abc.1"):
    return Assignment(flag, "digits", cohort, reason, rule, version)


def outcome(assignment=None, **changed):
    """An inference request that went well, served as assigned, unless told otherwise."""
    return good_outcome(assignment, **changed)


def counted(*outcomes, steps=lambda _flag, _version: 0):
    windows = Windows(steps)
    for one in outcomes:
        add(windows, one)
    windows.settle()
    return windows


def add(windows, one):
    lane = windows.lane(one)
    if lane is not None:
        windows.add(lane, one)


def cell(windows, arm="stable", *, stratum="", step=0, flag="digits"):
    return windows.cells[CellKey(flag, stratum, step, arm)].total()


def shown(windows, cohort="stable", *, flag="digits", version="1"):
    return windows.shown[SeriesKey(flag, cohort, version)].total()


REASONS = ("SPLIT", "RULE_SPLIT", "FORCED", "TARGETING_MATCH", "NO_UNIT", "HELD", "DISABLED")
ASSIGNMENTS = st.builds(
    lambda cohort, reason, rule, version: assigned(
        cohort, reason=reason, rule=rule if reason == "RULE_SPLIT" else "", version=version
    ),
    st.sampled_from(("stable", "canary")),
    st.sampled_from(REASONS),
    st.sampled_from(("pilot", "staff")),
    st.sampled_from(("abc.1", "abc.2", "unknown.9")),
)
OUTCOMES = st.builds(
    lambda assignment, hash_, served, inference, status, deadline, aborted, ms, prediction, version: outcome(
        assignment,
        hash=None if assignment is None else hash_,
        served=served if assignment is None or assignment.cohort == "canary" else "stable",
        failed_open=assignment is None,
        inference=inference,
        status=status,
        deadline=deadline,
        aborted=aborted,
        total_ms=ms,
        upstream_ms=None if status == 0 else ms / 2,
        predictions=prediction,
        prediction_count=1,
        model_version=version,
    ),
    st.one_of(st.none(), ASSIGNMENTS),
    st.integers(0, 5),
    st.sampled_from(("stable", "canary")),
    st.sampled_from((True, True, True, False)),
    st.sampled_from((200, 200, 404, 500, 0)),
    st.sampled_from((False, False, False, True)),
    st.sampled_from((False, False, False, True)),
    st.floats(0, 1e6),
    st.sampled_from(("1", "2", "seven")),
    st.sampled_from(("1", "2")),
)
STEPS = {"abc.1": 0, "abc.2": 1}


def step_of(_flag, version):
    return STEPS.get(version)


def is_bad(one):
    return bool(one.error) or one.fell_back


def judged_by_hand(outcomes, key):
    """The cell's counts, from every outcome that there was."""
    mine = [
        one
        for one in outcomes
        if one.eligible
        and step_of("digits", one.assignment.version) == key.step
        and (one.assignment.rule if one.assignment.reason == "RULE_SPLIT" else "") == key.stratum
    ]
    arm = [one for one in mine if one.assignment.cohort == key.arm]
    firsts = {}
    for one in mine:
        firsts.setdefault(one.hash, one)
    measured = [one for one in arm if one.served == key.arm]
    first = [one for one in firsts.values() if one.assignment.cohort == key.arm]
    return {
        "requests": len(arm),
        "bad": sum(map(is_bad, arm)),
        "fell_back": sum(one.fell_back for one in arm),
        "errors": Counter(one.error for one in arm if one.error),
        "units": len(first),
        "bad_units": sum(map(is_bad, first)),
        "latency": Counter(bin_of(one.total_ms) for one in measured),
        "upstream": Counter(bin_of(one.upstream_ms) for one in measured if one.upstream_ms is not None),
    }


@given(st.lists(OUTCOMES, max_size=60))
def test_every_judged_count_is_that_of_a_naive_recount(outcomes):
    windows = counted(*outcomes, steps=step_of)
    for key, window in windows.cells.items():
        tally = window.total()
        expected = judged_by_hand(outcomes, key)
        assert {name: getattr(tally, name) for name in expected} == expected
    eligible = [one for one in outcomes if one.eligible and one.assignment.version in STEPS]
    assert sum(window.total().requests for window in windows.cells.values()) == len(eligible)


@given(st.lists(OUTCOMES, max_size=60))
def test_what_is_shown_counts_every_inference_request_once(outcomes):
    windows = counted(*outcomes, steps=step_of)
    inference = [one for one in outcomes if one.inference]
    total = Counter()
    for key, window in windows.shown.items():
        tally = window.total()
        mine = [one for one in inference if (one.assignment.cohort if one.assignment else NONE) == key.cohort]
        mine = [one for one in mine if one.model_version == key.model_version]
        ended = [one for one in mine if not one.aborted]
        assert tally.requests == len(ended)
        assert tally.aborted == len(mine) - len(ended)
        assert tally.errors == Counter(one.error for one in ended if one.error)
        assert tally.failed_open == sum(one.failed_open for one in ended)
        total.update(requests=tally.requests + tally.aborted)
    assert total["requests"] == len(inference)


@given(st.lists(OUTCOMES, max_size=40), st.data())
def test_two_replicas_merge_to_what_one_would_have_counted_but_for_first_units(outcomes, data):
    whole = counted(*outcomes, steps=step_of).counts()
    first = [one for one in outcomes if data.draw(st.booleans())]
    second = [one for one in outcomes if one not in first]
    sums = GCounter()
    messages = []
    for name, part in (("a", first), ("b", second)):
        windows = Windows(step_of)
        for seq, one in enumerate(part):
            add(windows, one)
            windows.settle()
            messages.append(Message(Process(name, "boot"), seq, windows.counts()))
    for message in data.draw(st.permutations(messages + messages)):
        sums.take(message)

    def without_units(counts):
        return {key: n for key, n in counts.items() if n and key[4] not in ("units", "bad_units")}

    assert without_units(sums.totals()) == without_units(whole)


def test_a_unit_counts_once_in_a_step_with_its_first_outcome_and_again_in_the_next():
    windows = counted(
        outcome(assigned(), hash=1, status=500),
        outcome(assigned(), hash=1),
        outcome(assigned(), hash=2),
        outcome(assigned(), hash=2, status=500),
        outcome(assigned(version="abc.2"), hash=1),
        steps=step_of,
    )
    assert (cell(windows).units, cell(windows).bad_units, cell(windows).requests) == (2, 1, 4)
    assert (cell(windows, step=1).units, cell(windows, step=1).bad_units) == (1, 0)


def test_a_fall_back_is_bad_for_canary_and_measures_neither_arm():
    windows = counted(outcome(assigned("canary"), served="stable", predictions="9", total_ms=50.0))
    tally = cell(windows, "canary")
    assert (tally.requests, tally.bad, tally.fell_back, tally.errors) == (1, 1, 1, {})
    assert (tally.latency, tally.served) == ({}, 0)
    assert windows.labels("digits", "canary") == {}
    assert CellKey("digits", "", 0, "stable") not in windows.cells


def test_a_fall_back_that_also_failed_is_bad_once():
    tally = cell(counted(outcome(assigned("canary"), served="stable", status=500)), "canary")
    assert (tally.bad, tally.errors, tally.fell_back) == (1, {"5xx": 1}, 1)


def test_a_hanging_canary_counts_as_an_error_at_the_deadline():
    hung = outcome(assigned("canary"), status=504, deadline=True, upstream_ms=None, total_ms=2000.0, predictions="")
    tally = cell(counted(hung), "canary")
    assert (tally.errors, tally.bad) == ({"deadline": 1}, 1)
    assert tally.latency == {bin_of(2000.0): 1}


def test_a_request_of_another_arm_than_decided_is_shown_as_mismatched_and_measures_nobody():
    wrong = outcome(assigned("stable"), arm="canary", served="canary", predictions="9")
    windows = counted(wrong)
    assert shown(windows).mismatched == 1
    assert shown(windows).latency == {}
    assert windows.labels("digits", "stable") == {}


def test_a_request_that_another_model_served_measures_nobody():
    tally = shown(counted(outcome(assigned(), model="letters")))
    assert (tally.mismatched, tally.latency) == (1, {})


def test_a_client_that_went_away_is_shown_and_not_judged():
    windows = counted(outcome(assigned(), aborted=True, status=0))
    assert (shown(windows).aborted, shown(windows).requests) == (1, 0)
    assert cell(windows).requests == 0


def test_a_fail_open_request_belongs_to_no_arm():
    windows = counted(outcome(None, failed_open=True))
    assert shown(windows, NONE, flag=NONE).failed_open == 1
    assert not windows.cells


def test_a_version_that_nobody_knows_is_shown_counted_and_not_judged_until_it_is_known():
    known = {}
    windows = Windows(lambda _flag, version: known.get(version))
    add(windows, outcome(assigned(version="new.5")))
    known["new.5"] = 3
    add(windows, outcome(assigned(version="new.5")))
    windows.settle()
    assert shown(windows).requests == 2
    assert cell(windows, step=3).requests == 1
    assert windows.dropped == {"unknown_version": 1}


def test_each_rule_with_a_percentage_is_a_stratum_of_its_own():
    windows = counted(outcome(assigned(reason="RULE_SPLIT", rule="pilot")), outcome(assigned()))
    assert cell(windows, stratum="pilot").requests == cell(windows).requests == 1


def test_a_batch_is_one_vote_chosen_by_the_unit():
    windows = counted(outcome(assigned(), hash=4, predictions="a,b,c", prediction_count=3))
    assert windows.labels("digits", "stable") == {"b": 1}
    assert windows.groups[GroupKey("digits", "", 0)].predictions.top("stable") == [("b", 1)]


def test_labels_are_shown_decoded_and_cut():
    windows = counted(
        outcome(assigned(), predictions="z%C3%BCrich%2C%20ch"), outcome(assigned(), predictions="x" * 999)
    )
    assert set(windows.labels("digits", "stable")) == {"zürich, ch", "x" * 128}


def test_a_vector_is_one_prediction_which_is_compared_and_not_shown():
    windows = Windows(lambda _flag, _version: 0, {"digits": Kind.VECTOR}.get)
    add(windows, outcome(assigned(), predictions="1,2,3", prediction_count=1))
    windows.settle()
    assert windows.labels("digits", "stable") == {"(vector)": 1}
    assert windows.groups[GroupKey("digits", "", 0)].predictions.export() == {"stable=1,2,3": 1}


def test_what_a_models_predictions_are_holds_without_a_decision_and_for_a_flag_that_is_no_more():
    windows = Windows(lambda _flag, _version: 0, {"digits": Kind.VECTOR}.get)
    add(windows, outcome(None, failed_open=True, predictions="1,2,3"))
    add(windows, outcome(assigned(flag="gone"), predictions="1,2,3"))
    windows.settle()
    assert windows.labels(NONE, NONE) == windows.labels("gone", "stable") == {"(vector)": 1}


def test_numbers_are_counted_as_numbers_once_it_is_told_that_they_are():
    minutes = [outcome(assigned(), predictions=str(i % 700)) for i in range(REFERENCE_VOTES)]
    windows = counted(*minutes)
    assert len(windows.labels("digits", "stable")) == 700  # classes, for all that anybody knows
    assert windows.groups[GroupKey("digits", "", 0)].predictions.looks_like() is Kind.NUMBERS
    for one in minutes:
        add(windows, one)
    windows.settle()
    assert len(windows.labels("digits", "stable")) == 701
    assert windows.labels("digits", "stable")["(number)"] == REFERENCE_VOTES


def test_a_second_that_ended_is_in_the_last_minute_until_it_is_a_minute_old():
    windows = Windows(lambda _flag, _version: 0)
    add(windows, outcome(assigned(), total_ms=5.0))
    ended, judged = windows.roll(100)
    assert (
        ended[SeriesKey("digits", "stable", "1")].requests == judged[CellKey("digits", "", 0, "stable")].requests == 1
    )
    window = windows.shown[SeriesKey("digits", "stable", "1")]
    windows.roll(100 + RECENT_S - 1)
    assert window.last_minute().latency == {bin_of(5.0): 1}
    windows.roll(100 + RECENT_S)
    assert (window.last_minute().requests, window.last_minute().latency) == (0, {})
    assert window.total().requests == 1


def test_a_second_in_which_nothing_came_brings_nothing():
    windows = counted(outcome(assigned()))
    windows.roll(1)
    assert windows.roll(2) == ({}, {})


@given(st.lists(st.tuples(OUTCOMES, st.integers(0, 30)), max_size=60))
def test_the_last_minute_is_what_came_in_it(steps):
    windows, now, kept = Windows(step_of), 0, []
    for one, pause in steps:
        add(windows, one)
        now += pause
        windows.roll(now)
        kept.append((now, one))
    expected = Counter()
    for ended, one in kept:
        if one.inference and not one.aborted and ended > now - RECENT_S:
            expected[one.model_version] += 1
    found = Counter()
    for key, window in windows.shown.items():
        found[key.model_version] += window.last_minute().requests
    assert +found == expected


@pytest.mark.parametrize("strange_ms", [float("nan"), float("inf"), -1.0])
def test_a_duration_that_is_none_is_refused_and_its_request_still_counts(strange_ms):
    tally = cell(counted(outcome(assigned(), total_ms=strange_ms, upstream_ms=strange_ms)))
    assert tally.requests == 1
    assert tally.latency == {-1: 1}


def test_endless_model_versions_share_a_series():
    windows = counted(*(outcome(assigned(), model_version=f"v{i}") for i in range(100)))
    assert len(windows.shown) == MAX_VERSIONS + 1
    assert shown(windows, version=OTHER).requests == 100 - MAX_VERSIONS
    assert windows.dropped["series"] == 100 - MAX_VERSIONS


def test_endless_flags_rules_and_labels_stay_within_bounds_and_lose_no_request(monkeypatch):
    for name, most in {"MAX_GROUPS": 64, "MAX_CELLS": 128, "MAX_SERIES": 100, "MAX_LABELS": 100}.items():
        monkeypatch.setattr(f"extproc.core.windows.{name}", most)
    windows = Windows(lambda _flag, version: int(version))
    n = 200
    for i in range(n):
        add(windows, outcome(assigned(flag=f"f{i}", version="1"), predictions=f"p{i}"))
        add(windows, outcome(assigned(flag="one", version=str(i)), predictions=f"p{i}"))
    windows.settle()
    assert len(windows.groups) == 64
    assert len(windows.shown) <= 101
    assert len(windows.labels("one", "stable")) <= 101
    assert sum(window.total().requests for window in windows.shown.values()) == 2 * n
    assert sum(window.total().units for window in windows.shown.values()) == 2 * n
    assert windows.dropped["groups"] == 2 * n - 64


def test_health_and_metadata_requests_are_passed_over():
    assert Windows(lambda _flag, _version: 0).lane(outcome(None, inference=False)) is None

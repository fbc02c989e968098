import json
import math
import tracemalloc
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core import kpis as module
from extproc.core.bucketing import hash_unit
from extproc.core.conditions import Leaf, Op, Subject
from extproc.core.flags import Arm, Exposure, Flag, Rule
from extproc.core.kpis import KpiError, Kpis, Moments, Reported, Served, State, parse_reported, unit_prefixes
from extproc.core.ruleset import compile_flag

PREFIXES = {"digits": {"": b"d:", "pilot": b"d/pilot:"}, "wine": {"": b"w:"}}
WINDOW_S, PENDING_S = 2880.0, 10.0  # a bin is ten seconds


def store(**more):
    made = Kpis(window_s=WINDOW_S, pending_s=PENDING_S, **more)
    made.take_flags(PREFIXES)
    return made


def served(unit="alice", arm="canary", time_s=0.0, **more):
    fields = {"flag": "digits", "stratum": "", "step": 0, "arm": arm, "cohort": arm, "eligible": True} | more
    prefix = PREFIXES[fields["flag"]][fields["stratum"]]
    return Served(**fields, hash=None if unit is None else hash_unit(prefix, unit.encode()), time_s=time_s)


def report(kpis, now_s=0.0, value=1.0, name="accuracy", **more):
    return kpis.report(Reported(name, value, **more), now_s)


def moments(kpis, **wanted):
    """The sums of every key that has these fields."""
    total = Moments()
    for key, found in kpis.totals().items():
        if all(getattr(key, field) == value for field, value in wanted.items()):
            total = total.plus(found)
    return total


# --- joining ---


def test_a_label_is_joined_to_the_arm_that_served_its_request():
    kpis = store()
    kpis.remember("r-1", served(arm="canary", step=2), 0)
    kpis.remember("r-2", served(arm="stable", step=2), 0)
    assert report(kpis, request_id="r-1", value=0.0).state is State.JOINED
    assert report(kpis, request_id="r-2", value=3.0, flag="digits").state is State.JOINED
    assert moments(kpis, arm="canary", step=2, judged=True) == (1, 0.0, 0.0)
    assert moments(kpis, arm="stable", step=2, judged=True) == (1, 3.0, 9.0)


@pytest.mark.parametrize("stratum", ["", "pilot"])
def test_a_unit_is_joined_to_its_latest_serving_whichever_split_hashed_it(stratum):
    kpis = store()
    kpis.remember("r-1", served("bob", arm="stable", time_s=1), 1)
    kpis.remember("r-2", served("bob", stratum=stratum, time_s=5), 5)
    assert report(kpis, 6, unit="bob", flag="digits").state is State.JOINED
    assert moments(kpis, arm="canary", stratum=stratum) == (1, 1.0, 1.0)


def test_the_latest_serving_counts_also_between_two_splits():
    kpis = store()
    for n, stratum in enumerate(("", "pilot", "")):  # the later group was seen before the earlier one
        kpis.remember(f"r-{n}", served("alice" if n else "bob", stratum=stratum, time_s=n), n)
    report(kpis, 3, unit="alice", flag="digits")
    assert (moments(kpis, stratum="").n, moments(kpis, stratum="pilot").n) == (1, 0)


def test_a_unit_is_bytes_and_belongs_to_one_flag():
    kpis = store()
    kpis.remember("r-1", served("bob")._replace(hash=hash_unit(b"d:", b"\xff")), 0)
    assert report(kpis, unit="\udcff", flag="digits").state is State.JOINED
    assert report(kpis, unit="\udcff", flag="wine").state is State.PENDING
    assert report(kpis, unit="Bob", flag="digits").state is State.PENDING


def test_what_fell_back_or_was_not_by_chance_is_shown_and_not_judged():
    kpis = store()
    kpis.remember("fell-back", served(arm="stable", cohort="canary"), 0)
    kpis.remember("forced", served(unit=None, eligible=False), 0)
    for request_id in ("fell-back", "forced"):
        assert report(kpis, request_id=request_id).state is State.JOINED
    assert moments(kpis, judged=True).n == 0
    assert moments(kpis, judged=False).n == 2


def test_a_unit_is_not_found_by_a_request_that_nobody_may_judge():
    kpis = store()
    kpis.remember("r-1", served(arm="stable", time_s=1), 1)
    kpis.remember("r-2", served(arm="canary", eligible=False, time_s=2), 2)
    report(kpis, 3, unit="alice", flag="digits")
    assert moments(kpis, arm="stable").n == 1


def test_a_label_that_comes_before_the_access_log_waits_for_it():
    kpis = store()
    assert report(kpis, 0, request_id="r-1").state is State.PENDING
    assert report(kpis, 0, unit="alice", flag="digits").state is State.PENDING
    assert kpis.counts.pending == 2
    kpis.remember("r-1", served("alice"), 1)
    assert (kpis.counts.pending, kpis.counts.joined, moments(kpis).n) == (0, 2, 2)


def test_what_waits_in_vain_is_unknown_and_may_be_reported_again():
    kpis = store()
    report(kpis, 0, request_id="r-1")
    kpis.advance(PENDING_S + 1)
    assert (kpis.counts.pending, kpis.counts.unknown) == (0, 1)
    kpis.remember("r-1", served(), PENDING_S + 2)
    assert moments(kpis).n == 0
    assert report(kpis, PENDING_S + 3, request_id="r-1").state is State.JOINED


def test_of_many_that_wait_for_one_unit_those_that_waited_too_long_are_unknown_and_the_others_joined():
    kpis = store()
    for second in range(20):
        report(kpis, second, unit="alice", flag="digits", value=float(second), key=f"order-{second}")
    assert (kpis.counts.pending, kpis.counts.unknown) == (11, 9)  # the one of second 9 may come in second 19 still
    kpis.remember("r-1", served("alice", time_s=19), 19)
    assert (kpis.counts.pending, moments(kpis).n, moments(kpis).sum) == (0, 11, sum(range(9, 20)))


def test_a_late_label_is_counted_and_not_joined_and_later_still_it_is_of_nobody():
    kpis = store()
    kpis.remember("r-1", served(), 0)
    assert report(kpis, WINDOW_S + 1, request_id="r-1").state is State.LATE
    assert (kpis.counts.late, moments(kpis).n) == (1, 0)
    assert report(kpis, 2 * WINDOW_S + 2, request_id="r-1").state is State.PENDING
    assert len(kpis) == 0


def test_an_early_report_about_another_flag_is_refused_when_its_request_is_known():
    kpis = store()
    assert report(kpis, request_id="r-1", flag="wine").state is State.PENDING
    kpis.remember("r-1", served(), 0)
    assert (kpis.counts.refused, kpis.counts.pending, moments(kpis).n) == (1, 0, 0)
    assert report(kpis, request_id="r-1", flag="digits").state is State.JOINED


# --- repetition ---


def test_the_same_request_and_name_count_once_whatever_the_value_unless_the_keys_differ():
    kpis = store()
    kpis.remember("r-1", served(), 0)
    states = [
        report(kpis, request_id="r-1", **more).state
        for more in ({}, {}, {"value": 0.0}, {"name": "clicks"}, {"key": "a"}, {"key": "a"}, {"key": "b"})
    ]
    joined, repeated = State.JOINED, State.DUPLICATE
    assert states == [joined, repeated, repeated, joined, joined, repeated, joined]
    assert (kpis.counts.duplicates, moments(kpis).n) == (3, 4)


def test_a_unit_may_be_reported_often_and_once_per_key():
    kpis = store()
    kpis.remember("r-1", served(), 0)
    for key in ("", "", "order-1", "order-1"):
        report(kpis, unit="alice", flag="digits", name="revenue", value=5.0, key=key)
    assert (moments(kpis, name="revenue"), kpis.counts.duplicates) == ((3, 15.0, 75.0), 1)


def test_what_is_repeated_while_it_waits_counts_once():
    kpis = store()
    assert [report(kpis, request_id="r-1").state for _ in (1, 2)] == [State.PENDING, State.DUPLICATE]
    kpis.remember("r-1", served(), 1)
    assert report(kpis, 1, request_id="r-1").state is State.DUPLICATE
    assert moments(kpis).n == 1


def test_a_request_that_two_log_streams_tell_of_is_remembered_once():
    kpis = store()
    assert kpis.remember("r-1", served(arm="canary"), 0)
    assert not kpis.remember("r-1", served(arm="stable"), 1)
    report(kpis, 1, request_id="r-1")
    assert moments(kpis, arm="canary").n == 1


def test_parts_that_are_the_same_text_together_are_different_reports():
    kpis = store()
    for request_id in ("a", "ab"):
        kpis.remember(request_id, served(), 0)
    assert report(kpis, request_id="ab", name="c", key="x").state is State.JOINED
    assert report(kpis, request_id="a", name="bc", key="x").state is State.JOINED
    assert report(kpis, request_id="a", name="b", key="cx").state is State.JOINED


# --- refusals ---

GOOD = {"request_id": "r-1", "flag": "digits", "name": "accuracy", "value": 1}


@pytest.mark.parametrize(("change", "told"), [
    ({"value": math.nan}, "value: nan is no finite number"),
    ({"value": -math.inf}, "value: -inf is no finite number"),
    ({"value": "1"}, "value: expected a number, true or false, not '1'"),
    ({"value": None}, "value: expected a number, true or false, not NoneType"),
    ({"value": [1]}, "value: expected a number, true or false, not list"),
    ({"value": 1e13}, "value: larger than 1e+12"),
    ({"value": -(10**400)}, "value: larger than 1e+12"),
    ({"name": ""}, "name: expected letters, digits, '.', '_', '-', at most 100, not ''"),
    ({"name": "a b"}, "name: expected letters, digits, '.', '_', '-', at most 100, not 'a b'"),
    ({"name": "x" * 101}, "name: expected letters"),
    ({"name": 7}, "name: expected letters, digits, '.', '_', '-', at most 100, not int"),
    ({"request_id": None}, "expected request_id or unit, one of the two"),
    ({"unit": "alice"}, "expected request_id or unit, one of the two"),
    ({"request_id": None, "unit": "alice", "flag": None}, "a unit needs its flag"),
    ({"request_id": "x" * 257}, "request_id: expected text of 1 to 256 characters, not 'xxx"),
    ({"key": 5}, "key: expected text of 1 to 256 characters, not int"),
    ({"key": ""}, "key: expected text of 1 to 256 characters, not ''"),
    ({"request_id": "\ud800"}, "request_id: not encodable as UTF-8"),
    ({"colour": 1}, "unknown field 'colour'; known are"),
])  # fmt: skip
def test_what_is_no_report_is_refused_with_its_reason(change, told):
    with pytest.raises(KpiError) as error:
        parse_reported(GOOD | change)
    assert str(error.value).startswith(told)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("data", [None, 1, "x", [GOOD], True])
def test_what_is_no_object_is_refused(data):
    with pytest.raises(KpiError, match="expected an object"):
        parse_reported(data)


@given(
    st.dictionaries(
        st.sampled_from(["request_id", "unit", "flag", "name", "value", "key"]) | st.text(max_size=3),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2),
    )
)
def test_whatever_is_parsed_is_refused_or_taken_by_the_store(data):
    try:
        parsed = parse_reported(data)
    except KpiError:
        return
    assert parsed.value == data["value"]
    assert store().report(parsed, 0).state in {State.PENDING, State.REFUSED}


def test_numbers_and_booleans_are_values():
    assert [parse_reported(GOOD | {"value": value}).value for value in (True, False, 3, -0.5)] == [1.0, 0.0, 3.0, -0.5]


def test_an_unknown_flag_and_the_wrong_flag_are_refused():
    kpis = store()
    kpis.remember("r-1", served(), 0)
    assert report(kpis, request_id="r-1", flag="dig\nits") == (State.REFUSED, "unknown flag 'dig\\nits'")
    assert report(kpis, unit="alice", flag="nope") == (State.REFUSED, "unknown flag 'nope'")
    assert report(kpis, request_id="r-1", flag="wine") == (
        State.REFUSED,
        "the request belongs to the flag digits, not 'wine'",
    )
    assert kpis.counts.refused == 3


# --- bounds ---


def test_more_requests_than_fit_push_out_the_oldest_and_are_counted():
    kpis = store(capacity=3)
    for n in range(5):
        kpis.remember(f"r-{n}", served(f"u-{n}"), n)
    assert (len(kpis), kpis.counts.pushed_out, kpis.counts.remembered) == (3, 2, 5)
    states = [report(kpis, 5, request_id=f"r-{n}").state for n in range(5)]
    assert states == [State.PENDING, State.PENDING, State.JOINED, State.JOINED, State.JOINED]
    assert report(kpis, 5, unit="u-1", flag="digits").state is State.PENDING


def test_a_unit_that_was_served_again_stays_when_its_first_request_is_pushed_out():
    kpis = store(capacity=2)
    for n, unit in enumerate(("alice", "alice", "bob")):
        kpis.remember(f"r-{n}", served(unit), 0)
    assert report(kpis, unit="alice", flag="digits").state is State.JOINED


def test_a_full_buffer_of_early_reports_refuses_rather_than_forgets():
    kpis = store(max_pending=2)
    states = [report(kpis, request_id=f"r-{n}") for n in range(3)]
    assert states[2] == (State.REFUSED, "too many reports wait for their request; send it again in some seconds")
    for n in range(3):
        kpis.remember(f"r-{n}", served(), 0)
    assert moments(kpis).n == 2
    kpis.advance(0)
    assert report(kpis, request_id="r-9").state is State.PENDING


def test_keys_that_were_forgotten_are_counted():
    kpis = store(capacity=2)
    kpis.remember("r-1", served(), 0)
    for key in "abc":
        report(kpis, request_id="r-1", key=key)
    assert kpis.counts.keys_forgotten == 1
    assert report(kpis, request_id="r-1", key="c").state is State.DUPLICATE
    assert report(kpis, request_id="r-1", key="a").state is State.JOINED


def test_an_id_in_the_place_of_a_name_is_refused_soon():
    kpis = store()
    kpis.remember("r-1", served(), 0)
    results = [report(kpis, request_id="r-1", name=f"n{n}") for n in range(module.MAX_NAMES + 1)]
    assert results[-1] == (State.REFUSED, "the flag digits has 64 names already")
    assert [result.state for result in results[:-1]] == [State.JOINED] * module.MAX_NAMES


def test_too_many_groups_are_counted_and_not_kept(monkeypatch):
    monkeypatch.setattr(module, "MAX_GROUPS", 2)
    kpis = store()
    assert [kpis.remember(f"r-{n}", served(step=n), 0) for n in range(3)] == [True, True, False]
    assert kpis.counts.unkept == 1


def test_many_cells_lose_their_time_and_no_value(monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 4)
    kpis = store()
    for n in range(20):
        kpis.remember(f"r-{n}", served(time_s=n * 10), n * 10)
        report(kpis, n * 10, request_id=f"r-{n}")
    assert moments(kpis).n == 20
    assert sum(found.n for found in kpis.totals(since_s=0).values()) == 4


def test_an_entry_is_small():
    kpis, n = store(), 20_000
    tracemalloc.start()
    try:
        for i in range(n):
            kpis.remember(f"ce9e19bc-0489-4474-8178-{i:012d}", served(f"user-{i}"), 0)
        each = tracemalloc.get_traced_memory()[0] / n
    finally:
        tracemalloc.stop()
    assert each < 400


# --- time ---


def test_values_belong_to_the_time_their_request_was_assigned_not_reported():
    kpis = store()
    for n, time_s in enumerate((5, 15, 25)):
        kpis.remember(f"r-{n}", served(time_s=time_s), time_s)
        report(kpis, 1000, request_id=f"r-{n}", value=float(n))
    (found,) = kpis.totals(before_s=20).values()
    assert found == (2, 1.0, 1.0)
    (found,) = kpis.totals(since_s=10, before_s=20).values()
    assert found == (1, 1.0, 1.0)
    assert kpis.totals(since_s=11, before_s=30).keys() == kpis.totals(since_s=20).keys()
    assert kpis.totals(since_s=30) == {}


def test_a_clock_that_steps_back_or_an_entry_from_the_future_does_no_harm():
    kpis = store()
    kpis.remember("r-1", served(time_s=1e9), 100)
    assert report(kpis, 50, request_id="r-1").state is State.JOINED
    assert report(kpis, 100 + WINDOW_S + 1, request_id="r-1", key="b").state is State.LATE
    kpis.remember("r-2", served(time_s=-5), 60)
    assert report(kpis, 10, request_id="r-2").state is State.JOINED


def test_the_sums_are_plain_json():
    kpis = store()
    kpis.remember("r-1", served(step=1), 0)
    report(kpis, request_id="r-1", value=4.0)
    key = {"flag": "digits", "stratum": "", "step": 1, "arm": "canary", "name": "accuracy", "judged": True}
    assert json.loads(json.dumps(list(kpis.plain()))) == [key | {"n": 1, "sum": 4.0, "squares": 16.0, "mean": 4.0}]


def test_the_prefixes_of_a_flag_are_those_that_its_requests_are_hashed_with():
    when = Leaf(Subject.HEADER, "x-region", Op.EXISTS, ())
    rules = (Rule(name="pilot", when=when, percent=Decimal(5)), Rule(name="staff", when=when, serve=Arm.CANARY))
    flag = Flag(key="digits", model="digits", salt="s", percent=Decimal(5), rules=rules)
    for attempt in (0, 2):
        plan = compile_flag(flag, Exposure(salt="s", attempt=attempt), 0)
        wanted = {name: plan.split_of(name).hash_prefix for name in ("", "pilot")}
        assert unit_prefixes(flag, attempt) == wanted


# --- against a model that forgets nothing ---

IDS, UNITS = ["r-0", "r-1", "r-2", "r-3"], ["alice", "bob"]
SERVE = st.tuples(
    st.just("serve"), st.sampled_from(IDS), st.sampled_from(UNITS), st.sampled_from(["stable", "canary"]), st.booleans()
)
ABOUT = st.sampled_from([{"request_id": each} for each in IDS] + [{"unit": each, "flag": "digits"} for each in UNITS])
REPORT = st.tuples(
    st.just("report"), ABOUT, st.sampled_from(["a", "b"]), st.sampled_from(["", "k"]), st.integers(-5, 5)
)
WAIT = st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 20.0, 2000.0, 6000.0]))
OPERATIONS = st.lists(SERVE | REPORT | WAIT, max_size=40)


class Model:
    """The same by looking through lists, with no bound."""

    def __init__(self):
        self.entries, self.waiting, self.known, self.sums = [], [], [], []
        self.unknown = 0

    def expire(self, now_s):
        """What is forgotten and what waited in vain."""
        self.entries = [entry for entry in self.entries if now_s - int(entry[1].time_s) <= 2 * WINDOW_S]
        for gone in [each for each in self.waiting if each[0] < now_s]:
            self.waiting.remove(gone)
            self.unknown += 1
            if gone[2] is not None:
                self.known.remove(gone[2])

    def serve(self, request_id, unit, entry):
        """A request, and the early reports it is the answer to."""
        if any(request_id == known for known, _, _ in self.entries):
            return
        self.entries.append((request_id, entry, unit if entry.eligible else None))
        for early in list(self.waiting):
            about = early[1]
            if about.request_id == request_id or (about.unit == unit and entry.eligible):
                self.waiting.remove(early)
                self.sums.append((entry.arm, entry.eligible, about.name, about.value))

    def report(self, about, now_s):
        """What becomes of a report."""
        identity = None if about.unit and not about.key else (about.request_id or about.unit, about.name, about.key)
        if identity is not None and identity in self.known:
            return State.DUPLICATE
        found = [
            entry
            for request_id, entry, unit in self.entries
            if (about.request_id and request_id == about.request_id) or (about.unit and unit == about.unit)
        ]
        if found and now_s - int(found[-1].time_s) > WINDOW_S:
            return State.LATE
        self.known.append(identity)
        if not found:
            self.waiting.append((now_s + PENDING_S, about, identity))
            return State.PENDING
        self.sums.append((found[-1].arm, found[-1].eligible, about.name, about.value))
        return State.JOINED


@given(OPERATIONS)
def test_nothing_that_was_accepted_is_lost_or_counted_twice(operations):
    kpis, model, now_s = store(), Model(), 0.0
    accepted = 0
    for operation in operations:
        match operation:
            case ("wait", seconds):
                now_s += seconds
            case ("serve", request_id, unit, arm, eligible):
                entry = served(unit, arm, now_s, eligible=eligible)
                model.serve(request_id, unit, entry)
                kpis.remember(request_id, entry, now_s)
            case ("report", about, name, key, value):
                about = Reported(name, float(value), key=key, **about)
                state = kpis.report(about, now_s).state
                assert state is model.report(about, now_s)
                accepted += state in {State.JOINED, State.PENDING}
        kpis.advance(now_s)
        model.expire(now_s)
        counts = kpis.counts
        assert counts.joined + counts.pending + counts.unknown == accepted
        assert (counts.pending, counts.unknown, len(kpis)) == (len(model.waiting), model.unknown, len(model.entries))
    summed = {}
    for arm, judged, name, value in model.sums:
        summed[arm, judged, name] = summed.get((arm, judged, name), Moments()).plus(Moments(1, value, value * value))
    assert {(key.arm, key.judged, key.name): found for key, found in kpis.totals().items()} == summed


@given(OPERATIONS)
def test_whatever_comes_the_store_stays_within_its_bounds(operations):
    kpis, now_s = store(capacity=2, max_pending=2), 0.0
    accepted = 0
    for operation in operations:
        match operation:
            case ("wait", seconds):
                now_s += seconds
            case ("serve", request_id, unit, arm, eligible):
                kpis.remember(request_id, served(unit, arm, now_s, eligible=eligible), now_s)
            case ("report", about, name, key, value):
                state = kpis.report(Reported(name, float(value), key=key, **about), now_s).state
                accepted += state in {State.JOINED, State.PENDING}
        counts = kpis.counts
        assert counts.joined + counts.pending + counts.unknown == accepted
        assert len(kpis) <= 2
        assert len(kpis._units) <= len(kpis)
        assert len(kpis._order) == 2 * len(kpis)
        assert max(len(kpis._known), len(kpis._known_order), len(kpis._early_order)) <= 2
        assert sum(map(len, kpis._early.values())) <= 2 * len(PREFIXES["digits"])
    kpis.advance(now_s + 1e6)
    assert (len(kpis), len(kpis._units), kpis._early, kpis.counts.pending) == (0, 0, {}, 0)
    assert sum(found.n for found in kpis.totals().values()) == kpis.counts.joined

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.exposure import ExposureError, parse_exposures, plain_exposures, with_caps
from extproc.core.flags import Exposure, Exposures, effective_percent, wanted_percent

PERCENTS = st.integers(0, 100_000).map(lambda n: Decimal(n) / 1000)
ENTRIES = st.builds(
    Exposure,
    salt=st.text(max_size=10),
    attempt=st.integers(0, 9),
    canary_version=st.none() | st.text(max_size=5),
    step=st.integers(0, 20),
    percent=PERCENTS,
    cap=st.sampled_from([0, 100]),
)


@given(st.integers(0, 10**9), st.dictionaries(st.text(max_size=10), ENTRIES, max_size=4))
def test_what_is_written_is_read_back(seq, flags):
    exposures = Exposures(seq, flags)
    assert parse_exposures(json.loads(json.dumps(plain_exposures(exposures, "test")))) == exposures


def test_an_entry_with_its_salt_alone_is_a_flag_at_zero_with_an_open_gate():
    parsed = parse_exposures({"seq": 3, "flags": {"digits": {"salt": "s", "from_the_future": 1}}, "more": []})
    assert parsed == Exposures(3, {"digits": Exposure(salt="s", attempt=0, step=0, percent=Decimal(0), cap=100)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "expected {seq"),
        ([], "expected {seq"),
        ({}, "expected {seq"),
        ({"seq": 1}, "expected {seq"),
        ({"seq": 1, "flags": []}, "expected {seq"),
        ({"flags": {}}, "seq: expected a whole number"),
        ({"seq": -1, "flags": {}}, "seq: expected a whole number"),
        ({"seq": 1.0, "flags": {}}, "seq: expected a whole number"),
        ({"seq": True, "flags": {}}, "seq: expected a whole number"),
        ({"seq": 1, "flags": {"d": {}}}, "flags.d: expected a mapping with the salt"),
        ({"seq": 1, "flags": {"d": 5}}, "flags.d: expected a mapping with the salt"),
        ({"seq": 1, "flags": {"d": {"salt": 5}}}, "flags.d: expected a mapping with the salt"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "cap": 50}}}, "flags.d.cap: the warm gate is 0 or 100, not 50"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "cap": None}}}, "flags.d.cap"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "cap": True}}}, "flags.d.cap"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": 101}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": -0.001}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": True}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": "many"}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": float("nan")}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": float("inf")}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "percent": [5]}}}, "flags.d.percent"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "attempt": -1}}}, "flags.d.attempt"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "step": "1"}}}, "flags.d.step"),
        ({"seq": 1, "flags": {"d": {"salt": "s", "canary_version": 2}}}, "flags.d.canary_version"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused_with_its_key(data, said):
    with pytest.raises(ExposureError, match="^" + said.replace("{", r"\{").replace(".", r"\.")):
        parse_exposures(data)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = ["salt", "attempt", "canary_version", "step", "percent", "cap"]


@given(ANYTHING | st.fixed_dictionaries({"seq": ANYTHING, "flags": st.dictionaries(st.text(max_size=3), st.dictionaries(
    st.sampled_from(KEYS), ANYTHING, max_size=6), max_size=2)}))  # fmt: skip
def test_whatever_stands_in_the_file_it_is_followed_or_refused(data):
    try:
        exposures = parse_exposures(data)
    except ExposureError:
        return
    assert all(0 <= exposure.percent <= 100 and exposure.cap in {0, 100} for exposure in exposures.flags.values())


def test_setting_a_cap_keeps_the_rest_and_counts_the_write():
    before = Exposures(7, {"a": Exposure(salt="s", attempt=2, step=1, percent=Decimal(5)), "b": Exposure(salt="t")})
    after = with_caps(before, {"a": ("s", 0)})
    assert after == Exposures(8, {"a": Exposure(salt="s", attempt=2, step=1, percent=Decimal(5), cap=0), "b": before.flags["b"]})  # fmt: skip  # noqa: E501  one value
    assert with_caps(after, {"a": ("s", 0), "b": ("t", 100)}) is after


def test_a_new_salt_begins_anew():
    before = Exposures(1, {"a": Exposure(salt="old", attempt=2, percent=Decimal(50))})
    assert with_caps(before, {"a": ("new", 0)}) == Exposures(2, {"a": Exposure(salt="new", cap=0)})


def test_a_flag_seen_first_gets_an_entry_of_its_own():
    assert with_caps(Exposures(), {"a": ("s", 100)}) == Exposures(1, {"a": Exposure(salt="s", cap=100)})


def test_the_effective_percentage_is_never_above_what_the_person_wrote_or_the_gate(build):
    closed, halfway = Exposure(salt="digits", cap=0, percent=Decimal(50)), Exposure(salt="digits", percent=Decimal(50))
    person, rollout = build.flag(percent=5), build.flag(percent=None)
    off = build.flag(percent=5, enabled=False)
    assert [effective_percent(person, entry) for entry in (None, closed, halfway)] == [5, 0, 5]
    assert [effective_percent(rollout, entry) for entry in (None, closed, halfway)] == [0, 0, 50]
    assert [wanted_percent(rollout, entry) for entry in (None, closed, halfway)] == [0, 50, 50]
    assert effective_percent(off, halfway) == 0

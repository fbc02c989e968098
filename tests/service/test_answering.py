"""What a process of serve reports to control, and to a control that was started again."""

import time
from types import SimpleNamespace

import pytest

from extproc.answering import SLICE, TELL_FOR_SENDS, Answering, Reports, units_by_flag
from extproc.core.decided import Decided, Key
from extproc.core.flags import Arm
from extproc.core.ruleset import Choice, Reason

KEY = Key("digits", "digits", "abc.1", "canary", "FORCED", "")


@pytest.fixture
def told():
    """Reports as they were sent, and the process that sends them."""
    reports, listener = [], ["first"]
    answering = Answering(
        metrics=SimpleNamespace(gauge=lambda *_, **__: None),
        answerer=SimpleNamespace(named=frozenset(), names={}),
        worker="w0",
        report=reports.append,
        warn=lambda *_: None,
        listener=lambda: listener[0],
    )
    answering._totals[KEY] = 7
    answering._changed[KEY] = 0
    for _ in range(TELL_FOR_SENDS + 5):
        answering._tell()
    return SimpleNamespace(answering=answering, reports=reports, listener=listener)


def test_a_count_that_does_not_change_is_told_for_a_while(told):
    assert told.reports[0].counts == {KEY: 7}
    assert told.reports[-1].counts == {}


def test_a_control_that_was_started_again_is_told_everything_once_more(told):
    """Otherwise the next forced request would bring all earlier ones with it, as if nobody had logged them."""
    told.listener[0] = "second"
    told.answering._tell()
    decided = Decided()
    decided.take(told.reports[-1])
    assert decided.by_flag() == {"digits": 7}


def test_a_listener_is_told_from_the_next_one_at_the_same_path(tmp_path):
    path = tmp_path / "counters.sock"
    reports = Reports(path)
    assert reports.listener() is None
    path.touch()
    first = reports.listener()
    assert first == reports.listener() is not None
    tick = path.with_name("tick")
    deadline_s = time.monotonic() + 30
    while True:  # no control is back within a tick of the file system's clock, which may be 10 ms long
        tick.touch()
        if tick.stat().st_mtime_ns > path.stat().st_mtime_ns:
            break
        assert time.monotonic() < deadline_s
    path.unlink()
    path.touch()
    assert reports.listener() not in (None, first)
    reports.close()


def test_units_that_came_once_are_left_out_of_a_busy_flag_and_kept_of_a_small_one():
    """A tenth of the small flag's requests are one unit's, of which a slice of the busy one's has one."""
    choices = [Choice(index, flag, flag, Arm.STABLE, Reason.SPLIT) for index, flag in enumerate(("busy", "small"))]
    busy = [0 << 32 | number for number in range(SLICE - 10 - 7)] + [0 << 32 | 4_000_000] * 7
    found = units_by_flag([*busy, *(1 << 32 | number for number in range(10))], choices)
    assert found["busy"] == ({4_000_000: 7}, SLICE - 10)
    assert found["small"] == (dict.fromkeys(range(10), 1), 10)


def test_units_of_a_choice_that_a_smaller_ruleset_does_not_have_are_counted_somewhere():
    choices = [Choice(0, "only", "only", Arm.STABLE, Reason.SPLIT)]
    assert units_by_flag([9 << 32 | 5], choices) == {"only": ({5: 1}, 1)}

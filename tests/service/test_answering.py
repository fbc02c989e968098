"""What a process of serve reports to control, and to a control that was started again."""

from types import SimpleNamespace

import pytest

from extproc.answering import TELL_FOR_SENDS, Answering, Reports
from extproc.core.decided import Decided, Key

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
    path.unlink()
    path.touch()
    assert reports.listener() not in (None, first)
    reports.close()

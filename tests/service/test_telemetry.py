"""The telemetry as a whole: outcomes in, and every part counts each of them once."""

from decimal import Decimal

import mmh3
from made import good_outcome

from extproc.core.flags import Exposure, Exposures, Flag
from extproc.core.kpis import Reported, State
from extproc.core.outcomes import Assignment
from extproc.core.windows import CellKey, SeriesKey
from extproc.telemetry import Steps, Telemetry

FLAG = Flag(key="digits", model="digits", salt="s", percent=Decimal(50))


def outcome(request_id, cohort="stable", **changed):
    assignment = Assignment("digits", "digits", cohort, "SPLIT", "", "abc.1")
    return good_outcome(assignment, **{"request_id": request_id, **changed})


def made(exposures=None, kept=lambda _version: None):
    telemetry = Telemetry(Steps(kept))
    telemetry.take_flags([FLAG], exposures or Exposures(1))
    return telemetry


def judged(telemetry, step=0, arm="stable"):
    telemetry.windows.settle()
    return telemetry.windows.cells[CellKey("digits", "", step, arm)].total()


def accuracy(telemetry):
    return {(key.arm, key.step, key.judged): moments.n for key, moments in telemetry.kpis.totals().items()}


def label(request_id):
    return Reported("accuracy", 1.0, request_id=request_id)


def test_each_part_counts_each_outcome():
    telemetry = made()
    telemetry.take([outcome("a"), outcome("b", status=500), outcome("c", "canary")], 10.0)
    assert judged(telemetry).requests == 2
    assert judged(telemetry, arm="canary").requests == 1
    assert telemetry.log.logged()[0].assigned == {"digits": 3}
    assert [telemetry.report(label(one), 11.0).state for one in "abc"] == [State.JOINED] * 3
    assert accuracy(telemetry) == {("stable", 0, True): 2, ("canary", 0, True): 1}


def test_outcomes_that_differ_in_one_thing_are_told_apart_whatever_came_before():
    kinds = {
        "plain": {},
        "other arm": {"served": "canary"},
        "fell back": {"arm": "canary", "assignment": Assignment("digits", "digits", "canary", "SPLIT", "", "abc.1")},
        "forced": {"assignment": Assignment("digits", "digits", "stable", "FORCED", "", "abc.1")},
        "no decision": {"assignment": None, "hash": None, "failed_open": True},
        "health": {"inference": False, "assignment": None},
        "other version": {"model_version": "2"},
        "nobody served": {"served": "", "status": 503},
    }
    alone = {}
    for name, changed in kinds.items():
        telemetry = made()
        telemetry.take([outcome("x", **changed)], 1.0)
        telemetry.windows.settle()
        alone[name] = {key: window.total() for key, window in telemetry.windows.shown.items()}
    together = made()
    for _ in range(2):
        together.take([outcome(name, **changed) for name, changed in kinds.items()], 1.0)
    together.windows.settle()
    for key, window in together.windows.shown.items():
        for count in ("requests", "fell_back", "mismatched", "failed_open", "served", "bad"):
            expected = 2 * sum(getattr(found[key], count) for found in alone.values() if key in found)
            assert getattr(window.total(), count) == expected, (key, count)


def test_a_label_for_a_request_that_the_client_gave_up_is_joined_and_not_judged():
    telemetry = made()
    telemetry.take([outcome("a"), outcome("gone", aborted=True, status=0)], 1.0)
    assert telemetry.report(label("gone"), 2.0).state is State.JOINED
    assert accuracy(telemetry) == {("stable", 0, False): 1}


def test_a_label_for_a_request_that_fell_back_is_not_stables():
    telemetry = made()
    telemetry.take([outcome("a", "canary", served="stable")], 1.0)
    telemetry.report(label("a"), 2.0)
    assert accuracy(telemetry) == {("stable", 0, False): 1}


def test_the_step_is_that_of_the_version_that_decided_not_of_now():
    telemetry = made(Exposures(1, {"digits": Exposure(salt="s", step=0)}))
    telemetry.take_exposures(Exposures(2, {"digits": Exposure(salt="s", step=1)}))
    new = Assignment("digits", "digits", "stable", "SPLIT", "", "abc.2")
    telemetry.take([outcome("late"), outcome("new", assignment=new)], 5.0)
    assert (judged(telemetry, 0).requests, judged(telemetry, 1).requests) == (1, 1)


def test_a_version_from_before_this_process_is_looked_up_once():
    asked = []

    def kept(version):
        asked.append(version)
        return Exposures(9, {"digits": Exposure(salt="s", step=4)})

    telemetry = made(kept=kept)
    old = Assignment("digits", "digits", "stable", "SPLIT", "", "abc.9")
    telemetry.take([outcome("a", assignment=old), outcome("b", assignment=old)], 1.0)
    assert judged(telemetry, 4).requests == 2
    assert asked == ["abc.9"]


def test_a_version_that_becomes_known_is_judged_from_then_on():
    telemetry = made()
    soon = Assignment("digits", "digits", "stable", "SPLIT", "", "abc.2")
    telemetry.take([outcome("a", assignment=soon)], 1.0)
    telemetry.take_exposures(Exposures(2, {"digits": Exposure(salt="s", step=1)}))
    telemetry.take([outcome("b", assignment=soon)], 2.0)
    assert judged(telemetry, 1).requests == 1
    assert telemetry.windows.shown[SeriesKey("digits", "stable", "1")].total().requests == 2


def test_a_unit_that_is_reported_is_found_by_the_flags_salt():
    telemetry = made(Exposures(1, {"digits": Exposure(salt="s", attempt=1)}))
    telemetry.take([outcome("a", hash=mmh3.hash("s#1:alice", 0, False))], 1.0)
    found = telemetry.report(Reported("buys", 1.0, unit="alice", flag="digits"), 2.0)
    assert found.state is State.JOINED
    assert telemetry.report(Reported("buys", 1.0, unit="bob", flag="digits"), 2.0).state is State.PENDING


def test_clocks_that_step_backwards_lose_nothing():
    telemetry = made()
    telemetry.take([outcome("a", ended_s=2000.0)], 100.0)
    telemetry.take([outcome("b", ended_s=-5.0)], 50.0)
    assert judged(telemetry).requests == 2
    assert telemetry.log.logged()[0].assigned == {"digits": 2}
    assert [telemetry.report(label(one), 40.0).state for one in "ab"] == [State.JOINED] * 2

"""Reconciliation against traffic whose truth is known: what was decided, sent and logged, and what went wrong."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.logcounts import SKEW_S, LogCounts
from extproc.core.outcomes import Assignment, Outcome
from extproc.core.reconcile import (
    ALERT_LEAST,
    EVERY_S,
    RECENT_S,
    Difference,
    Evidence,
    Reconciliation,
    Rises,
    Sent,
)

FLAGS = {"digits": "digits"}


def outcome(
    cohort="stable", *, served="stable", ended_s=1.0, attempts=1, answered=True, flag="digits", failed_open=False
):
    assignment = None if cohort is None else Assignment(flag, "digits", cohort, "SPLIT", "", "abc.1")
    return Outcome(
        assignment=assignment,
        hash=1,
        model="digits",
        arm=cohort or "stable",
        served=served,
        inference=True,
        failed_open=failed_open,
        status=200,
        attempts=attempts,
        deadline=False,
        aborted=False,
        upstream_ms=1.0 if answered else None,
        total_ms=2.0,
        model_version="1",
        predictions="",
        prediction_count=None,
        request_id="id",
        ended_s=ended_s,
    )


@dataclass
class World:
    """What really happens, and what each of the four counters sees of it."""

    log: LogCounts = field(default_factory=LogCounts)
    found: Reconciliation = field(default_factory=Reconciliation)
    decided: int = 0
    finished: int = 0
    under_way: int = 0
    began_s: float = 0.0
    processes: frozenset = frozenset({"w0"})
    envoy: bool = True

    def request(self, *, logged=True, reported=True, counted=True, now_s=1.0, **kind):
        """One request; each of its traces can be missing."""
        one = outcome(ended_s=now_s, **kind)
        self.decided += reported and one.assignment is not None
        self.finished += counted
        if logged:
            self.log.add(self.log.lane(one), one)

    def compare(self, *, later=0, between=0):
        """A comparison.

        `later` decisions became known while the log settled. `between` attempts ended at its instant: after Envoy's
        counters were read for the first time and before they were read again.
        """
        before, after = (
            Sent({"digits": finished}, self.under_way, self.began_s) if self.envoy else None
            for finished in (self.finished - between, self.finished)
        )
        self.found.compare(
            FLAGS,
            Evidence(
                {"digits": self.decided},
                {"digits": self.decided + later},
                self.processes,
                *self.log.logged(),
                before,
                after,
            ),
        )
        return self.found.differences["digits"]

    def alerts(self):
        """What is beyond the threshold now."""
        return self.found.lately()["digits"].alerts()


@pytest.fixture
def world():
    world = World()
    world.compare()
    return world


def test_requests_that_left_all_their_traces_reconcile(world):
    for _ in range(5):
        world.request()
    assert world.compare() == Difference(decided=5, assigned=5, served=5)


def test_entries_that_the_log_lost_are_missing_by_both_counts(world):
    for i in range(20):
        world.request(logged=i % 2 == 0)
    found = world.compare()
    assert (found.decided, found.assigned, found.lost) == (20, 10, 10)
    sentence = "10 of 20 requests of the last 5 minutes are missing in the access log; its numbers are incomplete"
    assert world.alerts() == {"lost": sentence}


def test_a_loss_shows_by_envoys_counters_alone_and_by_serves_alone(world):
    world.request(logged=False, reported=False)
    assert world.compare().lost == 1
    world.request(logged=False, counted=False)
    world.request(logged=False, counted=False)
    assert world.compare().lost == 2


def test_what_is_still_under_way_is_not_lost(world):
    world.under_way = 3
    for _ in range(3):
        world.request(logged=False)
    assert world.compare().lost == 0


def test_an_envoy_that_nobody_told_about_is_a_surplus(world):
    for _ in range(12):
        world.request(counted=False)
    found = world.compare()
    assert (found.surplus, found.lost) == (12, 0)
    assert "second Envoy" in world.alerts()["surplus"]


def test_a_serve_that_nobody_told_about_is_a_surplus(world):
    world.request(reported=False)
    assert world.compare().surplus == 1


def test_a_decision_that_was_reported_while_the_log_settled_excuses_its_entry(world):
    world.request(reported=False)
    assert world.compare(later=1).surplus == 0


def test_a_request_elsewhere_than_decided_is_mismatched_and_a_fall_back_is_not(world):
    world.request(cohort="stable", served="canary")
    world.request(cohort="canary", served="stable")
    assert world.compare().mismatched == 1


def test_a_fail_open_request_is_no_lost_decision(world):
    """Perch may have decided in vain: Envoy no longer waited for it."""
    world.decided += 1
    world.request(cohort=None)
    assert world.compare().lost == 0


def test_retries_are_attempts_and_no_lost_requests(world):
    world.request(attempts=3)
    world.finished += 2
    assert world.compare() == Difference(decided=1, assigned=1, served=1)


def test_a_host_that_refused_the_connection_was_not_sent_to_and_is_no_surplus(world):
    world.request(counted=False, answered=False, served="")
    assert world.compare().surplus == 0


def test_a_request_that_hung_until_its_deadline_was_sent_and_is_not_lost(world):
    for _ in range(20):
        world.request(answered=False, served="")
    assert world.compare() == Difference(decided=20, assigned=20)


def test_probes_of_the_server_as_a_whole_belong_to_the_model_that_answers_for_it():
    log = LogCounts()
    probe = outcome(None)._replace(model="", arm="", inference=False)
    log.add(log.lane(probe), probe)
    logged, _ = log.logged("digits")
    assert (logged.answered, logged.attempts, logged.served) == ({"digits": 1}, {"digits": 1}, {"digits": 0})


def test_what_was_decided_and_reported_late_before_the_first_comparison_is_not_lost():
    """It ran under traffic: the log knew of 40 requests whose decisions were not reported yet."""
    world = World()
    for _ in range(40):
        world.request(reported=False)
    world.compare(later=40)
    world.decided += 40
    assert world.compare().lost == 0


@pytest.mark.parametrize("logged", [True, False])
def test_what_ended_at_the_very_instant_of_the_first_comparison_is_neither_lost_nor_surplus(logged):
    world = World()
    for _ in range(12):
        world.request(logged=logged, reported=False)
    world.compare(between=12)
    for _ in range(0 if logged else 12):
        world.request(counted=False)
    found = world.compare()
    assert (found.lost, found.surplus) == (0, 0)


@pytest.mark.parametrize("logged", [True, False])
def test_what_ends_at_the_very_instant_of_a_comparison_is_neither_lost_nor_surplus(world, logged):
    for _ in range(12):
        world.request(logged=logged, reported=logged)
    found = world.compare(between=12)
    assert (found.lost, found.surplus) == (0, 0)


def test_what_was_under_way_during_the_first_comparison_is_no_surplus():
    world = World(decided=30, under_way=30)
    world.compare()
    world.under_way = 0
    for _ in range(30):
        world.request(reported=False)
    assert world.compare().surplus == 0


def test_decisions_of_while_the_log_settled_for_the_first_time_are_no_surplus():
    world = World()
    world.compare(later=50)
    for _ in range(50):
        world.request()
    assert world.compare().surplus == 0


def test_decisions_are_counted_from_what_was_logged_when_the_first_comparison_was_made():
    """A control that was started again knows serve's counts of all time, and the log's since then."""
    world = World(decided=1000, finished=1000)
    for _ in range(3):
        world.request()
    world.compare()
    world.request()
    assert world.compare() == Difference(decided=4, assigned=4, served=4)


def test_what_came_before_the_first_comparison_is_nobodys_loss():
    world = World(decided=500, finished=700)
    assert world.compare().lost == 0
    world.request(logged=False)
    assert world.compare().lost == 1


def test_a_restarted_envoy_keeps_what_was_lost_and_is_not_held_against_the_log(world):
    for _ in range(4):
        world.request(logged=False)
    assert world.compare().lost == 4
    for _ in range(50):
        world.request()
    world.finished = 1  # it began again, and nobody read what it had counted in the end
    found = world.compare()
    assert (found.lost, found.surplus) == (4, 0)
    world.request(logged=False)
    assert world.compare().lost == 5


def test_another_envoy_is_told_by_when_it_began_also_when_it_has_counted_more(world):
    for _ in range(5):
        world.request()
    world.compare()
    for _ in range(50):  # logged, and counted by the Envoy that is gone
        world.request(counted=False)
    world.finished, world.began_s = 8, 100.0
    assert world.compare().surplus == 0
    world.began_s = 101.5  # whole seconds of its age
    world.request(counted=False)
    assert world.compare().surplus == 1


def test_a_serve_that_fell_silent_with_unreported_decisions_is_no_surplus(world):
    for _ in range(30):
        world.request(reported=False)
    world.processes = frozenset()
    assert world.compare().surplus == 0
    world.request(reported=False)
    assert world.compare().surplus == 1


def test_a_serve_that_died_with_unreported_decisions_is_no_surplus(world):
    for _ in range(30):
        world.request(reported=False)
    world.processes = frozenset({"w0", "w0 again"})
    assert world.compare().surplus == 0


def test_a_comparison_without_envoys_answer_tells_nothing_and_the_next_one_finds_what_was_lost_meanwhile(world):
    world.envoy = False
    for _ in range(20):
        world.request(logged=False)
    assert world.compare() == Difference()
    world.envoy = True
    assert world.compare().lost == 20


def test_what_was_lost_shortly_before_a_process_of_serve_died_is_found_by_envoys_counters(world):
    for _ in range(20):
        world.request(logged=False)
    world.processes = frozenset({"w0 again"})
    assert world.compare().lost == 20
    world.request(logged=False)
    assert world.compare().lost == 21


def test_what_was_lost_shortly_before_envoy_died_is_found_by_serves_decisions(world):
    for i in range(50):
        world.request(logged=i >= 20)
    world.finished, world.began_s = 0, 100.0
    assert world.compare().lost == 20
    for _ in range(30):
        world.request(logged=False)
    assert world.compare().lost == 50


def test_an_envoy_that_began_again_between_the_two_readings_of_its_counters_is_not_held_against_the_log(world):
    world.request()
    before, after = Sent({"digits": 5_000}), Sent({"digits": 1}, began_s=100.0)
    decided = {"digits": world.decided}
    evidence = Evidence(decided, decided, world.processes, *world.log.logged(), before, after)
    assert world.found.compare(FLAGS, evidence)
    for _ in range(40):
        world.request()
    world.finished, world.began_s = 41, 100.0
    found = world.compare()
    assert (found.lost, found.surplus) == (0, 0)


def test_a_loss_and_a_surplus_do_not_make_good_for_each_other(world):
    for _ in range(20):
        world.request(logged=False)
    world.compare()
    for _ in range(30):
        world.request(counted=False)
    found = world.compare()
    assert (found.lost, found.surplus) == (20, 30)
    for _ in range(40):
        world.request(logged=False)
    found = world.compare()
    assert (found.lost, found.surplus) == (60, 30)


def test_a_steady_loss_is_found_although_each_comparison_is_blurred_by_more_than_was_lost_in_it(world):
    for _ in range(20):
        for i in range(100):
            world.request(logged=i >= 5)
        found = world.compare(later=30, between=15)
    assert 100 - 15 <= found.lost <= 100
    assert found.surplus == 0


def test_a_decision_in_vain_that_comes_to_be_known_after_the_entry_of_its_request_is_not_lost(world):
    """Serve is overloaded: Envoy went on without it, and it decides what it finds in its queue all the same."""
    for _ in range(30):
        world.request(cohort=None, failed_open=True)
    world.compare()
    world.decided += 30
    assert world.compare().lost == 0
    world.compare()
    world.request(logged=False, counted=False)
    assert world.compare().lost == 1


def test_decided_is_what_the_log_has_and_what_it_owes_also_where_counting_began_under_traffic():
    world = World(decided=1_000, finished=1_000, under_way=7)
    world.compare(later=40, between=9)
    world.decided += 40
    world.under_way = 0
    for _ in range(500):
        world.request()
    found = world.compare()
    assert (found.decided, found.assigned, found.lost) == (500, 500, 0)


def test_requests_that_failed_open_are_counted_and_alarm(world):
    for i in range(30):
        world.request(cohort=None if i < 12 else "stable", failed_open=i < 12)
    assert world.compare() == Difference(decided=18, assigned=18, served=30, failed_open=12)
    assert list(world.alerts()) == ["failed_open"]
    assert world.alerts()["failed_open"].startswith("12 of 30 requests of the last 5 minutes got stable")


def test_an_alert_ends_when_nothing_has_come_for_a_while_and_what_was_found_stays(world):
    for _ in range(30):
        world.request(logged=False)
    for _ in range(int(RECENT_S / EVERY_S)):
        world.compare()
        assert list(world.alerts()) == ["lost"]
    found = world.compare()
    assert found.lost == 30
    assert world.alerts() == {}


def test_a_loss_alarms_also_after_millions_of_requests_that_were_all_logged(world):
    world.decided = world.finished = 10_000_000
    world.log.lane(outcome()).until.n = world.log.lane(outcome()).until.attempts = 10_000_000
    for _ in range(int(RECENT_S / EVERY_S) + 1):
        assert world.compare().lost == 0
    for i in range(1_000):
        world.request(logged=i >= 20)
    world.compare()
    assert list(world.alerts()) == ["lost"]


def test_a_flag_that_is_new_is_alarmed_about_nothing_of_before(world):
    for _ in range(50):
        world.request(cohort="stable", served="canary", flag="other")
    world.compare()
    evidence = Evidence({}, {}, world.processes, *world.log.logged(), Sent(), Sent())
    world.found.compare(FLAGS | {"other": "digits"}, evidence)
    assert world.found.differences["other"].mismatched == 50
    assert world.found.lately()["other"].alerts() == {}


def test_a_few_differences_are_shown_and_alarm_nobody(world):
    for i in range(1000):
        world.request(logged=i >= ALERT_LEAST - 1)
    found = world.compare()
    assert found.lost == ALERT_LEAST - 1
    assert world.alerts() == {}


def test_among_many_requests_a_thousandth_alarms():
    assert not Difference(decided=100_000, assigned=99_901, lost=99).alerts()
    assert Difference(decided=100_000, assigned=99_900, lost=100).alerts()


def test_the_log_is_read_as_of_the_cut_and_whole_again_after_it():
    log = LogCounts()
    lane = log.lane(outcome())
    log.add(lane, outcome(ended_s=9.0))
    log.cut(10.0)
    log.add(lane, outcome(ended_s=9.5))
    log.add(lane, outcome(ended_s=10.0 + 2 * SKEW_S, attempts=2))
    for logged in log.logged():
        assert (logged.assigned, logged.attempts) == ({"digits": 2}, {"digits": 2})
    log.join()
    for logged in log.logged():
        assert (logged.assigned, logged.attempts) == ({"digits": 3}, {"digits": 4})


def test_what_ended_so_near_to_the_cut_that_clocks_may_differ_may_have_ended_on_either_side():
    log = LogCounts()
    log.cut(10.0)
    for ended_s in (10.0 - 2 * SKEW_S, 10.0 - SKEW_S / 2, 10.0 + SKEW_S / 2, 10.0 + 2 * SKEW_S):
        log.add(log.lane(outcome()), outcome(ended_s=ended_s))
    least, most = log.logged()
    assert (least.assigned, most.assigned) == ({"digits": 1}, {"digits": 3})


def risen(*bounds):
    found = Rises()
    for least, most in bounds:
        found.add(least, most)
    return found.total


def test_a_fall_makes_not_good_for_a_rise_before_it_or_after_it():
    assert risen((0, 0), (20, 20), (5, 5), (25, 25)) == 40


def test_jitter_of_the_bounds_does_not_add_up():
    assert risen(*[(0, 0), (ALERT_LEAST - 1, ALERT_LEAST - 1)] * 50) == ALERT_LEAST - 1


def test_a_rise_counts_from_where_the_number_surely_was_before_it():
    assert risen((0, 30), (20, 60), (45, 80)) == 15


STEP = st.just(0) | st.integers(ALERT_LEAST, 40) | st.integers(-40, -ALERT_LEAST)


@given(st.lists(st.tuples(STEP, st.integers(0, 30), st.integers(0, 30), st.booleans()), max_size=30))
def test_no_more_rise_is_found_than_there_was_and_all_of_it_where_the_number_is_known(steps):
    found, exact, at, truth = Rises(), Rises(), 0, 0
    found.add(0, 0)
    exact.add(0, 0)
    for step, below, above, again in steps:
        at += step
        truth += max(0, step)
        if again:
            found.begin_again()
        found.add(at - below, at + above)
        exact.add(at, at)
        assert found.total <= truth
        assert exact.total == truth


KINDS = st.fixed_dictionaries(
    {
        "cohort": st.sampled_from(("stable", "canary", None)),
        "served": st.sampled_from(("stable", "canary")),
        "logged": st.sampled_from((True, True, False)),
        "reported": st.sampled_from((True, True, True)),
    }
)


@given(st.lists(st.lists(KINDS, max_size=10), max_size=6))
def test_without_traffic_during_the_comparison_loss_and_mismatch_are_exact(rounds):
    world, lost, mismatched = World(), 0, 0
    world.compare()
    for requests in rounds:
        for kind in requests:
            world.request(**kind)
            lost += not kind["logged"]
            cohort, served = kind["cohort"], kind["served"]
            mismatched += kind["logged"] and (cohort, served) == ("stable", "canary")
        found = world.compare()
        assert (found.lost, found.surplus, found.mismatched) == (lost, 0, mismatched)

"""Reconciliation against traffic whose truth is known: what was decided, sent and logged, and what went wrong."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.outcomes import Assignment, Outcome
from extproc.core.reconcile import ALERT_LEAST, Difference, Evidence, LogCounts, Reconciliation, Sent

FLAGS = {"digits": "digits"}


def outcome(cohort="stable", *, served="stable", ended_s=1.0, attempts=1, answered=True, flag="digits"):
    assignment = None if cohort is None else Assignment(flag, "digits", cohort, "SPLIT", "", "abc.1")
    return Outcome(
        assignment=assignment,
        hash=1,
        model="digits",
        arm=cohort or "stable",
        served=served,
        inference=True,
        failed_open=cohort is None,
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
                self.log.logged(),
                before,
                after,
            ),
        )
        return self.found.differences["digits"]


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
    assert found.alerts() == ("10 of 20 requests are missing in the access log; its numbers are incomplete",)


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
    assert "second Envoy" in found.alerts()[0]


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
    logged = log.logged("digits")
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


def test_without_envoys_answer_serve_and_log_are_compared_alone(world):
    world.envoy = False
    world.compare()
    world.request(logged=False)
    world.request(counted=False)
    found = world.compare()
    assert (found.lost, found.surplus) == (1, 0)


def test_a_few_differences_are_shown_and_alarm_nobody(world):
    for i in range(1000):
        world.request(logged=i >= ALERT_LEAST - 1)
    found = world.compare()
    assert found.lost == ALERT_LEAST - 1
    assert found.alerts() == ()


def test_among_many_requests_a_thousandth_alarms():
    assert Difference(decided=100_000, assigned=99_901, lost=99).alerts() == ()
    assert Difference(decided=100_000, assigned=99_900, lost=100).alerts()


def test_the_log_is_read_as_of_the_cut_and_whole_again_after_it():
    log = LogCounts()
    lane = log.lane(outcome())
    log.add(lane, outcome(ended_s=9.0))
    log.cut(10.0)
    log.add(lane, outcome(ended_s=10.0))
    log.add(lane, outcome(ended_s=10.1, attempts=2))
    logged = log.logged()
    assert (logged.assigned, logged.attempts) == ({"digits": 2}, {"digits": 2})
    log.join()
    assert (log.logged().assigned, log.logged().attempts) == ({"digits": 3}, {"digits": 4})


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

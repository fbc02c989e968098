"""The cohorts of a flag as `GET /v1/status` has them: programs rely on the keys, people on the numbers."""

import itertools
import json
import random
from dataclasses import asdict
from decimal import Decimal

import pytest
from made import good_outcome

from extproc.cohorts import TOP, cohorts_of, percentiles, plain_drift
from extproc.core.drift import Drift
from extproc.core.flags import Exposure, Exposures, Flag
from extproc.core.kpis import Reported
from extproc.core.outcomes import Assignment
from extproc.core.predictions import REFERENCE_VOTES
from extproc.core.reconcile import Difference
from extproc.core.windows import RECENT_S, Tally
from extproc.statustable import predictions_of
from extproc.telemetry import Steps, Telemetry

IDS = itertools.count()


def outcome(cohort="stable", flag="digits", **changed):
    """An inference request that went well, served as assigned, unless told otherwise."""
    reason, version = changed.pop("reason", "SPLIT"), changed.pop("version", "abc.1")
    assignment = Assignment(flag, "digits", cohort, reason, "", version)
    return good_outcome(assignment, **{"hash": next(IDS), **changed})


class Seen:
    """A telemetry, and the seconds that have ended."""

    def __init__(self, kind="auto"):
        flags = [Flag(key=key, model="digits", salt=key, percent=Decimal(50)) for key in ("digits", "wine")]
        at_step = {
            version: Exposures(1, {"digits": Exposure(salt="digits", step=n)}) for n, version in enumerate("abc")
        }
        self.telemetry = Telemetry(Steps(lambda version: at_step.get(version, Exposures())), {"digits": kind})
        self.telemetry.take_flags(flags, Exposures())
        self.now = 0

    def take(self, *outcomes):
        """Outcomes in the second that has begun."""
        self.telemetry.take(outcomes, self.now)

    def second(self, n=1):
        """Ends seconds."""
        for _ in range(n):
            self.now += 1
            self.telemetry.windows.roll(self.now)

    def status(self, flag="digits"):
        """The flag's part, as JSON carries it."""
        found = cohorts_of(self.telemetry, flag)
        return json.loads(json.dumps(found, allow_nan=False))


@pytest.fixture
def seen():
    return Seen()


def test_a_flag_without_requests_has_none_of_the_keys(seen):
    assert seen.status() == {}
    seen.take(outcome(flag="wine"), outcome(inference=False))
    assert seen.status() == {}


def test_the_keys_are_those_that_programs_rely_on(seen):
    one = outcome("canary")
    seen.take(outcome(), one)
    seen.telemetry.report(Reported("accuracy", 1.0, one.request_id), 0)
    status = seen.status()
    assert status.keys() == {"cohorts", "drift", "kpis"}
    assert status["cohorts"].keys() == {"stable", "canary"}
    documented = {"requests", "errors", "fell_back", "p50_ms", "p95_ms", "p99_ms", "predictions"}
    for row in status["cohorts"].values():
        more = {"share", "errors_by_class", "mismatched", "aborted", "model_versions", "last_minute"}
        more |= {"prediction_kind", "learning"}
        assert row.keys() == documented | more
        assert row["last_minute"].keys() == {"requests_per_s", "error_rate", "p50_ms", "p95_ms", "p99_ms"}
    assert status["drift"].keys() == {"js", "wasserstein_sd", "psi", "ks", "n", "n_stable"}
    assert asdict(Difference()).keys() >= {"decided", "assigned", "served", "lost", "mismatched"}


def test_requests_errors_and_fall_backs_belong_to_the_cohort_that_was_assigned(seen):
    seen.take(
        *(outcome() for _ in range(6)),
        outcome(status=500),
        outcome("canary"),
        outcome("canary", status=503),
        outcome("canary", deadline=True, status=504),
        outcome("canary", status=0, served=""),
        outcome("canary", served="stable"),
        outcome("canary", served="stable", status=500),
        outcome(served="canary"),
        outcome("canary", aborted=True),
    )
    stable, canary = (seen.status()["cohorts"][arm] for arm in ("stable", "canary"))
    assert (stable["requests"], stable["errors"], stable["fell_back"], stable["mismatched"]) == (8, 1, 0, 1)
    assert (canary["requests"], canary["errors"], canary["fell_back"], canary["aborted"]) == (6, 4, 2, 1)
    assert canary["errors_by_class"] == {"5xx": 2, "deadline": 1, "no_answer": 1}
    assert (stable["share"], canary["share"]) == (round(8 / 14, 5), round(6 / 14, 5))


def test_latencies_and_predictions_are_of_what_the_cohort_also_served(seen):
    seen.take(
        *(outcome("canary", total_ms=10.0, predictions="cat") for _ in range(3)),
        *(outcome("canary", served="stable", total_ms=5_000.0, predictions="dog") for _ in range(9)),
    )
    row = seen.status()["cohorts"]["canary"]
    assert row["p99_ms"] == pytest.approx(10, rel=0.02)
    assert row["predictions"] == {"cat": 3}


def test_a_cohort_that_only_fell_back_has_no_percentiles(seen):
    seen.take(outcome("canary", served="stable"))
    row = seen.status()["cohorts"]["canary"]
    assert (row["p50_ms"], row["p99_ms"], row["predictions"]) == (None, None, {})


def test_percentiles_are_within_two_percent_of_the_ranks(seen):
    draw = random.Random(2)
    times = sorted(draw.lognormvariate(3, 1) for _ in range(2_000))
    seen.take(*(outcome(total_ms=ms) for ms in draw.sample(times, len(times))))
    row = seen.status()["cohorts"]["stable"]
    for name, rank in (("p50_ms", 1_000), ("p95_ms", 1_900), ("p99_ms", 1_980)):
        assert row[name] == pytest.approx(times[rank - 1], rel=0.02)
    assert percentiles(Tally()) == {"p50_ms": None, "p95_ms": None, "p99_ms": None}


def test_everybody_is_shown_not_only_who_may_be_judged(seen):
    seen.take(outcome("canary", reason="FORCED"), outcome(reason="NO_UNIT", hash=None), outcome(version="unknown.7"))
    assert {arm: row["requests"] for arm, row in seen.status()["cohorts"].items()} == {"stable": 2, "canary": 1}


def test_the_last_minute_ends_and_the_totals_stay(seen):
    seen.take(*(outcome(status=500, total_ms=100.0) for _ in range(30)), *(outcome(total_ms=100.0) for _ in range(30)))
    seen.second(10)
    minute = seen.status()["cohorts"]["stable"]["last_minute"]
    assert minute["requests_per_s"] == 6.0  # in the ten seconds that there were
    assert minute["error_rate"] == 0.5
    assert minute["p50_ms"] == pytest.approx(100, rel=0.02)
    seen.second(RECENT_S - 10)
    assert seen.status()["cohorts"]["stable"]["last_minute"]["requests_per_s"] == 1.0
    seen.second()
    row = seen.status()["cohorts"]["stable"]
    empty = {"requests_per_s": 0.0, "error_rate": None, "p50_ms": None, "p95_ms": None, "p99_ms": None}
    assert row["last_minute"] == empty
    assert (row["requests"], row["errors"]) == (60, 30)
    assert row["p50_ms"] == pytest.approx(100, rel=0.02)


def test_a_second_that_has_not_ended_is_in_it_already(seen):
    seen.take(outcome(), outcome())
    assert seen.status()["cohorts"]["stable"]["requests"] == 2
    seen.second()
    seen.take(outcome())
    assert seen.status()["cohorts"]["stable"]["requests"] == 3


def test_every_model_version_that_answered_is_listed(seen):
    seen.take(
        outcome(model_version="1"), outcome(model_version="2"), outcome(model_version="2"), outcome(model_version="")
    )
    assert seen.status()["cohorts"]["stable"]["model_versions"] == {"1": 1, "2": 2, "none": 1}


def test_only_the_most_frequent_predictions_are_listed_most_frequent_first(seen):
    for n in range(TOP + 10):
        seen.take(*(outcome(predictions=f"label%20{n}") for _ in range(n + 1)))
    predictions = seen.status()["cohorts"]["stable"]["predictions"]
    assert list(predictions.items()) == [(f"label {n}", n + 1) for n in reversed(range(10, TOP + 10))]


def test_predictions_that_are_labels_are_listed_from_the_first_on_and_nothing_is_learned(seen):
    seen.take(outcome(predictions="7"))
    row = seen.status()["cohorts"]["stable"]
    assert (row["predictions"], row["prediction_kind"], row["learning"]) == ({"7": 1}, "labels", False)
    assert predictions_of(row) == "7 100 %"


@pytest.mark.parametrize("kind", ["numbers", "auto"])
def test_of_numbers_nothing_is_listed_before_their_ranges_are_known_and_people_are_told_why(kind):
    seen, draw = Seen(kind), random.Random(4)
    for _ in range(REFERENCE_VOTES - 1):
        seen.take(outcome(predictions=f"{draw.gauss(0, 1):.6g}"))
    seen.take(outcome("canary", predictions="-0.000454214"))
    assert "0.000454214" not in json.dumps(seen.status())
    for row in seen.status()["cohorts"].values():
        assert (row["predictions"], row["prediction_kind"], row["learning"]) == ({}, "numbers", True)
        assert predictions_of(row) == "(learning ranges)"
    seen.take(outcome(predictions="0.5"))
    for row in seen.status()["cohorts"].values():
        assert (row["prediction_kind"], row["learning"]) == ("numbers", False)
        assert sum(row["predictions"].values()) in {1, REFERENCE_VOTES}


def test_numbers_that_are_compared_nowhere_are_not_listed_either():
    for kind in ("numbers", "auto"):
        seen = Seen(kind)
        seen.take(outcome("canary", reason="FORCED", predictions="0.8125"))
        assert "0.8125" not in json.dumps(seen.status())


@pytest.mark.parametrize("n", [3, REFERENCE_VOTES + 5])
@pytest.mark.parametrize("reason", ["SPLIT", "FORCED"])
def test_of_vectors_nothing_is_listed_ever(n, reason):
    seen = Seen("vector")
    for arm in ("stable", "canary"):
        seen.take(*(outcome(arm, reason=reason, predictions="0.8125,-3,17") for _ in range(n)))
    seen.second()
    status = seen.status()
    assert "8125" not in json.dumps(status)
    for row in status["cohorts"].values():
        assert (row["predictions"], row["prediction_kind"], row["learning"]) == ({}, "vector", False)
        assert predictions_of(row) == "(vectors)"
    assert ("drift" in status) == (reason == "SPLIT")


def test_predictions_that_are_numbers_are_listed_as_ranges_once_there_are_enough(seen):
    draw = random.Random(4)
    for _ in range(3_000):
        seen.take(
            outcome(predictions=f"{draw.gauss(0, 1):.6g}"), outcome("canary", predictions=f"{draw.gauss(2, 1):.6g}")
        )
    seen.second()
    status = seen.status()
    for arm in ("stable", "canary"):
        predictions = status["cohorts"][arm]["predictions"]
        assert 1 < len(predictions) <= TOP
        assert sum(predictions.values()) == 3_000
    assert status["drift"]["wasserstein_sd"] == pytest.approx(1.9, abs=0.3)  # 2, but for what lies beyond the last bin


def test_drift_is_of_the_highest_step_and_there_once_both_arms_predicted(seen):
    seen.take(outcome(predictions="cat"), outcome(predictions="dog"))
    assert "drift" not in seen.status()
    seen.take(outcome("canary", predictions="cat"))
    assert seen.status()["drift"]["ks"] == 0.5
    seen.take(outcome(predictions="cat", version="c"), outcome("canary", predictions="cat", version="c"))
    drift = seen.status()["drift"]
    assert (drift["ks"], drift["js"], drift["n"], drift["n_stable"]) == (0.0, 0.0, 1, 1)


def test_drift_is_rounded_to_what_is_read_and_keeps_what_is_not_defined():
    found = plain_drift(Drift(js=0.123456, wasserstein_sd=None, psi=-0.000001, ks=1.0, n_stable=7, n_canary=5))
    assert found == {"js": 0.12346, "wasserstein_sd": None, "psi": -0.0, "ks": 1.0, "n": 5, "n_stable": 7}


def test_reported_values_are_summed_over_steps_by_who_served_and_only_of_what_may_be_judged(seen):
    first, second = outcome("canary", version="a"), outcome("canary", version="b")
    fell_back, forced = outcome("canary", served="stable"), outcome("canary", reason="FORCED")
    seen.take(first, second, fell_back, forced, outcome())
    for one, value in ((first, 1.0), (second, 0.5), (fell_back, 0.0), (forced, 0.0)):
        seen.telemetry.report(Reported("accuracy", value, one.request_id), 0)
    assert seen.status()["kpis"] == {"accuracy": {"canary": {"n": 2, "mean": 0.75}}}
    assert "kpis" not in seen.status("wine")


def test_flags_know_nothing_of_each_other(seen):
    seen.take(*(outcome() for _ in range(3)), outcome(flag="wine", predictions="red"))
    assert seen.status("wine")["cohorts"]["stable"]["requests"] == 1
    assert seen.status("wine")["cohorts"]["stable"]["predictions"] == {"red": 1}
    assert seen.status("wine")["cohorts"]["stable"]["share"] == 1.0

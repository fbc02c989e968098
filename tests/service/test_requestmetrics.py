"""perch.request.*: what telemetry becomes as StatsD lines and as Prometheus text, whatever the traffic holds."""
# ruff: noqa: D102  methods here are named after what they do

import contextlib
import itertools
import random
import shutil
import socket
import subprocess
from collections import Counter
from decimal import Decimal

import pytest
from made import good_outcome
from prometheus_client.parser import text_string_to_metric_families

from extproc.accesslog import Counts as LogCounts
from extproc.core.flags import Exposures, Flag
from extproc.core.kpis import Reported
from extproc.core.latency import bin_of, edge_of, value_of
from extproc.core.outcomes import Assignment
from extproc.core.reconcile import Difference
from extproc.core.windows import MAX_SERIES, SeriesKey
from extproc.metricnames import BY_NAME, Kind
from extproc.metrics import Metrics
from extproc.requestmetrics import (
    BUCKETS,
    DRIFTS_A_SECOND,
    MAX_HISTOGRAMS,
    MAX_KPIS,
    MAX_LABELLED,
    MAX_VALUE,
    REPEAT_S,
    TIMED,
    RequestMetrics,
    expected,
    tag_of,
)
from extproc.telemetry import Steps, Telemetry

IDS = itertools.count()


def outcome(flag="digits", cohort="stable", **changed):
    """An inference request that went well, served as assigned, unless told otherwise."""
    return good_outcome(Assignment(flag, "digits", cohort, "SPLIT", "", "abc.1"), **changed)


class Heard:
    """Stands for StatsD: what it was told, by kind. A counter is the sum of what was sent."""

    def __init__(self):
        self.counters, self.gauges, self.timers = Counter(), {}, {}
        self.calls = Counter()

    def count(self, name, n=1, **tags):
        assert isinstance(n, int)
        assert n > 0
        self._check(name, Kind.COUNTER, tags)
        self.counters[name, *tags.values()] += n

    def gauge(self, name, value, **tags):
        self._check(name, Kind.GAUGE, tags)
        self.gauges[name, *tags.values()] = value

    def timings(self, name, ms, seen, **tags):
        self._check(name, Kind.TIMER, tags)
        self.timers.setdefault((name, *tags.values()), []).append((list(ms), seen))

    def _check(self, name, kind, tags):
        self.calls[name] += 1
        assert BY_NAME[name].kind is kind
        assert tuple(tags) == BY_NAME[name].tags
        assert all(isinstance(value, str) for value in tags.values())


class Bench:
    """A telemetry with everything that makes samples of it, and the seconds that have ended."""

    def __init__(self, *flags, kind="auto"):
        self.telemetry = Telemetry(Steps(lambda _version: Exposures()), {"digits": kind})
        made = [Flag(key=key, model="digits", salt=key, percent=Decimal(50)) for key in flags or ("digits",)]
        self.telemetry.take_flags(made, Exposures())
        self.log, self.differences = LogCounts(), {}
        self.metrics = RequestMetrics(self.telemetry, self.log, lambda: self.differences)
        self.heard = Heard()
        self.now = 1_000

    def take(self, *outcomes):
        self.telemetry.take(outcomes, self.now)

    def second(self, n=1):
        for _ in range(n):
            self.now += 1
            self.metrics.second(self.now, self.heard)
        return self.heard

    def scrape(self):
        """Every sample of `GET /metrics`, parsed: (name, label values in the order of their names) to value."""
        found = {}
        for family in text_string_to_metric_families(self.metrics.prometheus().decode()):
            for sample in family.samples:
                key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
                assert key not in found, f"twice: {key}"
                found[key] = sample.value
        return found


@pytest.fixture
def bench():
    return Bench()


class StatsD:
    """A real Metrics and the socket that it sends to; `sums` adds up the values of each (name, tags)."""

    def __init__(self, listener):
        self.listener, self.sums = listener, Counter()
        self.metrics = Metrics(f"127.0.0.1:{listener.getsockname()[1]}")

    def lines(self):
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found += self.listener.recv(65_536).decode().splitlines()
        for line in found:
            head, _, tags = line.partition("|#")
            name, _, value = head.partition("|")[0].rpartition(":")
            self.sums[name, tags] += float(value)
        return found


@pytest.fixture
def statsd():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        made = StatsD(listener)
        yield made
        made.metrics.close()


def test_statsd_and_prometheus_count_the_same_of_every_class(bench):
    bench.take(
        *(outcome() for _ in range(5)),
        outcome(status=503),
        outcome(status=0, served="", upstream_ms=None),
        outcome(cohort="canary", deadline=True, status=504),
        outcome(cohort="canary", served="stable"),
        outcome(cohort="stable", served="canary"),
        outcome(aborted=True),
        outcome(failed_open=True)._replace(assignment=None, hash=None),
        outcome(inference=False),
    )
    heard = bench.second()
    scraped = bench.scrape()
    wanted = {
        ("count", "digits", "stable", "1"): 8,
        ("count", "digits", "canary", "1"): 2,
        ("count", "none", "none", "1"): 1,
        ("errors", "digits", "stable", "1", "5xx"): 1,
        ("errors", "digits", "stable", "1", "no_answer"): 1,
        ("errors", "digits", "canary", "1", "deadline"): 1,
        ("fell_back", "digits", "canary", "1"): 1,
        ("mismatched", "digits", "stable", "1"): 1,
        ("aborted", "digits", "stable", "1"): 1,
        ("failed_open", "none", "none", "1"): 1,
    }
    of_series = {"count", "errors", "fell_back", "mismatched", "aborted", "failed_open"}
    told = {(name.removeprefix("request."), *tags): n for (name, *tags), n in heard.counters.items()}
    assert {key: n for key, n in told.items() if key[0] in of_series} == wanted
    for (name, *tags), n in wanted.items():
        labels = dict(zip(BY_NAME[f"request.{name}"].tags, tags, strict=True))
        assert scraped[f"perch_request_{name}_total", *(value for _, value in sorted(labels.items()))] == n
    assert sum(n for key, n in scraped.items() if key[0] == "perch_request_count_total") == 11


def test_a_counter_of_a_series_is_there_at_0_before_it_grows_and_statsd_does_not_hear_of_it(bench):
    bench.take(outcome(), outcome(cohort="canary", model_version="2"))
    heard, scraped = bench.second(), bench.scrape()
    for series in (("stable", "digits", "1"), ("canary", "digits", "2")):
        assert scraped["perch_request_count_total", *series] == 1
        for error in ("5xx", "deadline", "no_answer"):
            assert scraped["perch_request_errors_total", error, *series] == 0
        for name in ("fell_back", "failed_open", "mismatched", "aborted"):
            assert scraped[f"perch_request_{name}_total", *series] == 0
    for what in ("unknown_version", "cells", "groups", "series", "kpi_requests", "timers"):
        assert scraped["perch_request_dropped_total", what] == 0
    assert {name for name, *_ in heard.counters} == {"request.count", "request.predictions"}


def test_an_arm_that_is_served_is_there_at_0_before_its_first_request(bench):
    before = bench.scrape()
    bench.take(*(outcome(cohort="canary", status=0, served="", model_version="") for _ in range(200)))
    after = bench.scrape()
    grown = {key: n for key, n in after.items() if n != before.get(key)}
    assert grown.pop(("perch_request_errors_total", "no_answer", "canary", "digits", "none")) == 200
    assert before["perch_request_errors_total", "no_answer", "canary", "digits", "none"] == 0
    assert grown.keys() & before.keys() == {("perch_request_count_total", "canary", "digits", "none")}
    assert before["perch_request_count_total", "stable", "digits", "none"] == 0
    assert before["perch_request_failed_open_total", "none", "none", "none"] == 0


def test_what_counts_as_a_fault_grows_from_0_whoever_answered(bench):
    bench.take(outcome(), outcome(cohort="canary", model_version="2"))
    before = bench.scrape()
    bench.take(
        outcome(status=500),
        outcome(cohort="canary", deadline=True, status=504, model_version="2"),
        outcome(cohort="canary", status=503, served="", model_version=""),
        outcome(cohort="canary", served="stable"),
        outcome(served="canary", model_version="2"),
        outcome(cohort="canary", aborted=True, model_version=""),
        outcome(failed_open=True)._replace(assignment=None, hash=None),
    )
    grown = {key: n for key, n in bench.scrape().items() if key[0].endswith("_total") and n != before.get(key)}
    faults = ("errors", "fell_back", "failed_open", "mismatched", "aborted")
    assert {key[0] for key in grown} >= {f"perch_request_{name}_total" for name in faults}
    of_series = {key for key in grown if key[0] != "perch_request_predictions_total"}
    assert {key for key in of_series if key not in before} == set()


def test_series_at_0_take_no_room_from_those_that_have_something_to_tell():
    flags = [f"f{n}" for n in range(5_000)]
    found = expected({("a", "stable"): [f"v{n}" for n in range(16)], ("a", "canary"): ["x"]}, flags, 100)
    assert sum(map(len, found.values())) == 100
    assert ("a", "stable") not in found
    assert len(found["a", "canary"]) == 15
    assert found["f0", "stable"] == [SeriesKey("f0", "stable", "none")]
    assert expected({}, flags, 0) == {}


def test_of_a_page_that_is_full_what_is_at_0_goes_first():
    flags = [f"f{n}" for n in range(MAX_SERIES // 2)]
    bench = Bench(*flags)
    assert series_of(bench) == MAX_SERIES
    for flag in flags[::-1]:
        bench.take(outcome(flag, model_version="2"))
    assert series_of(bench) == MAX_SERIES
    counted = {key[2]: n for key, n in bench.scrape().items() if key[0] == "perch_request_count_total" and n}
    assert counted == dict.fromkeys(flags, 1)


def series_of(bench):
    return sum(key[0] == "perch_request_count_total" for key in bench.scrape())


def test_a_flag_that_comes_later_is_there_at_0_too(bench):
    assert ("perch_request_count_total", "canary", "wine", "none") not in bench.scrape()
    wine = Flag(key="wine", model="digits", salt="wine", percent=Decimal(5))
    bench.telemetry.take_flags([wine], Exposures())
    assert bench.scrape()["perch_request_count_total", "canary", "wine", "none"] == 0


@pytest.mark.parametrize(
    ("kind", "shown"), [("vector", "(vector)"), ("numbers", "(number)"), ("auto", "(number)"), ("labels", None)]
)
def test_outputs_that_are_numbers_are_counted_and_never_told(kind, shown):
    bench = Bench(kind=kind)
    draw = random.Random(8)
    raw = [f"{draw.gauss(0, 1):.6f}" for _ in range(300)]
    bench.take(*(outcome(predictions=",".join(raw[n : n + 4]), prediction_count=4) for n in range(296)))
    heard, scraped = bench.second(), bench.scrape()
    told = {tags[-1]: n for (name, *tags), n in heard.counters.items() if name == "request.predictions"}
    page = {key[-1]: n for key, n in scraped.items() if key[0] == "perch_request_predictions_total"}
    assert told == page
    assert (told == {shown: 296}) == (shown is not None)  # whoever says that these are labels gets labels
    bench.take(outcome(failed_open=True, predictions="0.125,3")._replace(assignment=None, hash=None))
    assert ("perch_request_predictions_total", "none", "none", shown or "0.125") in bench.scrape()


def test_over_many_seconds_what_statsd_heard_adds_up_to_what_prometheus_shows(bench):
    draw = random.Random(5)
    for _ in range(80):
        for _ in range(draw.randrange(4)):
            cohort = draw.choice(["stable", "canary"])
            bench.take(outcome(cohort=cohort, status=draw.choice([200, 500]), predictions=draw.choice("abc")))
        if draw.random() < 0.7:  # a second without an end in between: the next one has both
            bench.second()
    bench.second()
    scraped, counted = bench.scrape(), {}
    for (name, *tags), n in bench.heard.counters.items():
        labels = sorted(zip(BY_NAME[name].tags, tags, strict=True))
        counted[BY_NAME[name].prometheus, *(value for _, value in labels)] = n
    assert counted == {key: n for key, n in scraped.items() if key[0].endswith("_total") and n}


def test_a_second_without_traffic_says_nothing_of_the_cohorts_again(bench):
    bench.take(outcome(), outcome(cohort="canary"))
    bench.second()
    before = Counter(bench.heard.calls)
    bench.second(2)
    assert bench.heard.calls["request.count"] == before["request.count"]
    assert bench.heard.calls["request.latency_p50_ms"] == before["request.latency_p50_ms"]
    bench.second(REPEAT_S)
    repeated = bench.heard.calls["request.latency_p50_ms"] - before["request.latency_p50_ms"]
    assert repeated == 2  # of each cohort once
    bench.second(60)
    silent = Counter(bench.heard.calls)
    bench.second(2 * REPEAT_S)
    assert bench.heard.calls["request.latency_p50_ms"] == silent["request.latency_p50_ms"]
    assert bench.heard.calls["request.drift_n"] == silent["request.drift_n"]


def test_durations_of_a_second_go_out_one_by_one_while_they_are_few(bench):
    times = [1.0, 5.0, 5.0, 900.0]
    bench.take(*(outcome(total_ms=ms, upstream_ms=ms / 2) for ms in times))
    heard = bench.second()
    ((values, seen),) = heard.timers["request.latency_ms", "digits", "stable", "1"]
    assert (values, seen) == ([value_of(bin_of(ms)) for ms in times], 4)
    ((values, seen),) = heard.timers["request.upstream_ms", "digits", "stable", "1"]
    assert (values, seen) == ([value_of(bin_of(ms / 2)) for ms in times], 4)
    bench.second()
    assert len(heard.timers["request.latency_ms", "digits", "stable", "1"]) == 1


def test_many_durations_of_a_second_are_told_by_their_quantiles(bench):
    draw = random.Random(3)
    times = sorted(draw.lognormvariate(3, 1) for _ in range(10_000))
    bench.take(*(outcome(total_ms=ms) for ms in draw.sample(times, len(times))))
    ((values, seen),) = bench.second().timers["request.latency_ms", "digits", "stable", "1"]
    assert (len(values), seen) == (64, 10_000)
    exact = [times[(2 * i + 1) * 10_000 // 128] for i in range(64)]
    assert values == [value_of(bin_of(ms)) for ms in exact]


def test_a_duration_that_is_none_is_in_no_timer_no_bucket_and_no_percentile(bench):
    bench.take(outcome(total_ms=float("nan")), outcome(total_ms=-1), outcome(total_ms=10.0), outcome(total_ms=1e300))
    ((values, seen),) = bench.second().timers["request.latency_ms", "digits", "stable", "1"]
    assert (values, seen) == ([value_of(bin_of(10.0)), value_of(bin_of(1e300))], 2)
    scraped = bench.scrape()
    series = ("stable", "digits", "1")
    assert scraped["perch_request_latency_seconds_count", *series] == 2
    assert scraped["perch_request_latency_seconds_sum", *series] == pytest.approx(sum(values) / 1000)
    assert scraped["perch_request_count_total", *series] == 4


def test_buckets_count_exactly_what_is_not_above_their_edge(bench):
    draw = random.Random(9)
    edges = [edge_of(place) for place in BUCKETS]
    times = [draw.lognormvariate(4, 2) for _ in range(3_000)] + edges + [edge * 1.0001 for edge in edges]
    bench.take(*(outcome(total_ms=ms) for ms in times[:1_500]))
    bench.second()
    bench.take(*(outcome(total_ms=ms) for ms in times[1_500:]))  # and a second that has not ended
    buckets = {key: n for key, n in bench.scrape().items() if key[0] == "perch_request_latency_seconds_bucket"}
    found = {float(le): n for (_name, _cohort, _flag, le, _version), n in buckets.items()}
    assert found.pop(float("inf")) == len(times)
    assert list(found.values()) == [sum(ms <= edge for ms in times) for edge in edges]
    assert list(found) == pytest.approx([edge / 1000 for edge in edges], rel=1e-5)


def test_percentiles_are_of_the_last_minute_and_in_seconds_for_prometheus(bench):
    bench.take(*(outcome(total_ms=100.0) for _ in range(98)), outcome(total_ms=1_000.0), outcome(total_ms=1_000.0))
    heard = bench.second()
    assert heard.gauges["request.latency_p50_ms", "digits", "stable"] == pytest.approx(100, rel=0.02)
    assert heard.gauges["request.latency_p99_ms", "digits", "stable"] == pytest.approx(1_000, rel=0.02)
    scraped = bench.scrape()
    assert scraped["perch_request_latency_p50_seconds", "stable", "digits"] == pytest.approx(0.1, rel=0.02)
    bench.second(61)
    assert ("perch_request_latency_p50_seconds", "stable", "digits") not in bench.scrape()


def test_which_predictions_have_a_series_is_settled_once_and_none_ever_shrinks(bench):
    before = Counter()
    for step in range(60):
        # Labels come one after the other, each more frequent than all before it, and one is called like the rest.
        bench.take(*(outcome(predictions=f"l{step}") for _ in range(step + 1)), outcome(predictions="(other)"))
        bench.second()
        now = {key: n for key, n in bench.scrape().items() if key[0] == "perch_request_predictions_total"}
        assert all(now[key] >= n for key, n in before.items())
        assert len(now) <= 20
        assert sum(now.values()) == sum(range(1, step + 2)) + step + 1
        before = now
    assert before["perch_request_predictions_total", "stable", "digits", "l18"] == 19
    assert ("perch_request_predictions_total", "stable", "digits", "l19") not in before
    told = {
        tags: n
        for (name, *tags), n in bench.heard.counters.items()
        if name == "request.predictions"
        for tags in [tuple(tags)]
    }
    assert told == {(flag, cohort, label): n for (_, cohort, flag, label), n in before.items()}


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("great auk", "great auk"),
        ("", "none"),
        ("ä€", "ä€"),
        ("a\nb\x00c\r", "a\ufffdb\ufffdc\ufffd"),
        ("\udc80", "\ufffd"),
        ("x" * 65, "x" * 64),
        ('"\\', '"\\'),
        ("\u2028", "\ufffd"),
    ],
)
def test_a_text_that_anybody_made_up_is_one_short_line_of_valid_text(raw, shown):
    assert tag_of(raw) == shown
    tag_of(raw).encode()


def test_versions_and_labels_that_are_shown_alike_are_one_series_in_both(bench):
    long = "v" * MAX_VALUE
    bench.take(outcome(model_version=long + "1"), outcome(model_version=long + "2"), outcome(model_version="\n"))
    bench.take(outcome(model_version="\r"), outcome(predictions="%0A"), outcome(predictions="%0D"))
    bench.take(outcome(predictions="%61"), outcome(predictions="a"))
    heard, scraped = bench.second(), bench.scrape()
    assert heard.counters["request.count", "digits", "stable", long] == 2
    assert scraped["perch_request_count_total", "stable", "digits", long] == 2
    assert scraped["perch_request_latency_seconds_count", "stable", "digits", "\ufffd"] == 2
    assert scraped["perch_request_predictions_total", "stable", "digits", "\ufffd"] == 2
    assert scraped["perch_request_predictions_total", "stable", "digits", "a"] == 2


def test_drift_is_a_gauge_of_each_measure_that_is_defined(bench):
    bench.take(*(outcome(predictions="ab"[n % 2]) for n in range(100)))
    bench.second()
    assert not any(name.startswith("request.drift") for name, *_ in bench.heard.gauges)
    bench.take(*(outcome(cohort="canary", predictions="a") for _ in range(50)))
    gauges = bench.second().gauges
    assert gauges["request.drift", "digits", "ks"] == pytest.approx(0.5)
    assert gauges["request.drift", "digits", "js"] > 0.4
    assert ("request.drift", "digits", "wasserstein_sd") not in gauges  # labels have no order
    assert gauges["request.drift_n", "digits", "stable"] == 100
    assert bench.scrape()["perch_request_drift", "digits", "ks"] == pytest.approx(0.5)


def test_the_drifts_of_many_flags_take_turns_and_all_are_found():
    keys = [f"flag-{n}" for n in range(3 * DRIFTS_A_SECOND)]
    bench = Bench(*keys)
    for seconds in (1, 2, 3):
        for key in keys:
            bench.take(outcome(key, predictions="a"), outcome(key, "canary", predictions="b"))
        bench.second()
        found = {tags[0] for name, *tags in bench.heard.gauges if name == "request.drift"}
        assert len(found) == seconds * DRIFTS_A_SECOND


def test_a_flag_that_is_served_no_more_keeps_its_counters_and_loses_its_drift(bench):
    bench.take(outcome(predictions="a"), outcome(cohort="canary", predictions="b"))
    bench.second()
    before = bench.scrape()
    assert ("perch_request_drift", "digits", "ks") in before
    bench.telemetry.take_flags((), Exposures())
    bench.second()
    after = bench.scrape()
    assert ("perch_request_drift", "digits", "ks") not in after
    assert all(after[key] == n for key, n in before.items() if key[0].endswith("_total"))


def test_values_reported_later_are_counted_and_their_mean_is_a_gauge(bench):
    served = [outcome(cohort="canary"), outcome(cohort="canary"), outcome()]
    bench.take(*served)
    for one, value in zip(served, (1.0, 0.0, 1.0), strict=True):
        bench.telemetry.report(Reported("accuracy", value, one.request_id), bench.now)
    bench.telemetry.report(Reported("accuracy", 1.0, served[0].request_id), bench.now)
    heard, scraped = bench.second(), bench.scrape()
    assert heard.counters["request.kpi_count", "digits", "canary", "accuracy"] == 2
    assert heard.gauges["request.kpi_mean", "digits", "canary", "accuracy"] == 0.5
    assert heard.counters["request.outcomes", "joined"] == 3
    assert heard.counters["request.outcomes", "duplicates"] == 1
    assert scraped["perch_request_kpi_count_total", "canary", "digits", "accuracy"] == 2
    assert scraped["perch_request_kpi_mean", "stable", "digits", "accuracy"] == 1


def test_the_log_and_the_reconciliation_are_told_without_any_traffic(bench):
    bench.log.entries, bench.log.unreadable, bench.log.unreadable_messages, bench.log.open = 7, 1, 2, 3
    bench.differences = {"digits": Difference(lost=4, surplus=5)}
    heard, scraped = bench.second(), bench.scrape()
    assert heard.counters == {("request.log_entries",): 7, ("request.log_unreadable",): 3}
    assert heard.gauges == {
        ("request.log_streams",): 3,
        ("request.outcomes_pending",): 0,
        ("request.lost", "digits"): 4,
        ("request.surplus", "digits"): 5,
    }
    assert scraped["perch_request_lost", "digits"] == 4


def test_of_more_cohorts_than_fit_into_a_second_each_gets_its_turn_and_no_request_is_left_out(statsd):
    keys = [f"flag-{n}" for n in range(900)]
    bench = Bench(*keys)
    metrics = bench.heard = statsd.metrics
    asked = Counter()
    for second in range(5):
        for key in keys[: 900 - 100 * second]:  # those that go silent are told in the end, too
            bench.take(outcome(key), outcome(key, "canary"))
            asked[key] += 1
        bench.second()
        if second % 2:  # a flush may come late
            metrics.flush()
            assert len(statsd.lines()) < 2_000
    for _ in range(30):
        bench.second()
        metrics.flush()
        statsd.lines()
    assert not any(name == "perch.metrics.dropped" for name, _ in statsd.sums)
    counted = {tags: n for (name, tags), n in statsd.sums.items() if name == "perch.request.count"}
    assert counted == {
        f"cohort:{cohort},flag:{key},model_version:1": n for key, n in asked.items() for cohort in ("stable", "canary")
    }


def test_the_durations_of_the_busiest_series_go_out_and_the_others_are_counted():
    keys = [f"flag-{n}" for n in range(100)]
    bench = Bench(*keys)
    bench.take(*(outcome(key) for n, key in enumerate(keys) for _ in range(n + 1)))
    heard = bench.second()
    timed = {flag for name, flag, *_ in heard.timers if name == "request.latency_ms"}
    assert timed == set(keys[-TIMED:])
    assert bench.scrape()["perch_request_dropped_total", "timers"] == 100 - TIMED


# --- whatever the traffic holds ---


def hostile(n, flags):
    """Outcomes of every variety that a model server, a client or a network can make up."""
    draw = random.Random(1)
    odd = [
        "",
        "\n",
        "\x00",
        "a,b",
        '"',
        "\\",
        "%",
        "%ff",
        "%00",
        "x" * 5_000,
        "ü" * 300,
        "|#@:",
        "NaN",
        "1e999",
        "other",
    ]
    times = [0.0, -5.0, float("nan"), float("inf"), 1e-9, 3.0, 250.0, 1e12]
    for i in range(n):
        flag, cohort = draw.choice(flags), draw.choice(["stable", "canary"])
        yield outcome(
            flag,
            cohort,
            hash=draw.getrandbits(32) if flag == "digits" else None,
            served=draw.choice(["stable", "canary", ""]),
            status=draw.choice([0, 200, 404, 500, 999]),
            deadline=draw.random() < 0.1,
            aborted=draw.random() < 0.1,
            failed_open=draw.random() < 0.1,
            total_ms=draw.choice(times),
            upstream_ms=draw.choice([*times, None]),
            model_version=draw.choice(odd) + str(draw.choice([i, 0, 1])),
            predictions=draw.choice(odd) + str(draw.choice([i, 0, 1])),
            prediction_count=draw.choice([None, 0, 1, 32, 10**9]),
        )


def assert_valid(text):
    """A parser reads it, and promtool has nothing to say about it where it is installed; the number of its samples."""
    families = list(text_string_to_metric_families(text.decode()))
    keys = [(sample.name, *sorted(sample.labels.items())) for one in families for sample in one.samples]
    assert len(keys) == len(set(keys))
    promtool = shutil.which("promtool")
    if promtool is not None:
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    return len(keys)


def test_a_hundred_thousand_hostile_outcomes_of_one_flag_make_few_series_and_a_small_page(bench):
    for n, one in enumerate(hostile(100_000, ["digits"])):
        bench.take(one)
        if n % 200 < 5:
            bench.telemetry.report(Reported(f"kpi-{n}", float(n), one.request_id), bench.now)
        if n % 20_000 == 0:
            bench.second()
    heard = bench.second()
    text = bench.metrics.prometheus()
    cohorts, versions = 2, 17
    series = (cohorts + 1) * versions  # and those at 0 of requests without a decision
    statsd = len(heard.counters) + len(heard.gauges) + len(heard.timers)
    assert statsd <= series * (1 + 3 + 4 + 2) + cohorts * (3 + 20 + 2 * 64) + 30
    assert assert_valid(text) <= series * (1 + 3 + 4 + 2 * 16) + cohorts * (3 + 20 + 2 * 64) + 30
    assert len(text) < 300_000
    assert sum(n for (name, *_), n in heard.counters.items() if name in ("request.count", "request.aborted")) == 100_000


def test_hostile_outcomes_of_thousands_of_flags_stay_below_what_the_windows_and_the_page_tell_apart():
    flags = [f"{n}{'f' * 195}" for n in range(3_000)]
    bench = Bench(*flags)
    for n, one in enumerate(hostile(20_000, flags)):
        bench.take(one)
        if n % 3 == 0:
            bench.telemetry.report(Reported(f"kpi-{n % 7}", 1.0, one.request_id), bench.now)
        if n % 5_000 == 0:
            bench.second()
    bench.second()
    text = bench.metrics.prometheus()
    most = MAX_SERIES * (1 + 3 + 4 + 3 + 1 + 6) + MAX_LABELLED + MAX_HISTOGRAMS * 2 * 16 + 32 + 2 * MAX_KPIS + 30
    assert assert_valid(text) <= most
    assert len(text) < 350 * most
    total = sum(
        n for key, n in bench.scrape().items() if key[0] in ("perch_request_count_total", "perch_request_aborted_total")
    )
    assert total == 20_000


def test_no_counter_and_no_bucket_shrinks_under_hostile_traffic():
    flags = [f"flag-{n}" for n in range(60)]
    bench = Bench(*flags)
    before = {}
    outcomes = hostile(12_000, flags)
    for _ in range(6):
        for one in itertools.islice(outcomes, 2_000):
            bench.take(one)
            bench.telemetry.report(Reported(f"kpi-{next(IDS)}", 1.0, one.request_id), bench.now)
        bench.second()
        now = bench.scrape()
        grows = ("_total", "_bucket", "_count", "_sum")
        shrunk = [key for key, n in before.items() if key[0].endswith(grows) and now.get(key, 0) < n]
        assert shrunk == []
        before = now
    assert ("perch_request_latency_seconds_count", "(other)", "(other)", "(other)") in before
    assert sum(key[0] == "perch_request_kpi_mean" for key in before) == MAX_KPIS
    assert before["perch_request_dropped_total", "kpi_series"] > 0

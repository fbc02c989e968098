"""What control says of 20,000 requests, against the clients' own record of them, and of requests under faults."""

import asyncio
import json
import random
import signal
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import pytest

from extproc.metricnames import BY_NAME

REQUESTS = 20_000
DEADLINE_S = 10.0
"""Longer than a busy machine keeps a server or us: a request whose client is to go away must not end there before."""
SEED = 20_261_104
SETTLED_WITHIN_S = 60.0
ARMS = ("stable", "canary")

# How long the model server takes. On a quiet machine the rest adds less than a bin to so much; each percentile lies
# well inside of its group.
DELAYS_S = {0.5: 90, 1.0: 7.5, 2.0: 2.5}
KINDS = {"plain": 78, "staff": 7, "pilot": 7, "none": 3, "two": 2, "force-canary": 2, "force-stable": 1}
ENDINGS = {"ok": 91, "400": 1.5, "404": 1.5, "500": 2, "503": 2, "hang": 1, "part": 1}
REASONS = {"SPLIT", "RULE_SPLIT", "TARGETING_MATCH", "FORCED", "NO_UNIT", "AMBIGUOUS_UNIT"}
LABELS = ["cat", "dog", "great%20auk", "a%2Cb", *map(str, range(8))]


@pytest.fixture(scope="module")
def flags(tools):
    """Two models; both arms of both get plenty."""
    return {"one": tools.witness.Flag("one-1", 40), "two": tools.witness.Flag("two-1", 55.5)}


@pytest.fixture(scope="module")
def witnessed(tools, flags):
    with tools.witnessed(flags, DEADLINE_S) as (system, servers):
        yield system, servers


@pytest.fixture
def servers(witnessed):
    return witnessed[1]


@pytest.fixture
def fresh(tools, witnessed):
    """The system, where control has just begun to count."""
    tools.witness.begin_to_count(tools, witnessed[0])
    return witnessed[0]


def until_read(tools: Any, system: Any, entries: int) -> dict[str, Any]:
    """The status, once control has read so many entries of the log."""
    said: dict[str, Any] = {}

    def read() -> bool:
        said.update(system.status())
        return said["access_log"]["entries"] >= entries

    tools.until(read, f"{entries} entries of the log", SETTLED_WITHIN_S)
    return said


def until_compared(tools: Any, system: Any, assigned: dict[str, int]) -> dict[str, Any]:
    """The status, once the reconciliation has all that was assigned in the log."""
    said: dict[str, Any] = {}

    def compared() -> bool:
        said.update(system.status())
        found = tools.witness.reconciled(said)
        # Decisions are reported each second: those of the last one may come after the comparison that has the entries.
        return all(
            name in found and found[name]["assigned"] == n <= found[name]["decided"] for name, n in assigned.items()
        )

    tools.until(compared, f"{assigned} in the reconciliation", SETTLED_WITHIN_S)
    return said


# --- what must be said of a record ------------------------------------------------------------------------------------


def assert_cohorts(tools: Any, status: dict[str, Any], wanted: Any) -> None:
    """Every number of every cohort in the status."""
    for flag, row in status["flags"].items():
        counts = {arm: wanted.cohorts[flag, arm] for arm in ARMS if (flag, arm) in wanted.cohorts}
        assert row.get("cohorts", {}).keys() == counts.keys()
        assigned = sum(count.requests for count in counts.values())
        for arm, count in counts.items():
            got = row["cohorts"][arm]
            plain = {name: got[name] for name in ("requests", "fell_back", "aborted", "mismatched", "errors")}
            assert plain == {
                "requests": count.requests,
                "fell_back": count.fell_back,
                "aborted": count.aborted,
                "mismatched": 0,
                "errors": count.errors.total(),
            }
            assert got["errors_by_class"] == count.errors
            assert got["predictions"] == count.predictions
            assert got["model_versions"] == wanted.versions(flag, arm)
            assert got["share"] == round(count.requests / assigned, 5)
            assert_percentiles(tools, got, count.bounds_ms)


def assert_percentiles(tools: Any, got: dict[str, Any], bounds_ms: list[tuple[float, float]]) -> None:
    """Each lies in a bin between what the model servers waited and what the clients did: quiet, that is one bin."""
    bin_of, rank = tools.witness.bin_of, tools.witness.rank
    for name, share in tools.witness.QUANTILES.items():
        if not bounds_ms:
            assert got[name] is None
            continue
        least, most = (bin_of(rank(side, share)) for side in zip(*bounds_ms, strict=True))
        assert least <= bin_of(got[name]) <= most, (name, got[name])


def assert_metrics(metrics: dict[tuple[str, ...], float], wanted: Any) -> None:
    """Every counter and every bucket of `/metrics`, series by series. Tags come in the order of their names."""
    names = ("count", "aborted", "fell_back", "failed_open", "errors", "predictions", "mismatched", "dropped")
    called = {name: BY_NAME[f"request.{name}"].prometheus for name in names}
    expected: dict[tuple[str, ...], float] = {}
    for (flag, cohort, version), count in wanted.series.items():
        series = (cohort, flag, version)
        expected[called["count"], *series] = count.requests
        for name in ("aborted", "fell_back", "failed_open"):
            if getattr(count, name):
                expected[called[name], *series] = getattr(count, name)
        for error, n in count.errors.items():
            expected[called["errors"], error, *series] = n
        for name in ("latency", "upstream"):
            assert metrics[f"perch_request_{name}_seconds_count", *series] == len(count.bounds_ms)
            assert_buckets(metrics, f"perch_request_{name}_seconds_bucket", series, count.bounds_ms)
    for (flag, cohort), count in wanted.cohorts.items():
        for label, n in count.predictions.items():
            expected[called["predictions"], cohort, flag, label] = n
    assert {key: n for key, n in metrics.items() if key[0] in called.values() and n} == {
        key: n for key, n in expected.items() if n
    }


def assert_buckets(
    metrics: dict[tuple[str, ...], float], name: str, series: tuple[str, str, str], bounds_ms: list[tuple[float, float]]
) -> None:
    """Each bucket has all that cannot have taken longer, and none that must have."""
    buckets = {key[3]: n for key, n in metrics.items() if (key[0], *key[1:3], *key[4:]) == (name, *series)}
    assert len(buckets) > 10
    for edge, n in buckets.items():
        sure = sum(most <= float(edge) * 1000 for _, most in bounds_ms)
        possible = sum(least <= float(edge) * 1000 for least, _ in bounds_ms)
        assert sure <= n <= possible, (series, edge)


# --- 20,000 requests --------------------------------------------------------------------------------------------------


def draw(tools: Any) -> Iterable[Any]:
    """Requests of many users, told to end in every way there is."""
    dice = random.Random(SEED)

    def one_of(weights: dict[Any, float]) -> Any:
        return dice.choices(list(weights), list(weights.values()))[0]

    for _ in range(REQUESTS):
        model, user = one_of({"one": 80, "two": 20}), f"user-{dice.randrange(6_000)}"
        do = {"version": f"v{dice.randrange(3)}", **predictions(dice, one_of({1: 80, 3: 10, 40: 5, 0: 5}))}
        match one_of(ENDINGS):
            case "hang":
                do = {"hang": True}
            case "part":
                do["part"] = True
            case "ok":
                do["after"] = one_of(DELAYS_S)
            case status:
                do |= {"status": int(status), "after": one_of(DELAYS_S)}
        yield tools.witness.Ask(model, user, one_of(KINDS), do)


def predictions(dice: random.Random, count: int) -> dict[str, Any]:
    """The headers of so many predictions, of which the first 32 are shown."""
    shown = dice.choices(LABELS, range(1, len(LABELS) + 1), k=min(count, 32))
    return {"predictions": ",".join(shown), "count": count} if count else {}


def report(system: Any, values: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Reports whether the answers of these requests were right, and what control made of it."""
    rows = [json.dumps({"request_id": one, "name": "accuracy", "value": value}) for one, value in values]
    url = f"http://127.0.0.1:{system.control_port}/v1/outcomes"
    headers = {"content-type": "application/x-ndjson"}
    asked = urllib.request.Request(url, "\n".join(rows).encode(), headers)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.loads(answer.read())


async def test_every_number_of_20000_requests_is_that_of_the_clients_own_record(tools, fresh, flags, servers):
    system, decided_of = fresh, tools.witness.decided_of
    before = decided_of(system.status())
    records = servers.hung(await tools.witness.ask_all(system.port, flags, draw(tools), 600))
    others = [system.get(system.port, path)[0] for path in ("/v2/models/one/ready", "/livez", "/nowhere")]
    assert others == [200, 200, 404]
    entries = REQUESTS + len(others)
    wanted = tools.witness.Counts.of(records)
    assert sum(wanted.decided.values()) + sum(record.failed_open for record in records) == REQUESTS
    assert {reason for _, _, reason in wanted.decided} - {"HELD"} == REASONS  # a canary may miss its health checks
    status = await asyncio.to_thread(until_read, tools, system, entries)
    assert status["access_log"]["unreadable"] == 0
    assert sum(status["access_log"]["envoys"].values()) == status["access_log"]["entries"] == entries

    whole = [record for record in records if record.status == 200 and not record.aborted and not record.failed_open]
    right = {record.headers["x-request-id"]: i % 3 == 0 for i, record in enumerate(whole)}
    assert report(system, [*right.items(), ("of-nobody", 1)])["joined"] == len(right)
    assert report(system, right.items())["duplicates"] == len(right)

    status = await asyncio.to_thread(until_compared, tools, system, wanted.assigned)
    assert_cohorts(tools, status, wanted)
    late = sum(record.failed_open for record in records)
    decided = decided_of(status) - before
    assert decided >= wanted.decided
    assert decided.total() <= wanted.decided.total() + late
    for flag, row in status["flags"].items():
        assert (
            row["drift"].items()
            >= {"n": wanted.votes[flag, "canary"], "n_stable": wanted.votes[flag, "stable"]}.items()
        )
        assert row["kpis"] == {"accuracy": kpis(records, flag, right)}
        found = row["reconciliation"]
        assert 0 <= found.pop("decided") - wanted.assigned[flag] <= late
        assert found.pop("since") <= found.pop("compared")
        assert found == {
            "assigned": wanted.assigned[flag],
            "served": wanted.served[flag],
            "lost": 0,
            "surplus": 0,
            "mismatched": 0,
            "failed_open": sum(record.failed_open for record in records if record.ask.model == flag),
        }
    unexpected = status["alerts"]
    if late:
        unexpected = [alert for alert in unexpected if "got stable, as ext_proc did not answer in time" not in alert]
    assert unexpected == []
    metrics = tools.witness.metrics_of(system)
    assert_metrics(metrics, wanted)
    assert metrics["perch_request_log_entries_total",] == entries


def kpis(records: Iterable[Any], flag: str, right: dict[str, bool]) -> dict[str, dict[str, float]]:
    """Number and mean of what was reported about requests that chance put into an arm."""
    values: dict[str, list[int]] = {}
    for record in records:
        value = right.get(record.headers.get("x-request-id", ""))
        if value is None or record.ask.model != flag or record.failed_open:
            continue
        if record.decided.reason in ("SPLIT", "RULE_SPLIT"):
            values.setdefault(record.served, []).append(value)
    return {arm: {"n": len(found), "mean": round(sum(found) / len(found), 6)} for arm, found in values.items()}


# --- under faults -----------------------------------------------------------------------------------------------------


async def test_of_a_canary_that_is_killed_midway_each_fall_back_is_counted_and_no_user_gets_an_error(
    tools, fresh, flags, servers
):
    system = fresh
    async with tools.witness.Traffic(system.port, flags) as traffic:
        await traffic.more(500)
        system.signal(signal.SIGSTOP, "control")  # else, on a slow machine, it holds the flags before anybody asks
        servers.kill("canary")
        for _ in range(2):  # then Envoy's only worker has read the end of every connection to it
            assert await asyncio.to_thread(system.get, system.port, "/livez") == (200, "ok\n")
        killed_s = time.monotonic()
        await traffic.more(500)
        system.signal(signal.SIGCONT, "control")
        await traffic.more(500)
        servers.begin("canary")
        await asyncio.to_thread(system.until_settled)
        await traffic.more(500)
    assert {record.status for record in traffic.records if record.began_s > killed_s} == {200}
    wanted = tools.witness.Counts.of(traffic.records)
    assert min(wanted.cohorts[flag, "canary"].fell_back for flag in flags) > 50
    status = await asyncio.to_thread(until_read, tools, system, len(traffic.records) + 2)
    assert_cohorts(tools, status, wanted)
    assert_metrics(tools.witness.metrics_of(system), wanted)


async def test_no_entry_is_lost_while_control_stands_still_and_all_users_come_at_once_when_it_begins(
    tools, fresh, flags
):
    """Control has just begun, so Envoy opens the log's stream for these requests."""
    system = fresh
    plain = [tools.witness.Ask("one", f"user-{i}", "plain", {"version": "v0"}) for i in range(600)]
    records = await tools.witness.ask_all(system.port, flags, plain, 600)
    await asyncio.to_thread(until_read, tools, system, 600)
    system.signal(signal.SIGSTOP, "control")
    records += await tools.witness.ask_all(system.port, flags, plain * 10, 200)  # Envoy's own 1 MiB holds a quarter
    system.signal(signal.SIGCONT, "control")
    status = await asyncio.to_thread(until_read, tools, system, len(records))
    assert_cohorts(tools, status, tools.witness.Counts.of(records))


async def test_while_perch_is_dead_requests_belong_to_no_arm_and_are_counted_as_failed_open(tools, fresh, flags):
    system = fresh
    async with tools.witness.Traffic(system.port, flags) as traffic:
        await traffic.more(500)
        with system.unsupervised():
            system.signal(signal.SIGKILL, "serve")
            await traffic.more(1000)
        await asyncio.to_thread(system.until_settled)
        await traffic.more(500)
    assert {record.status for record in traffic.records} == {200}
    wanted = tools.witness.Counts.of(traffic.records)
    assert wanted.cohorts["none", "none"].failed_open >= 1000
    status = await asyncio.to_thread(until_read, tools, system, len(traffic.records))
    assert_cohorts(tools, status, wanted)
    assert_metrics(tools.witness.metrics_of(system), wanted)

"""What the reconciliation catches, one fault at a time, and that a healthy system raises no false alarm."""

import asyncio
import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FLAGS = {"one": 40, "two": 55.5}
COMPARED_WITHIN_S = 45.0
LATELY = "of the last 5 minutes"
MISSING = re.compile(rf"(\d+) of \d+ requests {LATELY} are missing")


@pytest.fixture(scope="module")
def flags(tools):
    return {name: tools.witness.Flag(f"{name}-1", percent) for name, percent in FLAGS.items()}


@pytest.fixture(scope="module")
def witnessed(tools, flags):
    with tools.witnessed(flags) as (system, servers):
        yield system, servers


@pytest.fixture
def fresh(tools, witnessed):
    """The system, where control has just begun to count, and has compared for the first time."""
    system = witnessed[0]
    tools.witness.begin_to_count(tools, system)
    tools.until(lambda: tools.witness.reconciled(system.status()).keys() == FLAGS.keys(), "the first comparison")
    return system


@contextlib.contextmanager
def edited(system: Any, name: str, edit: Callable[[str], str]) -> Iterator[None]:
    """One of the files that Envoy watches is another one while inside."""
    (path,) = system.temporary.glob(f"perch-*/envoy/{name}")
    text = path.read_text()
    changed = edit(text)
    assert changed != text
    put(path, changed)
    try:
        yield
    finally:
        put(path, text)


def put(path: Path, text: str) -> None:
    """Replaces the file as perch does."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


async def until_served_elsewhere(tools: Any, system: Any, flags: Any, records: list[Any]) -> None:
    """Asks until Envoy has taken the edit: a canary user is on stable, and not because perch was late for Envoy."""
    async with asyncio.timeout(60):
        while not records or records[-1].served != "stable" or records[-1].failed_open:
            await tools.witness.ask_all(
                system.port, flags, [tools.witness.Ask("one", "user-1", "force-canary")], 1, records
            )
            await asyncio.sleep(0.05)


def asks(tools: Any, count: int, model: str = "one") -> list[Any]:
    """Plain requests of so many users."""
    return [tools.witness.Ask(model, f"user-{i}") for i in range(count)]


def until_alarmed(tools: Any, system: Any, flag: str, assigned: int) -> dict[str, int]:
    """The flag's reconciliation, once it has seen so many requests in the log and there is an alert.

    Decisions are reported each second: those of the last one may come after the comparison that has the entries.
    """

    def read() -> Any:
        status = system.status()
        found = tools.witness.reconciled(status).get(flag, {})
        return found if found and found["assigned"] == assigned <= found["decided"] and status["alerts"] else None

    found: dict[str, int] = tools.until(read, f"an alert about {flag} with {assigned} assigned", COMPARED_WITHIN_S)
    return found


def assert_told(tools: Any, system: Any, told_before: list[str], flag: str, sentence: str) -> None:
    """The alert is in the status, in the audit file and in what `perch up` says, which hears it from control."""
    line = f"{flag}: {sentence}"
    assert line in system.status()["alerts"]
    # A comparison in the middle of the requests tells its own numbers, and later ones only what has doubled.
    such = re.compile(re.sub(r"\d+", r"\\d+", re.escape(line)))
    lines = [text for text in told(system)[len(told_before) :] if such.fullmatch(text)]
    assert lines
    tools.until(lambda: f"reconciliation: {lines[0]}" in system.output, f"{lines[0]} in what `perch up` says")


def assert_found(found: dict[str, int], records: list[Any], **other: int) -> None:
    """Decided, assigned and served are the record's, `other` is as given, and the rest is nothing.

    What perch was late with on a busy machine has no assignment, and was decided all the same, or not.
    """
    late = sum(record.failed_open for record in records)
    found = {name: n for name, n in found.items() if name not in ("since", "compared", "failed_open")}
    assert 0 <= found.pop("decided") - (len(records) - late) <= late
    nothing = {"lost": 0, "surplus": 0, "mismatched": 0}
    assert found == {"assigned": len(records) - late, "served": len(records)} | nothing | other


def of_another_arm(astray: list[Any], found: dict[str, int]) -> str:
    """The alert about requests that went elsewhere than decided."""
    of = f"{len(astray)} of {found['decided']} requests {LATELY}"
    return f"{of} were served by another arm than decided; see Envoy's routes"


def told(system: Any) -> list[str]:
    """Every alarm so far."""
    return system.events("reconciliation")


async def test_a_forgotten_clear_route_cache_is_caught(tools, fresh, flags):
    """Perch decides and sets the header, and Envoy goes on with the route that it had."""
    system, before, records = fresh, told(fresh), []
    with edited(
        system, "ecds.yaml", lambda text: text.replace("route_cache_action: DEFAULT", "route_cache_action: RETAIN")
    ):
        await until_served_elsewhere(tools, system, flags, records)
        await tools.witness.ask_all(system.port, flags, asks(tools, 200), 10, records)
    heard = [record for record in records if not record.failed_open]
    astray = [record for record in heard if record.decided.cohort != record.served]
    found = await asyncio.to_thread(until_alarmed, tools, system, "one", len(heard))
    assert_found(found, records, mismatched=len(astray))
    assert_told(tools, system, before, "one", of_another_arm(astray, found))
    cohorts = system.status()["flags"]["one"]["cohorts"]
    assert cohorts["canary"]["mismatched"] == len(astray)
    assert cohorts["canary"]["fell_back"] == 0


async def test_a_swapped_route_is_caught(tools, fresh, flags):
    """Stable's users are on canary. Canary's are on stable, which looks like a fall-back and is counted as one."""
    system, before, records = fresh, told(fresh), []

    def swapped(text: str) -> str:
        routes = yaml.safe_load(text)
        for resource in routes["resources"]:
            for route in resource["virtual_hosts"][0]["routes"]:
                names = {"one.canary": "one_stable", "one.stable": "one_canary_or_stable"}
                if route["name"] in names:
                    route["route"]["cluster"] = names[route["name"]]
        return yaml.safe_dump(routes)

    with edited(system, "rds.yaml", swapped):
        await until_served_elsewhere(tools, system, flags, records)
        await tools.witness.ask_all(system.port, flags, asks(tools, 200), 10, records)
    heard = [record for record in records if not record.failed_open]
    astray = [record for record in heard if (record.decided.cohort, record.served) == ("stable", "canary")]
    assert len(astray) > 50
    found = await asyncio.to_thread(until_alarmed, tools, system, "one", len(heard))
    assert_found(found, records, mismatched=len(astray))
    assert_told(tools, system, before, "one", of_another_arm(astray, found))
    cohorts = system.status()["flags"]["one"]["cohorts"]
    assert cohorts["stable"]["mismatched"] == len(astray)
    assert cohorts["canary"]["fell_back"] == sum(record.served == "stable" for record in heard)


async def test_what_a_cut_log_stream_lost_is_told_exactly_and_guessed_into_no_cohort(tools, fresh, flags):
    system, before = fresh, told(fresh)
    async with tools.witness.Traffic(system.port, flags) as traffic:
        await traffic.more(300)
        with edited(system, "cds.yaml", lambda text: text.replace("als.sock", "nobody.sock")):
            await asyncio.to_thread(until_cut, tools, system)
            await traffic.more(2000)  # what Envoy gathers in the last half second reaches control
        await traffic.more(500)
    wanted = tools.witness.Counts.of(traffic.records)
    assert {record.status for record in traffic.records} == {200}

    # What perch was late with on a busy machine may have been decided all the same, and its entries are lost as others.
    late = sum(record.failed_open for record in traffic.records)

    def found() -> Any:
        found = tools.witness.reconciled(system.status())
        more = [found[flag]["decided"] - wanted.assigned[flag] for flag in flags if flag in found]
        return found if len(more) == len(flags) and all(0 <= n <= late for n in more) else None

    compared = await asyncio.to_thread(tools.until, found, "all decisions compared", COMPARED_WITHIN_S)
    status = system.status()
    metrics = tools.witness.metrics_of(system)
    for flag, row in compared.items():
        assert abs(row["lost"] - (wanted.assigned[flag] - row["assigned"])) <= late
        assert row["lost"] >= 400
        assert (row["surplus"], row["mismatched"]) == (0, 0)
        assert metrics["perch_request_lost", flag] == row["lost"]
        cohorts = status["flags"][flag]["cohorts"]
        assert sum(cohort["requests"] for cohort in cohorts.values()) == row["assigned"]
        for arm, cohort in cohorts.items():
            assert cohort["requests"] < wanted.cohorts[flag, arm].requests
            assert sum(cohort["predictions"].values()) == cohort["requests"]
            assert cohort["errors"] == 0
            assert cohort["fell_back"] <= wanted.cohorts[flag, arm].fell_back
        sentence = (
            f"{row['lost']} of {row['decided']} requests {LATELY} are missing in the access log; "
            "its numbers are incomplete"
        )
        assert f"{flag}: {sentence}" in status["alerts"]
    assert any("missing in the access log" in line for line in told(system)[len(before) :])


def until_cut(tools: Any, system: Any) -> None:
    """Waits until control has no stream any more."""
    tools.until(lambda: system.status()["access_log"]["streams"] == 0, "the end of the log's stream")


async def test_a_second_envoy_that_nobody_told_about_is_caught(tools, fresh, flags):
    """Its requests are decided by the same perch and logged to the same control, and only its counters are unread."""
    system, before = fresh, told(fresh)
    with second_envoy(tools, system) as port:
        records = await tools.witness.ask_all(port, flags, asks(tools, 100, "two"), 10)
        heard = [record for record in records if not record.failed_open]
        found = await asyncio.to_thread(until_alarmed, tools, system, "two", len(heard))
    assert {record.status for record in records} == {200}
    assert_found(found, records, surplus=100)
    sentence = f"100 requests {LATELY} are in the access log that no known process caused; a second Envoy?"
    assert_told(tools, system, before, "two", sentence)
    assert tools.witness.metrics_of(system)["perch_request_surplus", "two"] == 100


@contextlib.contextmanager
def second_envoy(tools: Any, system: Any) -> Iterator[int]:
    """Another Envoy with the same files, at ports of its own. The port of its listener."""
    (folder,) = system.temporary.glob("perch-*/envoy")
    port, admin_port = tools.free_ports(2)
    with tools.folder() as place:
        shutil.copytree(folder, place / "envoy")
        for path in (place / "envoy").glob("*.yaml"):
            text = path.read_text().replace(str(folder), str(place / "envoy"))
            text = text.replace(f"{system.port}", f"{port}").replace(f"{system.admin_port}", f"{admin_port}")
            path.write_text(text)
        envoy = Path(f"/proc/{system.roles()['envoy']}/cmdline").read_text().split("\0")[:-1]
        command = [part.replace(str(folder), str(place / "envoy")) for part in envoy]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                tools.until(lambda: system.get(admin_port, "/ready")[0] == 200, "the second Envoy")
                healthy = "::health_flags::healthy"
                tools.until(lambda: system.get(admin_port, "/clusters")[1].count(healthy) >= 6, "its hosts")
                yield port
            finally:
                process.kill()


async def test_a_healthy_system_raises_no_false_alarm_whatever_is_reloaded_killed_and_started_again(
    tools, fresh, flags, witnessed
):
    """Requests that got stable while serve was dead are told of, and entries that died with Envoy: no more than did."""
    system, servers = witnessed
    before, killed_s = told(system), {}
    async with tools.witness.Traffic(system.port, flags, connections=10) as traffic:
        await traffic.more(100)
        text = tools.flag_file(**{name: flag.plain(name) for name, flag in flags.items()})
        await asyncio.to_thread(system.serve_flags, text)
        await traffic.more(100)
        servers.kill("canary")
        await traffic.more(100)
        servers.begin("canary")
        for role in ("serve", "envoy", "serve", "control"):
            await asyncio.to_thread(system.until_settled)
            await traffic.more(100)
            killed_s[role] = time.monotonic()
            system.signal(signal.SIGKILL, role)
            await traffic.more(100)
        await asyncio.to_thread(system.until_settled)
        for _ in range(2):
            await asyncio.to_thread(until_compared_again, tools, system)
    # Envoy's log waits half a second at most.
    died = sum(killed_s["envoy"] - 2 < record.began_s < killed_s["envoy"] + 1 for record in traffic.records)
    lines = [*told(system)[len(before) :], *system.status()["alerts"]]
    found = [(line, MISSING.search(line)) for line in lines if "as ext_proc did not answer in time" not in line]
    assert [line for line, missing in found if not missing or int(missing[1]) > died] == []
    assert {row["mismatched"] for row in tools.witness.reconciled(system.status()).values()} == {0}


async def test_no_more_is_missing_than_is_after_a_process_stood_still_for_a_while(tools, fresh, flags):
    """What it had to say is late: it is neither missing nor from elsewhere. Envoy may drop what it cannot send."""
    system = fresh
    async with tools.witness.Traffic(system.port, flags, connections=10) as traffic:
        with system.unsupervised():
            for role in ("control", "envoy", "serve") * 3:
                system.signal(signal.SIGSTOP, role)
                await asyncio.sleep(2.5)
                system.signal(signal.SIGCONT, role)
                await traffic.more(100)
    for _ in range(2):
        compared = {name: row["compared"] for name, row in tools.witness.reconciled(system.status()).items()}
        assert compared.keys() == FLAGS.keys()
        await asyncio.to_thread(until_compared_since, tools, system, compared)
    entries = sum(system.status()["access_log"]["envoys"].values())
    rows = tools.witness.reconciled(system.status()).values()
    assert {(row["surplus"], row["mismatched"]) for row in rows} == {(0, 0)}
    assert sum(row["lost"] for row in rows) <= len(traffic.records) - entries


def until_compared_since(tools: Any, system: Any, compared: dict[str, str]) -> None:
    """Waits for a comparison that is later than these."""

    def later() -> bool:
        rows = tools.witness.reconciled(system.status())
        return rows.keys() == compared.keys() and all(row["compared"] > compared[name] for name, row in rows.items())

    tools.until(later, "a later comparison", COMPARED_WITHIN_S)


def until_compared_again(tools: Any, system: Any) -> None:
    """Waits for the next comparison; there is traffic, so its numbers are others."""
    before = tools.witness.reconciled(system.status())
    tools.until(
        lambda: tools.witness.reconciled(system.status()) not in ({}, before), "a comparison", COMPARED_WITHIN_S
    )

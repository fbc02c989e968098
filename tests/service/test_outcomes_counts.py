"""Reported values as the metrics count them: in seconds that pass by themselves, then in a real control."""

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.accesslog import Counts
from extproc.core.flags import Exposures, Flag
from extproc.core.kpis import Reported
from extproc.metrics import Metrics
from extproc.requestmetrics import RequestMetrics
from extproc.telemetry import Steps, Telemetry

DEADLINE_S = 40
BAD = [
    (b'{"request_id": "r", "name": "a", "value": NaN}', {}),
    (b'{"request_id": "r", "name": "a", "value": "1"}', {}),
    (b'{"request_id": "r", "name": "a b", "value": 1}', {}),
    (b'{"request_id": "r", "name": "a", "value": 1, "colour": 2}', {}),
    (b'{"request_id": "r", "name": "a", "flag": "nope", "value": 1}', {}),
    (b'{"request_id": ', {}),
    (b"[" * 10_000, {}),
    (b"[" + b" " * (1 << 20) + b"]", {}),
    (b"nogzip", {"content-encoding": "gzip"}),
]
"""Bodies of which each is one refusal."""


def outcomes(page):
    """What a page of `GET /metrics` says about reports: results and `pending`."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "perch_request_outcomes_total":
                found[sample.labels["result"]] = sample.value
            elif sample.name == "perch_request_outcomes_pending":
                found["pending"] = sample.value
    return found


class StatsD:
    """A socket that hears: counters are summed, the last value of a gauge is kept."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(DEADLINE_S)
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.found = Counter()

    def outcomes(self):
        """What the lines so far say about reports."""
        self.socket.sendto(b"", self.socket.getsockname())  # once this is there, so is what was sent before
        while packet := self.socket.recv(65_536):
            for line in packet.decode().splitlines():
                self.take(line)
        return self.found

    def take(self, line):
        """Keeps a line that is about reports."""
        head, _, tags = line.partition("|#")
        name, _, value = head.partition("|")[0].partition(":")
        if name == "perch.request.outcomes":
            self.found[tags.removeprefix("result:")] += int(value)
        elif name == "perch.request.outcomes_pending":
            self.found["pending"] = float(value)


@pytest.fixture
def statsd():
    listener = StatsD()
    yield listener
    listener.socket.close()


class Quiet:
    """A telemetry to which nothing comes but what the test reports, and the seconds."""

    def __init__(self, statsd):
        self.telemetry = Telemetry(Steps(lambda _version: Exposures()))
        self.telemetry.take_flags([Flag(key="digits", model="digits", salt="d", percent=Decimal(5))], Exposures())
        self.shown = RequestMetrics(self.telemetry, Counts(), dict)
        self.statsd, self.metrics, self.now = statsd, Metrics(statsd.address), 100

    def second(self, n=1):
        """Lets so many pass; what StatsD and Prometheus say then."""
        for _ in range(n):
            self.now += 1
            self.shown.second(self.now, self.metrics)
            self.metrics.flush()
        return self.statsd.outcomes(), outcomes(self.shown.prometheus().decode())


@pytest.fixture
def quiet(statsd):
    made = Quiet(statsd)
    yield made
    made.metrics.close()


def test_a_report_of_nobody_is_pending_and_then_unknown_though_nothing_else_comes(quiet):
    quiet.telemetry.report(Reported("accuracy", 1.0, request_id="of-nobody"), quiet.now + 0.5)
    for found in quiet.second():
        assert (found["pending"], found["unknown"]) == (1, 0)
    assert quiet.telemetry.kpis.pending_s == 10
    for found in quiet.second(10):
        assert (found["pending"], found["unknown"]) == (0, 1)


def test_what_is_refused_before_the_store_is_counted_by_statsd_and_prometheus_alike(quiet):
    for _ in range(3):
        quiet.telemetry.kpis.refuse()
    for found in quiet.second():
        assert found["refused"] == 3
    for found in quiet.second(2):
        assert found["refused"] == 3


# --- a real control ---


class Control:
    """A control process without an Envoy, whose API is a unix socket."""

    def __init__(self, folder, service, statsd):
        self.folder = folder
        self.path = folder.root / "control.sock"
        environment = service.environment(
            folder,
            control_listen=f"unix:{self.path}",
            access_log=f"unix:{folder.root}/als.sock",
            envoy_admin=f"unix:{folder.root}/admin.sock",
            statsd=statsd.address,
        )
        with (folder.root / "control.log").open("ab") as log:
            command = [sys.executable, "-m", "extproc", "control"]
            self.process = subprocess.Popen(command, env=environment, cwd=folder.root, stdout=log, stderr=log)
        self.session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.path)))

    def log(self):
        """What it said."""
        return (self.folder.root / "control.log").read_text()

    async def until(self, condition, what):
        """What a coroutine function finds, once it finds anything."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(aiohttp.ClientConnectionError, OSError):
                if found := await condition():
                    return found
            await asyncio.sleep(0.05)
        return pytest.fail(f"still not after {DEADLINE_S} s: {what}\n{self.log()}")

    async def metrics(self):
        """What `GET /metrics` says about reports."""
        async with self.session.get("http://control/metrics") as answer:
            return outcomes(await answer.text())

    async def post(self, body, headers):
        """Status and body of the answer."""
        async with self.session.post("http://control/v1/outcomes", data=io.BytesIO(body), headers=headers) as answer:
            return answer.status, await answer.json()

    async def end(self):
        """Stops it, whatever it does."""
        await self.session.close()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


@pytest.fixture
async def control(folder, service, statsd):
    folder.put(service.flags_yaml(5))
    started = Control(folder, service, statsd)
    await started.until(started.metrics, "control answers")
    yield started
    await started.end()


async def test_in_control_every_refusal_counts_once_and_a_quiet_system_settles(control, statsd):
    for body, headers in BAD:
        code, _ = await control.post(body, headers)
        assert code in (400, 413)
    assert (await control.post(b'{"request_id": "of-nobody", "name": "a", "value": 1}', {}))[1]["pending"] == 1
    _, writer = await asyncio.open_unix_connection(str(control.path))
    report = json.dumps({"request_id": "cut", "name": "a", "value": 1}).encode()
    writer.write(b"POST /v1/outcomes HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n")
    writer.write(b"content-length: 999\r\n\r\n%s\n%s" % (report, report[:-5]))
    await writer.drain()
    found = await control.until(lambda: taken(control, 2), "the line before the cut is taken")
    assert found["refused"] == len(BAD)
    writer.close()
    await control.until(lambda: seen(control, refused=len(BAD) + 1), "the cut is counted")

    wanted = {"joined": 0, "unknown": 2, "late": 0, "duplicates": 0, "refused": len(BAD) + 1, "pending": 0}
    found = await control.until(lambda: seen(control, unknown=2), "nobody's reports are unknown")
    assert found == wanted
    await control.until(lambda: told(statsd, wanted), "StatsD is told the same")
    assert "Traceback" not in control.log()
    assert control.log().count("a request cannot be read: Can not decode content-encoding: gzip") == 1


async def seen(control, **wanted):
    """The metrics, once they say this."""
    found = await control.metrics()
    return found if found.items() >= wanted.items() else None


async def taken(control, n):
    """The metrics, once they know of so many reports of nobody, of which some may have waited long enough by then."""
    found = await control.metrics()
    return found if found["pending"] + found["unknown"] == n else None


async def told(statsd, wanted):
    """Whether StatsD was told this and nothing else."""
    found = statsd.outcomes()
    return {name: n for name, n in found.items() if n} == {name: n for name, n in wanted.items() if n}

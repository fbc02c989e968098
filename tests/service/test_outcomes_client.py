"""The client for applications, against the real API and against servers that fail."""

import asyncio
import http.server
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pytest
from aiohttp import web

from extproc.client import OutcomesClient, Sent
from extproc.core.bucketing import hash_unit
from extproc.core.kpis import Kpis, Served
from extproc.outcomesapi import outcome_routes

DEADLINE_S = 30.0


def until(condition, what):
    """Blocks until the condition holds."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"still not: {what}"
        time.sleep(0.01)


class Server:
    """A control API whose answers are given: a status each, None to hang up; the last one for ever."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                lines = self.rfile.read(int(self.headers["content-length"])).splitlines()
                outer.asked.append((self.path, self.headers, [json.loads(line) for line in lines]))
                status = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if status is None:
                    return
                body = {"accepted": len(lines), "refused": 0, "errors": []} if status == 200 else {"error": "no"}
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def outcomes(self):
        """Everything that arrived."""
        return [outcome for _, _, outcomes in self.asked for outcome in outcomes]

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def nowhere():
    """A URL at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_reports_arrive_at_the_real_api_and_are_joined():
    kpis = Kpis()
    kpis.take_flags({"digits": {"": b"d:"}})
    for n in range(3):
        kpis.remember(f"r-{n}", Served("digits", "", 0, "canary", "canary", hash_unit(b"d:", b"u"), True, 0.0), 0.0)
    app = web.Application()
    app.add_routes(outcome_routes(lambda reported: kpis.report(reported, 0.0), kpis.refuse))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    with OutcomesClient(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/") as client:
        for n in range(3):
            assert client.report("accuracy", n < 2, request_id=f"r-{n}")
        client.report("revenue", 2.5, unit="u", flag="digits")
        client.report("revenue", 2.5, unit="u", flag="digits")
        client.report("revenue", 2.5, unit="u", flag="nope")
        assert await asyncio.to_thread(client.flush, DEADLINE_S)
        assert client.sent == Sent(accepted=5, refused=1)
    await runner.cleanup()
    sums = {key.name: moments for key, moments in kpis.totals().items()}
    assert sums == {"accuracy": (3, 2.0, 2.0), "revenue": (2, 5.0, 12.5)}


@pytest.mark.parametrize("fault", [None, 500, 503, 429])
def test_a_batch_is_sent_again_as_it_was_until_it_is_answered(fault, caplog):
    with Server(fault, fault, 200) as server, OutcomesClient(server.url) as client:
        client.report("revenue", 1, unit="u", flag="digits")
        assert client.flush(DEADLINE_S)
        first, second, third = (outcomes for _, _, outcomes in server.asked)
        assert first == second == third
        assert client.sent == Sent(accepted=1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "outcomes are kept and sent again" in caplog.text


def test_what_is_reported_while_nobody_listens_is_delivered_once_somebody_does(nowhere):
    with OutcomesClient(nowhere, every_s=0.01) as client:
        for n in range(10):
            assert client.report("accuracy", 1, request_id=f"r-{n}")
        assert not client.flush(0.3)
        with Server(200) as other:
            client.url = other.url
            assert client.flush(DEADLINE_S)
            assert [outcome["request_id"] for outcome in other.outcomes] == [f"r-{n}" for n in range(10)]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_what_would_be_refused_again_is_given_up_and_told(status, caplog):
    with Server(status, 200) as server, OutcomesClient(server.url) as client:
        client.report("accuracy", 1, request_id="r-1")
        client.flush(DEADLINE_S)
        client.report("accuracy", 1, request_id="r-2")
        client.flush(DEADLINE_S)
        assert client.sent == Sent(accepted=1, refused=1)
    assert f"answers {status} to outcomes, which are given up" in caplog.text


def test_a_full_queue_drops_what_is_newer_and_says_so(nowhere):
    client = OutcomesClient(nowhere, max_queued=3, batch=1)
    client.report("accuracy", 1, request_id="under-way")
    until(lambda: client._under_way == 1, "one under way")
    assert [client.report("accuracy", 1, request_id=f"r-{n}") for n in range(5)] == [True] * 3 + [False] * 2
    client.close(0)
    assert client.sent == Sent(dropped=2, lost=4)
    assert not client.report("accuracy", 1, request_id="r-9")
    assert client.sent == Sent(dropped=3, lost=4)


def test_closing_waits_for_what_is_queued_and_no_longer_than_it_was_told(nowhere, caplog):
    with Server(200) as server:
        client = OutcomesClient(server.url, every_s=3600)
        client.report("accuracy", 1, request_id="r-1")
        client.close(DEADLINE_S)
        client.close(DEADLINE_S)
        assert (len(server.outcomes), client.sent) == (1, Sent(accepted=1))
    client = OutcomesClient(nowhere)
    client.report("accuracy", 1, request_id="r-1")
    client.close(0.1)
    assert client.sent.lost == 1
    assert f"1 outcomes were not delivered to {nowhere}" in caplog.text
    until(lambda: "perch-outcomes" not in {each.name for each in threading.enumerate()}, "the end of the threads")


class Hostile:
    """A value that does harm when it is used."""

    def __float__(self):
        raise RuntimeError("no")

    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), None, "high", [], Hostile(), pytest.param(10**5000, id="huge"),
])  # fmt: skip
def test_a_value_that_is_none_is_counted_and_does_not_reach_the_application(value, nowhere):
    client = OutcomesClient(nowhere)
    assert not client.report("accuracy", value, request_id="r-1")
    assert client.sent == Sent(refused=1)
    client.close(0)


def test_whatever_else_the_application_hands_in_it_goes_on(nowhere):
    client = OutcomesClient(nowhere)
    for more in ({"request_id": object()}, {"request_id": "x" * 1_000_000}, {"unit": b"raw", "flag": "digits"}):
        assert not client.report("accuracy", 1, **more)
    assert client.sent == Sent(refused=3)
    client.close(0)


def test_numbers_of_other_libraries_are_numbers():
    with Server(200) as server, OutcomesClient(server.url) as client:
        for value in (np.float32(0.5), np.int64(3), Decimal("0.25"), np.bool_(1)):
            assert client.report("accuracy", value, request_id="r")
        client.flush(DEADLINE_S)
        assert [outcome["value"] for outcome in server.outcomes] == [0.5, 3, 0.25, 1]


def test_a_unit_gets_a_key_of_its_own_and_a_given_key_stays():
    with Server(200) as server, OutcomesClient(server.url) as client:
        for more in ({"unit": "u", "flag": "digits"}, {"unit": "u", "flag": "digits"}, {"request_id": "r", "key": "k"}):
            client.report("revenue", 1, **more)
        client.report("revenue", 1, request_id="r")
        client.flush(DEADLINE_S)
        first, second, third, fourth = server.outcomes
    assert first["key"] != second["key"]
    assert third == {"name": "revenue", "value": 1, "request_id": "r", "key": "k"}
    assert "key" not in fourth


def test_reports_leave_in_batches_with_the_token():
    with Server(200) as server, OutcomesClient(server.url + "/perch/", token="s3cret", batch=100) as client:
        for n in range(250):
            client.report("accuracy", 1, request_id=f"r-{n}")
        client.flush(DEADLINE_S)
        assert len(server.outcomes) == 250
        assert max(len(outcomes) for _, _, outcomes in server.asked) == 100
        path, headers, _ = server.asked[0]
        assert (path, headers["authorization"]) == ("/perch/v1/outcomes", "Bearer s3cret")
    assert "s3cret" not in repr(client)


def test_many_threads_lose_nothing():
    with Server(None, 200) as server, OutcomesClient(server.url, batch=50, every_s=0.01) as client:
        threads = [
            threading.Thread(target=lambda t=t: [client.report("a", 1, request_id=f"{t}-{n}") for n in range(200)])
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.flush(DEADLINE_S)
        assert client.sent == Sent(accepted=1600)
        assert len({outcome["request_id"] for outcome in server.outcomes}) == 1600


@pytest.mark.parametrize("url", ["127.0.0.1:8900", "ftp://x", "http://", "http://x:port", "http://x?a", "http://a:b@x"])
def test_what_is_no_url_is_told_at_once(url):
    with pytest.raises(ValueError, match=r"URL|port"):
        OutcomesClient(url)


EXITS = """
import sys
from extproc.client import OutcomesClient
OutcomesClient.close.__defaults__ = (30.0,)  # in five seconds a machine that stands still delivers nothing
client = OutcomesClient(sys.argv[1], every_s=3600)
client.report("accuracy", 1, request_id="r-1")
"""
FORKS = """
import os, sys
from extproc.client import OutcomesClient
client = OutcomesClient(sys.argv[1])
client.report("accuracy", 1, request_id="parent")
client.flush(30)
pid = os.fork()
client.report("accuracy", 1, request_id="parent-again" if pid else "child")
assert client.flush(30)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
else:
    os._exit(0)
"""


@pytest.mark.parametrize(("program", "wanted"), [(EXITS, {"r-1"}), (FORKS, {"parent", "parent-again", "child"})])
def test_a_program_that_ends_or_forks_delivers(program, wanted):
    with Server(200) as server:
        subprocess.run([sys.executable, "-c", program, server.url], check=True, timeout=60)
        assert sorted(outcome["request_id"] for outcome in server.outcomes) == sorted(wanted)


def test_it_needs_the_standard_library_alone():
    code = "import sys, extproc.client; print(sorted(n for n in sys.modules if n.split('.')[0] in sys.argv[1:]))"
    third = ["aiohttp", "numpy", "pydantic", "typer", "rich", "mmh3", "orjson"]
    found = subprocess.run([sys.executable, "-c", code, *third], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"

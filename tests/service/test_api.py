"""The control API over a real socket, with its sources under the test's hand."""

import asyncio
import json
import logging

import aiohttp
import pytest
from aiohttp import web

from extproc.api import Sources, log, make_api


class Facts:
    """What the sources say."""

    def __init__(self):
        self.missing = None
        self.broken = False
        self.envoy = ("application/json", b"{}")
        self.asked = []

    async def status(self):
        """The status, with something that needs care in JSON."""
        if self.broken:
            raise ConnectionError("not the client's fault")
        return {"flags": {"digits": {"held": False, "share": 0.05}}, "text": "ü\n"}

    async def envoy_stats(self, query):
        """Envoy's answer, or its absence."""
        self.asked.append(query)
        if self.envoy is None:
            raise OSError("Envoy's admin at /x cannot be reached: gone")
        return self.envoy


@pytest.fixture
def facts():
    return Facts()


@pytest.fixture
async def get(facts):
    runner = web.AppRunner(
        make_api(Sources(facts.status, lambda: facts.missing, facts.envoy_stats, lambda: b"perch_up 1\n")),
        access_log=None,
        logger=log,
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    async with aiohttp.ClientSession() as session:

        async def ask(path, method="GET"):
            async with session.request(method, address + path) as answer:
                return answer.status, answer.content_type, await answer.text()

        ask.address = address
        yield ask
    await runner.cleanup()


async def test_it_is_alive_whatever_is_missing(facts, get):
    facts.missing = "Envoy does not answer"
    assert await get("/livez") == (200, "text/plain", "alive\n")


async def test_it_is_ready_when_nothing_is_missing_and_says_what_is(facts, get):
    assert await get("/readyz") == (200, "text/plain", "ready\n")
    facts.missing = "the canary of digits is not warm"
    assert await get("/readyz") == (503, "text/plain", "the canary of digits is not warm\n")


async def test_the_status_is_json(facts, get):
    code, kind, body = await get("/v1/status")
    assert (code, kind) == (200, "application/json")
    assert json.loads(body) == await facts.status()


async def test_envoys_stats_are_passed_on_with_their_type(facts, get):
    facts.envoy = ("text/plain; charset=UTF-8", b"a: 1\n")
    code, kind, body = await get("/envoy/stats?usedonly&filter=a")
    assert (code, kind, body) == (200, "text/plain", "a: 1\n")
    assert facts.asked == ["usedonly&filter=a"]
    facts.envoy = None
    code, kind, body = await get("/envoy/stats")
    assert (code, kind) == (502, "application/json")
    assert "cannot be reached" in json.loads(body)["error"]


@pytest.mark.parametrize(("path", "method", "code"), [
    ("/nope", "GET", 404), ("/", "GET", 404), ("/v1/status", "POST", 405), ("/envoy/stats", "POST", 405),
    ("/envoy/quitquitquit", "GET", 404), ("/envoy/stats/../quitquitquit", "GET", 404),
])  # fmt: skip
async def test_nothing_else_is_there_and_nothing_can_be_changed_through_it(get, path, method, code):
    assert (await get(path, method))[0] == code


@pytest.mark.parametrize(("request_", "told"), [
    (b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", "Invalid character in Content-Length"),
    (b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % 10**30, "Content-Length overflow"),
    (b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", "Got more than"),
    (b"POST /livez HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: 6\r\n\r\nnogzip", "Can not decode"),
    (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnone\r\n", "Invalid character in chunk size"),
])  # fmt: skip
async def test_what_cannot_be_read_as_http_is_one_line_in_the_log(get, caplog, request_, told):
    reader, writer = await asyncio.open_connection(*get.address.removeprefix("http://").split(":"))
    writer.write(request_)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    await writer.wait_closed()
    assert answer.split()[1].startswith(b"4")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"a request cannot be read: {told}")
    assert len(record.getMessage()) < 250
    assert (record.levelno, "\n" in caplog.text.strip()) == (logging.WARNING, False)
    assert (await get("/livez"))[0] == 200


async def test_a_fault_of_this_program_keeps_its_traceback(facts, get, caplog):
    facts.broken = True
    assert (await get("/v1/status"))[0] == 500
    assert "Traceback" in caplog.text
    assert "not the client's fault" in caplog.text

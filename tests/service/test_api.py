"""The control API over a real socket, with its sources under the test's hand."""

import json

import aiohttp
import pytest
from aiohttp import web

from extproc.api import Sources, make_api


class Facts:
    """What the sources say."""

    def __init__(self):
        self.missing = None
        self.envoy = ("application/json", b"{}")
        self.asked = []

    async def status(self):
        """The status, with something that needs care in JSON."""
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
        make_api(Sources(facts.status, lambda: facts.missing, facts.envoy_stats, lambda: b"perch_up 1\n"))
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    async with aiohttp.ClientSession() as session:

        async def ask(path, method="GET"):
            async with session.request(method, address + path) as answer:
                return answer.status, answer.content_type, await answer.text()

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

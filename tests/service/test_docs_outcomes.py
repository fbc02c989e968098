"""docs/outcomes.md is executed: its curl commands and its Python against a real API, their answers compared."""

import asyncio
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from aiohttp import web

from extproc.core.bucketing import hash_unit
from extproc.core.kpis import Kpis, Served, parse_reported
from extproc.outcomesapi import MAX_BODY, STALL_S, outcome_routes

PAGE = (Path(__file__).parents[2] / "docs" / "outcomes.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", PAGE)
REQUEST = "ce9e19bc-0489-4474-8178-353be227d07c"
SHIPPED = "http://127.0.0.1:8900"


@pytest.fixture
def kpis():
    """A store that knows the request and the user of the page."""
    store = Kpis()
    store.take_flags({"digits": {"": b"d:"}})
    served = Served("digits", "", 0, "canary", "canary", hash_unit(b"d:", b"user-6"), True, 0.0)
    store.remember(REQUEST, served, 0.0)
    return store


@pytest.fixture
async def url(kpis):
    """The API in front of it."""
    app = web.Application()
    app.add_routes(outcome_routes(lambda reported: kpis.report(reported, 0.0), kpis.refuse))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    await runner.cleanup()


async def run(*command):
    """What a program prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, command
    return out.decode()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
async def test_every_curl_on_the_page_is_answered_as_the_page_says(url, kpis):
    commands = [text for language, text in BLOCKS if language == "sh"]
    answers = [json.loads(text) for language, text in BLOCKS if language == "json"]
    assert len(commands) == len(answers) == 2
    for command, wanted in zip(commands, answers, strict=True):
        assert SHIPPED in command
        assert json.loads(await run("sh", "-c", command.replace(SHIPPED, url))) == wanted
    sums = {key.name: moments.sum for key, moments in kpis.totals().items()}
    assert sums == {"accuracy": 1.0, "revenue": 16.0}


async def test_the_python_on_the_page_reports(url, kpis):
    (program,) = [text for language, text in BLOCKS if language == "python"]
    await run(sys.executable, "-c", program.replace(SHIPPED, url))
    sums = {key.name: moments.sum for key, moments in kpis.totals().items()}
    assert sums == {"accuracy": 1.0, "revenue": 12.5}


def test_the_page_has_every_field_and_the_limits_as_they_are():
    for name in parse_reported.__globals__["_FIELDS"]:
        assert f"`{name}`" in PAGE
    store = Kpis()
    assert f"{store.capacity:,} requests, {store.window_s / 3600:.0f} hours" in PAGE
    assert store.pending_s == 10  # "ten seconds"
    assert f"above {MAX_BODY >> 20} MiB" in PAGE
    assert STALL_S == 5 * 60  # "five minutes"

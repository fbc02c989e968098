"""A rule that names a header nobody named before takes effect by an edit of the file, with all of perch running."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
NOBODY = "version: 1\nflags:\n  digits:\n    salt: digits-2026-11\n    canary: 0\n"
RULE = "    rules:\n      - {name: gold, when: {header: x-plan, equals: gold}, serve: canary}\n"


async def until(condition, what):
    end = asyncio.get_running_loop().time() + DEADLINE_S
    while asyncio.get_running_loop().time() < end:
        if found := await condition():
            return found
        await asyncio.sleep(0.05)
    return pytest.fail(f"still not after {DEADLINE_S} s: {what}")


@pytest.fixture
def everything(tools, tmp_path):
    """`perch up` on a flag file of its own; gives the file and the listener's port."""
    port, control, admin = tools.free_ports(3)
    flags = tmp_path / "flags" / "flags.yaml"
    flags.parent.mkdir()
    flags.write_text(NOBODY)
    ports = ["--port", str(port), "--control-port", str(control), "--admin", str(admin)]
    places = ["--flags", str(flags), "--state", str(tmp_path / "state")]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "extproc", "up", *ports, *places],
        cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PERCH_LOG_LEVEL": "info"},
    )  # fmt: skip
    yield flags, port, control
    process.send_signal(signal.SIGINT)
    process.wait(DEADLINE_S)
    log.close()


async def test_a_rule_on_a_new_header_takes_effect_without_a_restart(everything):
    flags, port, control = everything
    manifest = json.loads((ROOT / "model_servers/artifacts/digits/1/manifest.json").read_text())
    spec = manifest["inputs"][0]
    row = manifest["examples"][spec["name"]][0]
    body = {"inputs": [{"name": spec["name"], "shape": [1, len(row)], "datatype": spec["datatype"], "data": row}]}

    async with aiohttp.ClientSession() as client:

        async def ready():
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(f"http://127.0.0.1:{control}/readyz") as answer:
                    return answer.status == 200
            return False

        async def arm(**headers):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            url = f"http://127.0.0.1:{port}/v2/models/digits/infer"
            async with client.post(url, json=body, headers=named) as answer:
                return answer.headers.get("x-model-cohort") if answer.status == 200 else None

        await until(ready, "perch is ready")
        assert await arm(x_user_id="u", x_plan="gold") == "stable"
        flags.write_text(NOBODY + RULE)

        async def only_gold_is_canary():
            """Asked again and again: a busy machine may let a request pass without a decision."""
            arms = [await arm(x_user_id="u", x_plan=plan) for plan in ("gold", "silver")]
            return [*arms, await arm(x_user_id="u")] == ["canary", "stable", "stable"]

        await until(only_gold_is_canary, "the rule on x-plan decides")
        flags.write_text(NOBODY)

        async def gold_is_stable():
            return await arm(x_user_id="u", x_plan="gold") == "stable"

        await until(gold_is_stable, "the rule is gone")

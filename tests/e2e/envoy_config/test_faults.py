"""When something behind Envoy, or beside it, is down."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable
from extproc.envoyfile import envoy_command, render, write


async def test_without_perch_everybody_gets_stable_and_the_canary_comes_back_with_it(edge):
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"
    await edge.decider.stop()
    for _ in range(20):
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.by, answer.headers["x-model-cohort"]) == (200, "digits-stable-0", "stable")
    failed_open = await edge.admin.counters(r"ext_proc\.perch\.failure_mode_allowed$")
    assert list(failed_open.values()) == [20]
    await edge.decider.start()
    await edge.until(lambda: edge.is_served_by("digits-canary-0"))


@pytest.mark.parametrize("size", [1_000, 2_000_000])
async def test_a_refusing_canary_is_retried_on_stable_with_the_whole_body(running, size, a_model, never_check_again):
    async with running([a_model("digits", canaries=2)], never_check_again) as edge:
        for name in ("digits-canary-0", "digits-canary-1"):
            await edge.upstreams[name].stop()
        for _ in range(5):
            answer = await edge.get("/v2/models/digits/infer", size=size, x_test_cohort="canary")
            assert (answer.status, answer.by, answer.body["size"]) == (200, "digits-stable-0", size)
            assert answer.headers["x-model-cohort"] == "stable"
        assert "digits_canary" in await edge.healthy()


@pytest.mark.parametrize("arm", ["stable", "canary"])
async def test_with_one_of_two_servers_refusing_every_request_is_answered_by_the_other(
    running, a_model, never_check_again, arm
):
    """200 requests: a retry that may draw the dead host again loses one in 32."""
    model = replace(a_model("digits", canaries=2), stable=("unix:digits-stable-0.sock", "unix:digits-stable-1.sock"))
    async with running([model], never_check_again) as edge:
        await edge.upstreams[f"digits-{arm}-0"].stop()
        answers = [await edge.infer(x_test_cohort=arm) for _ in range(200)]
        assert {(answer.status, answer.by) for answer in answers} == {(200, f"digits-{arm}-1")}


async def test_an_unready_canary_gets_no_traffic_and_its_health_is_seen_through_admin(edge):
    canary = edge.upstreams["digits-canary-0"]
    canary.ready = 503
    await edge.until(lambda: edge.gone("digits_canary"))
    hosts = {host.cluster: host for host in await edge.admin.hosts()}
    assert not hosts["digits_canary"].healthy
    assert (hosts["digits_canary"].model, hosts["digits_canary"].served) == ("digits", "canary")
    assert hosts["digits_canary"].address == f"unix:{canary.path}"
    assert hosts["words_canary"].healthy
    assert hosts["perch"].model is None
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-stable-0"
    assert canary.seen == []
    canary.ready = 200
    await edge.until(lambda: edge.is_served_by("digits-canary-0"))


async def test_a_canary_that_answers_errors_keeps_its_users_and_hides_nothing(edge):
    edge.upstreams["digits-canary-0"].status = 500
    for _ in range(20):
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.by) == (500, "digits-canary-0")


async def test_a_late_answer_is_a_504_at_the_models_own_deadline(running, a_model):
    async with running([replace(a_model("digits"), deadline_s=0.1)]) as edge:
        edge.upstreams["digits-canary-0"].delay_s = 5
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.body) == (504, {"error": "upstream request timeout"})
        assert answer.headers["x-model-cohort"] == "canary"


async def test_a_second_envoy_cannot_take_the_port_silently(edge):
    async with _edge_without_listener(edge) as second:
        assert await second.listener_port() is None
        assert list((await second.counters(r"^listener_manager\.lds\.update_rejected$")).values()) == [1]


@contextlib.asynccontextmanager
async def _edge_without_listener(edge) -> AsyncIterator[EnvoyAdmin]:
    """A second Envoy on the port of the first, once it has tried to listen there."""
    folder = edge.folder / "2"
    listen, admin = f"127.0.0.1:{edge.port}", EnvoyAdmin(f"unix:{folder}/admin.sock")
    settings = replace(edge.settings, run_dir=folder, listen=listen, admin=f"unix:{folder}/admin.sock")
    write(settings.files, render(edge.models, settings))
    process = await asyncio.create_subprocess_exec(*envoy_command(settings), stderr=asyncio.subprocess.DEVNULL)
    try:
        await edge.until(lambda: _has_tried_to_listen(admin))
        yield admin
    finally:
        process.kill()
        await process.wait()
        await admin.close()


async def _has_tried_to_listen(admin: EnvoyAdmin) -> bool:
    with contextlib.suppress(EnvoyUnreachable):
        return any((await admin.counters(r"^listener_manager\.lds\.update_(rejected|success)$")).values())
    return False


async def test_admin_neither_stops_envoy_nor_changes_its_runtime(edge):
    connector = aiohttp.UnixConnector(edge.settings.admin.removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector) as client:
        for path in ("/quitquitquit", "/runtime_modify?perch.digits.canary_pct=0", "/logging?level=trace"):
            async with client.post(f"http://envoy{path}") as answer:
                assert answer.status == 403
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"

"""The real Envoy over both transports, in both ways it ends a stream."""

import asyncio
import http.client
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from extproc.transport.fastlane import FastLane


def _get(port: int, requests: int) -> list[tuple[int, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    got = []
    for number in range(requests):
        connection.request("GET", f"/v2/models/digits/infer?{number}", headers={"x-user-id": f"u{number}"})
        response = connection.getresponse()
        got.append((response.status, response.read().decode()))
    connection.close()
    return got


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("graceful", [True, False], ids=["half-close", "reset"])
async def test_envoy_gets_every_answer_and_reports_no_failure(
    transport_class, graceful, tmp_path, canary, start_envoy, eventually
):
    messages = []

    def answer(message: bytes) -> bytes:
        messages.append(message)
        return canary

    transport = transport_class(answer, lambda: True)
    await transport.start(f"unix:{tmp_path}/p.sock")

    def use() -> tuple[list[tuple[int, str]], dict[str, int]]:
        with start_envoy(tmp_path / "envoy", tmp_path / "p.sock", graceful=graceful) as envoy:
            eventually(envoy.healthy, "perch healthy in Envoy")
            with ThreadPoolExecutor(8) as clients:
                batches = list(clients.map(lambda _: _get(envoy.port, 100), range(8)))
            return [one for batch in batches for one in batch], envoy.stats("ext_proc|cluster.perch")

    got, stats = await asyncio.to_thread(use)
    await transport.stop(1.0)
    assert got == [(200, "canary")] * 800
    assert len(messages) == 800
    assert b"/v2/models/digits/infer?" in messages[0]
    name = next(name for name in stats if name.endswith("ext_proc.perch.streams_started"))
    assert stats[name] == 800
    assert stats[name.replace("streams_started", "streams_failed")] == 0
    assert stats[name.replace("streams_started", "failure_mode_allowed")] == 0
    assert stats["cluster.perch.upstream_cx_protocol_error"] == 0
    assert stats["cluster.perch.upstream_cx_destroy_remote_with_active_rq"] == 0
    assert stats["cluster.perch.upstream_rq_rx_reset"] == 0


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_no_request_is_lost_when_one_of_two_servers_stops_under_load(tmp_path, canary, start_envoy, eventually):
    """It needs Envoy's retries on another host, and more than the three at a time that are the default."""
    lanes = [FastLane(lambda _message: canary, lambda: True) for _ in range(2)]
    sockets = [tmp_path / "p.0", tmp_path / "p.1"]
    for lane, path in zip(lanes, sockets, strict=True):
        await lane.start(f"unix:{path}")
    loaded, stopped = threading.Event(), threading.Event()

    def ask(port: int) -> list[tuple[int, str]]:
        got = _get(port, 50)
        loaded.set()
        while not stopped.is_set():
            got += _get(port, 10)
        return got + _get(port, 50)

    def use() -> tuple[list[tuple[int, str]], dict[str, int]]:
        with start_envoy(tmp_path / "envoy", *sockets, graceful=True) as envoy:
            eventually(lambda: envoy.healthy(2), "both servers healthy in Envoy")
            with ThreadPoolExecutor(4) as clients:
                batches = list(clients.map(lambda _: ask(envoy.port), range(4)))
            return [one for batch in batches for one in batch], envoy.stats("ext_proc")

    client = asyncio.create_task(asyncio.to_thread(use))
    await asyncio.to_thread(loaded.wait, 120)
    await lanes[0].stop(60)
    stopped.set()
    got, stats = await client
    await lanes[1].stop(1.0)
    assert set(got) == {(200, "canary")}
    assert sum(value for name, value in stats.items() if name.endswith(("failure_mode_allowed", "streams_failed"))) == 0

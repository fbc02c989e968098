"""The real Envoy over both transports, in both ways it ends a stream."""

import asyncio
import http.client
from concurrent.futures import ThreadPoolExecutor

import pytest


def _get(port: int, requests: int) -> list[tuple[int, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
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

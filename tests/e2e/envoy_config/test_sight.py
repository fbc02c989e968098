"""What the model servers, the clients and the logs get to see."""

import asyncio
from pathlib import Path
from typing import Any

DEADLINE_S = 20.0


async def test_the_request_id_is_envoys_own_and_the_clients_moves_aside(edge):
    ids = set()
    for _ in range(2):
        answer = await edge.infer(x_request_id="chosen-by-client")
        got = edge.upstreams["digits-stable-0"].seen[-1].headers
        assert got["x-client-request-id"] == "chosen-by-client"
        assert got["x-request-id"] == answer.headers["x-request-id"]
        assert edge.decider.seen[-1]["x-request-id"].decode() == answer.headers["x-request-id"]
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 2
    assert "chosen-by-client" not in ids


async def test_a_client_gives_no_orders_to_envoy(edge):
    edge.upstreams["digits-stable-0"].status = 500
    edge.upstreams["digits-stable-0"].delay_s = 0.1
    answer = await edge.infer(x_envoy_retry_on="5xx", x_envoy_max_retries="3", x_envoy_upstream_rq_timeout_ms="10")
    assert (answer.status, len(edge.upstreams["digits-stable-0"].seen)) == (500, 1)


async def test_a_testers_token_reaches_perch_only_when_wanted_and_a_model_server_never(running, edge, a_model):
    await edge.infer(x_force_cohort="canary;token")
    assert "x-force-cohort" not in edge.decider.seen[-1]
    async with running([a_model("digits")], force_token=True) as with_token:
        await with_token.infer(x_force_cohort="canary;token")
        assert with_token.decider.seen[-1]["x-force-cohort"] == b"canary;token"
        assert "x-force-cohort" not in with_token.upstreams["digits-stable-0"].seen[-1].headers


async def test_the_access_log_names_the_assigned_and_the_served_arm(running, a_model):
    async with running([a_model("digits")], logged_headers=("X-User-Id",)) as edge:
        await edge.infer(x_test_cohort="canary", x_user_id="u7")
        edge.upstreams["digits-canary-0"].ready = 503
        await edge.until(lambda: edge.gone("digits_canary"))
        await edge.infer(x_test_cohort="canary")
        await edge.until(lambda: len(edge.decider.entries) == 2)
        first, second = edge.decider.entries
        for entry, served in ((first, "canary"), (second, "stable")):
            common = entry.common_properties
            assert (common.route_name, common.upstream_cluster) == ("digits.canary", f"digits_{served}")
            assert dict(common.custom_tags) == {"cohort": "canary", "served": served, "failed_open": "0"}
            assert entry.request.request_headers["x-model-cohort"] == "canary"
            expected = {
                "x-model-version": f"v-digits-{served}-0",
                "x-model-prediction": "7",
                "x-model-prediction-count": "1",
            }
            assert dict(entry.response.response_headers) == expected
        assert first.request.request_headers["x-user-id"] == "u7"


async def test_version_and_cohort_can_be_hidden_from_clients_but_not_from_the_logs(running, a_model):
    hidden = {"show_version": False, "show_cohort": False, "canary_log": Path("canary.jsonl")}
    async with running([a_model("digits")], **hidden) as edge:
        for cohort in ("stable", "canary"):
            answer = await edge.infer(x_test_cohort=cohort)
            assert not {"x-model-version", "x-model-cohort"} & {name.lower() for name in answer.headers}
        await edge.until(lambda: len(edge.decider.entries) == 2)
        tags = [entry.common_properties.custom_tags["model_version"] for entry in edge.decider.entries]
        assert tags == ["v-digits-stable-0", "v-digits-canary-0"]
        (line,) = await edge.canary_log(1)
        assert line["model_version"] == "v-digits-canary-0"


async def test_the_canary_log_has_one_line_per_canary_request_with_nobody_reading_the_access_log(running, a_model):
    settings = {"canary_log": Path("canary.jsonl"), "access_log": "unix:nobody.sock"}
    async with running([a_model("digits")], **settings) as edge:
        answers = [await edge.infer(x_test_cohort=cohort) for cohort in ["stable", "canary"] * 10]
        lines = await edge.canary_log(10)
        wanted = [answer.headers["x-request-id"] for answer in answers if answer.by == "digits-canary-0"]
        assert [line["request_id"] for line in lines] == wanted
        assert len(wanted) == 10
        del lines[0]["request_id"], lines[0]["time"]
        assert lines[0] == {
            "route": "digits.canary",
            "perch": {"model": "digits", "cohort": "canary", "flag": "digits"},
            "served": "canary",
            "status": 200,
            "model_version": "v-digits-canary-0",
            "predictions": "7",
            "prediction_count": "1",
        }


async def test_envoys_own_stats_reach_dogstatsd(running, a_model):
    loop = asyncio.get_running_loop()
    packets: asyncio.Queue[bytes] = asyncio.Queue()

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _addr: Any) -> None:
            packets.put_nowait(data)

    transport, _ = await loop.create_datagram_endpoint(Listener, local_addr=("127.0.0.1", 0))
    statsd = f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"

    def flush_fast(files: dict[str, str]) -> dict[str, str]:
        assert 'flush_interval: "5s"' in files["bootstrap.yaml"]
        return files | {"bootstrap.yaml": files["bootstrap.yaml"].replace('interval: "5s"', 'interval: "0.2s"')}

    async with running([a_model("digits")], flush_fast, statsd=statsd) as edge, asyncio.timeout(DEADLINE_S):
        await edge.infer(x_test_cohort="canary")
        while b"envoy.cluster.upstream_rq_total" not in (packet := await packets.get()):
            assert len(packet) <= 1400
        assert b"|c|#" in packet
    transport.close()

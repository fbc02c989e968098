"""Who serves a request, and what a client cannot do about it."""

import asyncio
from dataclasses import replace

import h2.connection
import pytest
from yarl import URL

DEADLINE_S = 20.0


async def test_two_models_are_routed_apart_and_each_to_the_arm_that_was_decided(edge):
    for model in ("digits", "words"):
        for cohort in ("stable", "canary"):
            answer = await edge.infer(model, x_test_cohort=cohort)
            assert (answer.by, answer.headers.getall("x-model-cohort")) == (f"{model}-{cohort}-0", [cohort])
            assert answer.headers["x-model-version"] == f"v-{model}-{cohort}-0"


async def test_canary_needs_the_header_and_the_metadata_and_the_right_model(edge):
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"
    assert (await edge.infer(x_test_cohort="canary", x_test_model="words")).by == "digits-stable-0"
    assert (await edge.infer(x_test_cohort="canary", x_test_header="stable")).by == "digits-stable-0"
    assert (await edge.infer(x_test_cohort="stable", x_test_header="canary")).by == "digits-stable-0"


SPOOFS = [
    {"x-model-cohort": "canary"},
    {"X-MODEL-COHORT": "canary"},
    {"x_model_cohort": "canary"},
    {"x-perch-cohort": "canary", "x-perch-anything": "1"},
    {"x-force-cohort": "canary;token"},
]


@pytest.mark.parametrize("perch_runs", [True, False])
async def test_a_spoofed_header_never_reaches_the_canary_nor_the_model_server(edge, perch_runs):
    if not perch_runs:
        await edge.decider.stop()
    for spoof in SPOOFS:
        async with edge.client.post(edge.url("digits"), headers=spoof) as answer:
            assert (await answer.json())["by"] == "digits-stable-0"
        got = edge.upstreams["digits-stable-0"].seen[-1].headers
        assert got.get("x-model-cohort") in ({"stable"} if perch_runs else {None})
        assert not [name for name in got if name.lower().startswith(("x-perch-", "x-force-", "x_"))]
    doubled = [("x-model-cohort", "canary"), ("x-model-cohort", "canary")]
    async with edge.client.post(edge.url("digits"), headers=doubled) as answer:
        assert (await answer.json())["by"] == "digits-stable-0"


async def test_health_and_metadata_are_stable_and_never_ask_perch(edge):
    paths = ["/v2", "/v2/", "/v2/health/live", "/v2/health/ready"]
    own = ["/v2/models/digits", "/v2/models/digits/ready", "/v2/models/digits/versions/2"]
    for path in [*paths, *own, "/v2/models/digits/versions/2/ready"]:
        assert (await edge.get(path, x_test_cohort="canary")).by == "digits-stable-0", path
    assert (await edge.get("/v2/models/words/ready")).by == "words-stable-0"
    assert (await edge.get("/livez")).body == "ok\n"
    assert edge.decider.seen == []
    # A version asked for by name is still an inference.
    assert (await edge.get("/v2/models/digits/versions/2/infer", x_test_cohort="canary")).by == "digits-canary-0"


async def test_a_path_nobody_serves_is_a_404_in_the_protocols_error_format(edge):
    for path in ("/", "/v2/models/letters/infer", "/v2/models/digitsx/infer", "/livez/x"):
        answer = await edge.get(path)
        assert (answer.status, answer.body) == (404, {"error": "no model is served at this path"})
        assert "x-model-cohort" not in answer.headers
    assert edge.decider.seen == []


async def test_rules_see_the_path_the_model_server_sees(edge):
    for path in ("/v2//models/./digits/infer", "/v2/models%2Fdigits/infer", "/x/../v2/models/digits/infer"):
        async with edge.client.post(URL(f"http://127.0.0.1:{edge.port}{path}", encoded=True)) as answer:
            assert (await answer.json())["path"] == "/v2/models/digits/infer"
        assert edge.decider.seen[-1][":path"] == b"/v2/models/digits/infer"


async def test_the_longest_prefix_wins_whatever_the_order_of_the_file(running, a_model):
    outer = replace(a_model("outer"), prefix="/v2/models/", warm="/ready")
    async with running([outer, a_model("digits")]) as edge:
        assert (await edge.infer("digits")).by == "digits-stable-0"
        assert (await edge.infer("digits", x_test_cohort="canary")).by == "digits-canary-0"
        assert (await edge.infer("else", x_test_cohort="canary", x_test_model="outer")).by == "outer-canary-0"
        assert (await edge.get("/v2/health/ready")).by == "outer-stable-0"


async def test_a_model_without_a_canary_is_served_by_stable_alone(running, a_model):
    async with running([a_model("digits", canaries=0)]) as edge:
        assert (await edge.infer(x_test_cohort="canary")).by == "digits-stable-0"
        assert await edge.healthy() == {"perch", "perch_als", "digits_stable"}


async def test_http2_without_tls_works_on_the_same_port(edge):
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    path = (":path", "/v2/models/digits/infer")
    head = [(":method", "GET"), path, (":authority", "edge"), (":scheme", "http"), ("x-test-cohort", "canary")]
    connection.send_headers(1, head, end_stream=True)
    writer.write(connection.data_to_send())
    headers: dict[bytes, bytes] = {}
    async with asyncio.timeout(DEADLINE_S):
        while not headers:
            for event in connection.receive_data(await reader.read(65536)):
                headers |= dict(getattr(event, "headers", None) or {})
    writer.close()
    await writer.wait_closed()
    assert (headers[b":status"], headers[b"x-model-cohort"]) == (b"200", b"canary")

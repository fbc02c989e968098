"""The rendered configuration in the real Envoy: real upstreams, real ext_proc streams, files replaced under traffic."""

import asyncio
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import h2.connection
import pytest
from aiohttp import web
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption
from envoy_data_plane.envoy.service.accesslog.v3 import StreamAccessLogsMessage
from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc
from envoy_data_plane.google.protobuf import Struct
from yarl import URL

from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable
from extproc.envoyfile import (
    EnvoySettings,
    envoy_command,
    forwarded_headers,
    render,
    render_filter,
    render_runtime,
    template_folder,
    version_of,
    write,
)
from extproc.modelsfile import Model, load_models, own_sockets

TEST_HEADERS = ("x-test-cohort", "x-test-model", "x-test-header")
DEADLINE_S = 20.0


async def until(condition: Callable[[], Any]) -> Any:
    """The first true answer of `condition`, which may be async; fails after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            answer = condition()
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if answer:
                return answer
            await asyncio.sleep(0.02)


def changed(text: str, old: str, new: str) -> str:
    """`text` with every `old` replaced, of which there must be one."""
    assert old in text
    return text.replace(old, new)


@dataclass
class Upstream:
    """A model server that says who it is, what it was asked, and forges the headers that only Envoy may set."""

    name: str
    path: Path
    ready: int = 200
    status: int = 200
    delay_s: float = 0.0
    seen: list[web.Request] = field(default_factory=list)
    runner: web.AppRunner | None = None

    async def start(self, *, tcp: bool = False) -> int:
        """Listens on its socket, or on a free port of 127.0.0.1, which it returns."""
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_route("*", "/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0) if tcp else web.UnixSite(self.runner, str(self.path))
        await site.start()
        return self.runner.addresses[0][1] if tcp else 0

    async def stop(self) -> None:
        """Refuses connections from now on."""
        if self.runner:
            await self.runner.cleanup()
            self.runner = None
            if self.path.name:
                self.path.unlink(missing_ok=True)

    async def answer(self, request: web.Request) -> web.Response:
        """Health checks get `ready`; everything else is remembered and told back."""
        if request.headers.get("user-agent", "").startswith("Envoy/HC"):
            return web.Response(status=self.ready)
        self.seen.append(request)
        size = len(await request.read())
        await asyncio.sleep(self.delay_s)
        headers = {
            "x-model-cohort": "forged",
            "x-model-version": f"v-{self.name}",
            "x-model-prediction": "7",
            "x-model-prediction-count": "1",
        }
        body = {"by": self.name, "path": request.path, "size": size, "headers": dict(request.headers)}
        return web.json_response(body, status=self.status, headers=headers)


@dataclass
class Decider:
    """An ext_proc service on raw bytes: the cohort is what the test's header says. Keeps what Envoy showed it."""

    path: Path
    seen: list[dict[str, bytes]] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)
    server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serves Process, Health and the access log on one socket."""
        self.server = grpc.aio.server()
        process = grpc.stream_stream_rpc_method_handler(self.process)
        health = grpc.unary_unary_rpc_method_handler(self.health)
        logs = grpc.stream_unary_rpc_method_handler(self.logs)
        services = {
            "envoy.service.ext_proc.v3.ExternalProcessor": {"Process": process},
            "grpc.health.v1.Health": {"Check": health},
            "envoy.service.accesslog.v3.AccessLogService": {"StreamAccessLogs": logs},
        }
        for name, methods in services.items():
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        self.server.add_insecure_port(f"unix:{self.path}")
        await self.server.start()

    async def stop(self) -> None:
        """Ends at once, as a killed process would."""
        if self.server:
            await self.server.stop(0)
            self.server = None

    async def process(self, messages: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        """One reply per message."""
        async for message in messages:
            headers = ext_proc.ProcessingRequest.parse(message).request_headers.headers.headers
            shown = {one.key: one.raw_value for one in headers}
            self.seen.append(shown)
            yield bytes(self.reply(shown))

    def reply(self, shown: dict[str, bytes]) -> ext_proc.ProcessingResponse:
        """What perch would answer, with the routing header and the metadata under the test's control."""
        cohort = shown.get("x-test-cohort", b"stable").decode()
        model = shown.get("x-test-model", b"").decode() or shown[":path"].decode().split("/")[3]
        header = shown.get("x-test-header", cohort.encode())
        mutation = ext_proc.HeaderMutation(
            set_headers=[HeaderValueOption(header=HeaderValue(key="x-model-cohort", raw_value=header))]
        )
        common = ext_proc.CommonResponse(header_mutation=mutation, clear_route_cache=True)
        metadata = Struct.from_dict({"perch": {"model": model, "cohort": cohort, "flag": model}})
        return ext_proc.ProcessingResponse(
            request_headers=ext_proc.HeadersResponse(response=common), dynamic_metadata=metadata
        )

    async def health(self, _request: bytes, _context: Any) -> bytes:
        """SERVING."""
        return b"\x08\x01"

    async def logs(self, messages: AsyncIterator[bytes], _context: Any) -> bytes:
        """Keeps every entry."""
        async for message in messages:
            logs = StreamAccessLogsMessage.parse(message).http_logs
            self.entries.extend(logs.log_entry if logs else ())
        return b""


@dataclass(frozen=True)
class Answer:
    """What a client got; `by` is the model server's name."""

    status: int
    by: str | None
    headers: Any
    body: Any


@dataclass
class Edge:
    """A running Envoy on rendered files, its upstreams, its decider, and a client."""

    folder: Path
    models: tuple[Model, ...]
    settings: EnvoySettings
    upstreams: dict[str, Upstream]
    decider: Decider
    admin: EnvoyAdmin
    client: aiohttp.ClientSession
    port: int = 0

    async def get(self, path: str, *, size: int = 2, **headers: str) -> Answer:
        """One request; `x_user_id="7"` is the header x-user-id."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.post(
            f"http://127.0.0.1:{self.port}{path}", data=io.BytesIO(b"x" * size), headers=named
        ) as answer:
            text = await answer.text()
            content = json.loads(text) if answer.content_type == "application/json" else text
            by = content.get("by") if isinstance(content, dict) else None
            return Answer(answer.status, by, answer.headers, content)

    async def infer(self, model: str = "digits", **headers: str) -> Answer:
        """An inference request."""
        return await self.get(f"/v2/models/{model}/infer", **headers)

    def url(self, model: str) -> str:
        """Where the model takes inference requests."""
        return f"http://127.0.0.1:{self.port}/v2/models/{model}/infer"

    async def canary_log(self) -> list[dict[str, Any]]:
        """The file's lines, once Envoy has flushed it at our request."""
        connector = aiohttp.UnixConnector(self.settings.admin.removeprefix("unix:"))
        async with aiohttp.ClientSession(connector=connector) as client, client.post("http://envoy/reopen_logs"):
            path = self.folder / "canary.jsonl"
            await until(path.read_text)
            return [json.loads(line) for line in path.read_text().splitlines()]

    async def healthy(self) -> set[str]:
        """Clusters with a healthy host."""
        return {host.cluster for host in await self.admin.hosts() if host.healthy}

    def files(self, **change: Any) -> dict[str, str]:
        """The files of this edge, rendered again with a change."""
        return render(change.pop("models", self.models), self.settings, forwarded_headers(TEST_HEADERS), **change)


def a_model(name: str, canaries: int = 1) -> Model:
    canary = tuple(f"unix:{name}-canary-{n}.sock" for n in range(canaries))
    return Model(name, f"/v2/models/{name}/", (f"unix:{name}-stable-0.sock",), canary, f"/v2/models/{name}/ready")


@contextlib.asynccontextmanager
async def running(
    models: Iterable[Model], change: Callable[[dict[str, str]], dict[str, str]] = lambda files: files, **settings: Any
) -> AsyncIterator[Edge]:
    """Envoy with everything behind it up and healthy; `change` may edit the rendered files before the start."""
    folder = Path(tempfile.mkdtemp(prefix="perch-"))  # pytest's own folders are too long for a socket
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        own = {"run_dir": folder, "listen": "127.0.0.1:0", "admin": f"unix:{folder}/admin.sock"}
        rendered = EnvoySettings(**(own | {"ext_proc": ("unix:p.sock",), "access_log": "unix:p.sock"} | settings))
        upstreams = {}
        for address in (address for model in models for address in own_sockets(model)):
            path = folder / address.removeprefix("unix:")
            upstreams[path.stem] = Upstream(path.stem, path)
            await upstreams[path.stem].start()
            stack.push_async_callback(upstreams[path.stem].stop)
        decider = Decider(folder / "p.sock")
        await decider.start()
        stack.push_async_callback(decider.stop)
        admin = EnvoyAdmin(rendered.admin)
        stack.push_async_callback(admin.close)
        client = await stack.enter_async_context(aiohttp.ClientSession())
        edge = Edge(folder, tuple(models), rendered, upstreams, decider, admin, client)
        write(rendered.files, change(edge.files()))
        await stack.enter_async_context(_envoy(edge))
        yield edge


@contextlib.asynccontextmanager
async def _envoy(edge: Edge) -> AsyncIterator[None]:
    with (edge.folder / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*envoy_command(edge.settings), stderr=log, stdout=log)
    try:
        edge.port = await until(lambda: _port(edge, process))
        clusters = {
            f"{model.name}_{arm}" for model in edge.models for arm in ("stable", "canary") if getattr(model, arm)
        }
        await until(lambda: _covers(edge, clusters | {"perch"}))
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _port(edge: Edge, process: asyncio.subprocess.Process) -> int | None:
    assert process.returncode is None, (edge.folder / "envoy.log").read_text()
    try:
        return await edge.admin.listener_port()
    except EnvoyUnreachable:
        return None


async def _covers(edge: Edge, clusters: set[str]) -> bool:
    return clusters <= await edge.healthy()


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running([a_model("digits"), a_model("words")]) as edge:
        yield edge


# --- who serves -------------------------------------------------------------------------------------------------------


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


async def test_the_longest_prefix_wins_whatever_the_order_of_the_file():
    outer = replace(a_model("outer"), prefix="/v2/models/", warm="/ready")
    async with running([outer, a_model("digits")]) as edge:
        assert (await edge.infer("digits")).by == "digits-stable-0"
        assert (await edge.infer("digits", x_test_cohort="canary")).by == "digits-canary-0"
        assert (await edge.infer("else", x_test_cohort="canary", x_test_model="outer")).by == "outer-canary-0"
        assert (await edge.get("/v2/health/ready")).by == "outer-stable-0"


async def test_a_model_without_a_canary_is_served_by_stable_alone():
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


# --- what the two sides see -------------------------------------------------------------------------------------------


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


async def test_a_testers_token_reaches_perch_only_when_wanted_and_a_model_server_never(edge):
    await edge.infer(x_force_cohort="canary;token")
    assert "x-force-cohort" not in edge.decider.seen[-1]
    async with running([a_model("digits")], force_token=True) as with_token:
        await with_token.infer(x_force_cohort="canary;token")
        assert with_token.decider.seen[-1]["x-force-cohort"] == b"canary;token"
        assert "x-force-cohort" not in with_token.upstreams["digits-stable-0"].seen[-1].headers


async def test_the_access_log_names_the_assigned_and_the_served_arm():
    async with running([a_model("digits")], logged_headers=("X-User-Id",)) as edge:
        await edge.infer(x_test_cohort="canary", x_user_id="u7")
        edge.upstreams["digits-canary-0"].ready = 503
        await until(lambda: _gone(edge, "digits_canary"))
        await edge.infer(x_test_cohort="canary")
        await until(lambda: len(edge.decider.entries) == 2)
        first, second = edge.decider.entries
        for entry, served in ((first, "canary"), (second, "stable")):
            common = entry.common_properties
            assert (common.route_name, common.upstream_cluster) == ("digits.canary", f"digits_{served}")
            assert dict(common.custom_tags) == {"cohort": "canary", "served": served}
            assert "envoy.filters.http.ext_proc" in common.filter_state_objects
            assert entry.request.request_headers["x-model-cohort"] == "canary"
            expected = {
                "x-model-version": f"v-digits-{served}-0",
                "x-model-prediction": "7",
                "x-model-prediction-count": "1",
            }
            assert dict(entry.response.response_headers) == expected
        assert first.request.request_headers["x-user-id"] == "u7"


async def test_version_and_cohort_can_be_hidden_from_clients_but_not_from_the_logs():
    hidden = {"show_version": False, "show_cohort": False, "canary_log": Path("canary.jsonl")}
    async with running([a_model("digits")], **hidden) as edge:
        for cohort in ("stable", "canary"):
            answer = await edge.infer(x_test_cohort=cohort)
            assert not {"x-model-version", "x-model-cohort"} & {name.lower() for name in answer.headers}
        await until(lambda: len(edge.decider.entries) == 2)
        tags = [entry.common_properties.custom_tags["model_version"] for entry in edge.decider.entries]
        assert tags == ["v-digits-stable-0", "v-digits-canary-0"]
        (line,) = await edge.canary_log()
        assert line["model_version"] == "v-digits-canary-0"


async def test_the_canary_log_has_one_line_per_canary_request_with_nobody_reading_the_access_log():
    settings = {"canary_log": Path("canary.jsonl"), "access_log": "unix:nobody.sock"}
    async with running([a_model("digits")], **settings) as edge:
        answers = [await edge.infer(x_test_cohort=cohort) for cohort in ["stable", "canary"] * 10]
        lines = await edge.canary_log()
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


async def test_envoys_own_stats_reach_dogstatsd():
    loop = asyncio.get_running_loop()
    packets: asyncio.Queue[bytes] = asyncio.Queue()

    class Listener(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _addr: Any) -> None:
            packets.put_nowait(data)

    transport, _ = await loop.create_datagram_endpoint(Listener, local_addr=("127.0.0.1", 0))
    statsd = f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"

    def flush_fast(files: dict[str, str]) -> dict[str, str]:
        return files | {
            "bootstrap.yaml": changed(files["bootstrap.yaml"], 'flush_interval: "5s"', 'flush_interval: "0.2s"')
        }

    async with running([a_model("digits")], flush_fast, statsd=statsd) as edge, asyncio.timeout(DEADLINE_S):
        await edge.infer(x_test_cohort="canary")
        while b"envoy.cluster.upstream_rq_total" not in (packet := await packets.get()):
            assert len(packet) <= 1400
        assert b"|c|#" in packet
    transport.close()


# --- when something is down -------------------------------------------------------------------------------------------


async def test_without_perch_everybody_gets_stable_and_the_canary_comes_back_with_it(edge):
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"
    await edge.decider.stop()
    for _ in range(20):
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.by, answer.headers["x-model-cohort"]) == (200, "digits-stable-0", "stable")
    failed_open = await edge.admin.counters(r"ext_proc\.perch\.failure_mode_allowed$")
    assert list(failed_open.values()) == [20]
    await edge.decider.start()
    await until(lambda: _is_served_by(edge, "digits-canary-0"))


async def _is_served_by(edge: Edge, name: str) -> bool:
    return (await edge.infer(x_test_cohort="canary")).by == name


async def _gone(edge: Edge, cluster: str) -> bool:
    return cluster not in await edge.healthy()


def never_check_again(files: dict[str, str]) -> dict[str, str]:
    """Health checks once at the start: a host that goes away then stays healthy in Envoy's eyes."""
    return files | {"cds.yaml": changed(files["cds.yaml"], 'interval: "1s"', 'interval: "600s"')}


@pytest.mark.parametrize("size", [1_000, 2_000_000])
async def test_a_refusing_canary_is_retried_on_stable_with_the_whole_body(size):
    async with running([a_model("digits", canaries=2)], never_check_again) as edge:
        for name in ("digits-canary-0", "digits-canary-1"):
            await edge.upstreams[name].stop()
        for _ in range(5):
            answer = await edge.get("/v2/models/digits/infer", size=size, x_test_cohort="canary")
            assert (answer.status, answer.by, answer.body["size"]) == (200, "digits-stable-0", size)
            assert answer.headers["x-model-cohort"] == "stable"
        assert "digits_canary" in await edge.healthy()


async def test_with_one_of_two_canaries_refusing_a_user_stays_on_the_other():
    async with running([a_model("digits", canaries=2)], never_check_again) as edge:
        await edge.upstreams["digits-canary-0"].stop()
        for _ in range(20):
            assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-1"


async def test_an_unready_canary_gets_no_traffic_and_its_health_is_seen_through_admin(edge):
    canary = edge.upstreams["digits-canary-0"]
    canary.ready = 503
    await until(lambda: _gone(edge, "digits_canary"))
    hosts = {host.cluster: host for host in await edge.admin.hosts()}
    assert not hosts["digits_canary"].healthy
    assert (hosts["digits_canary"].model, hosts["digits_canary"].served) == ("digits", "canary")
    assert hosts["digits_canary"].address == f"unix:{canary.path}"
    assert hosts["words_canary"].healthy
    assert hosts["perch"].model is None
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-stable-0"
    assert canary.seen == []
    canary.ready = 200
    await until(lambda: _is_served_by(edge, "digits-canary-0"))


async def test_a_canary_that_answers_errors_keeps_its_users_and_hides_nothing(edge):
    edge.upstreams["digits-canary-0"].status = 500
    for _ in range(20):
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.by) == (500, "digits-canary-0")


async def test_a_late_answer_is_a_504_at_the_models_own_deadline():
    async with running([replace(a_model("digits"), deadline_s=0.1)]) as edge:
        edge.upstreams["digits-canary-0"].delay_s = 5
        answer = await edge.infer(x_test_cohort="canary")
        assert (answer.status, answer.body) == (504, {"error": "upstream request timeout"})
        assert answer.headers["x-model-cohort"] == "canary"


async def test_a_second_envoy_cannot_take_the_port_silently(edge):
    async with edge_without_listener(edge) as second:
        assert await second.listener_port() is None
        assert list((await second.counters(r"^listener_manager\.lds\.update_rejected$")).values()) == [1]


@contextlib.asynccontextmanager
async def edge_without_listener(edge: Edge) -> AsyncIterator[EnvoyAdmin]:
    """A second Envoy on the port of the first, once it has tried to listen there."""
    folder = edge.folder / "2"
    listen, admin = f"127.0.0.1:{edge.port}", EnvoyAdmin(f"unix:{folder}/admin.sock")
    settings = replace(edge.settings, run_dir=folder, listen=listen, admin=f"unix:{folder}/admin.sock")
    write(settings.files, render(edge.models, settings))
    process = await asyncio.create_subprocess_exec(*envoy_command(settings), stderr=asyncio.subprocess.DEVNULL)
    try:
        await until((folder / "admin.sock").exists)
        await until(lambda: admin.counters(r"^listener_manager\.lds\.update_(rejected|success)$"))
        await until(lambda: _moved(admin, r"^listener_manager\.lds\.update_attempt$"))
        yield admin
    finally:
        process.kill()
        await process.wait()
        await admin.close()


async def _moved(admin: EnvoyAdmin, pattern: str, above: int = 0) -> bool:
    return any(value > above for value in (await admin.counters(pattern)).values())


async def test_admin_neither_stops_envoy_nor_changes_its_runtime(edge):
    connector = aiohttp.UnixConnector(edge.settings.admin.removeprefix("unix:"))
    async with aiohttp.ClientSession(connector=connector) as client:
        for path in ("/quitquitquit", "/runtime_modify?perch.digits.canary_pct=0", "/logging?level=trace"):
            async with client.post(f"http://envoy{path}") as answer:
                assert answer.status == 403
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"


# --- files replaced under a running Envoy -----------------------------------------------------------------------------


async def test_a_newly_forwarded_header_reaches_perch_on_the_open_connection(edge):
    await edge.infer(x_tenant="acme")
    assert "x-tenant" not in edge.decider.seen[-1]
    text = render_filter(forwarded_headers([*TEST_HEADERS, "X-Tenant", "cookie:uid"]))
    assert write(edge.settings.files, {"ecds.yaml": text}) == ("ecds.yaml",)
    await until(lambda: _filter_is(edge, version_of(text)))
    await edge.infer(x_tenant="acme", cookie="uid=7")
    assert (edge.decider.seen[-1]["x-tenant"], edge.decider.seen[-1]["cookie"]) == (b"acme", b"uid=7")
    stats = await edge.admin.counters(r"^http\.edge\.downstream_cx_total$|^listener_manager\.listener_modified$")
    assert list(stats.values()) == [1, 0]


async def _filter_is(edge: Edge, version: str) -> bool:
    return await edge.admin.filter_version() == version


async def test_the_second_kill_switch_closes_one_model_and_opens_it_again(edge):
    write(edge.settings.files, {"rtds.yaml": render_runtime(edge.models, ["digits"])})
    await until(lambda: _is_served_by(edge, "digits-stable-0"))
    assert (await edge.infer("words", x_test_cohort="canary")).by == "words-canary-0"
    write(edge.settings.files, {"rtds.yaml": render_runtime(edge.models)})
    await until(lambda: _is_served_by(edge, "digits-canary-0"))


async def test_a_model_comes_and_goes_without_one_failed_request(edge):
    extra = Upstream("letters-stable-0", edge.folder / "letters-stable-0.sock")
    await extra.start()
    statuses: list[int] = []

    async def traffic() -> None:
        while True:
            statuses.append((await edge.infer(x_test_cohort="canary")).status)

    clients = [asyncio.create_task(traffic()) for _ in range(4)]
    letters = a_model("letters", canaries=0)
    assert write(edge.settings.files, edge.files(models=(*edge.models, letters))) == (
        "cds.yaml",
        "rtds.yaml",
        "rds.yaml",
    )
    await until(lambda: _status_is(edge, "letters", 200))
    write(edge.settings.files, edge.files(models=edge.models[:1]))
    await until(lambda: _status_is(edge, "letters", 404))
    await until(lambda: _gone(edge, "words_canary"))
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    await extra.stop()
    assert set(statuses) == {200}


async def _status_is(edge: Edge, model: str, status: int) -> bool:
    return (await edge.infer(model)).status == status


REJECTIONS = {
    "cds.yaml": r"^cluster_manager\.cds\.update_(rejected|failure)$",
    "lds.yaml": r"^listener_manager\.lds\.update_(rejected|failure)$",
    "rds.yaml": r"^http\.edge\.rds\.models\.update_(rejected|failure)$",
    "ecds.yaml": r"ext_proc\.update_(rejected|failure)$",
    "rtds.yaml": r"^runtime\.update_(rejected|failure)$",
}


@pytest.mark.parametrize("broken", ["resources: [", "resources: [{name: x}]\n"])
async def test_a_broken_file_keeps_the_last_good_one(edge, broken):
    for name, pattern in REJECTIONS.items():
        write(edge.settings.files, {name: broken})
        await until(lambda pattern=pattern: _moved(edge.admin, pattern))
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"
    assert (await edge.infer("words")).by == "words-stable-0"
    write(edge.settings.files, edge.files(killed=["digits"]))
    await until(lambda: _is_served_by(edge, "digits-stable-0"))


async def test_a_broken_filter_file_at_the_start_is_no_500():
    async with running([a_model("digits")], lambda files: files | {"ecds.yaml": "resources: ["}) as edge:
        assert (await edge.infer(x_test_cohort="canary", x_user_id="u7")).status == 200
        assert edge.decider.seen[-1]["x-user-id"] == b"u7"
        write(edge.settings.files, edge.files())
        await until(lambda: _is_served_by(edge, "digits-canary-0"))


# --- every shape boots ------------------------------------------------------------------------------------------------


async def test_every_envoy_file_of_the_repository_boots():
    used = {
        "bootstrap.yaml",
        "clusters.yaml",
        "ext_proc.yaml",
        "listener.yaml",
        "models.yaml",
        "routes.yaml",
        "runtime.yaml",
    }
    assert {path.name for path in template_folder().iterdir()} == used
    settings = {"canary_log": Path("canary.jsonl"), "statsd": "127.0.0.1:9", "concurrency": 2}
    async with running(load_models(template_folder() / "models.yaml"), **settings) as edge:
        assert (await edge.infer(x_test_cohort="canary")).headers["x-model-cohort"] == "canary"
        assert (await edge.infer()).headers["x-model-cohort"] == "stable"
        log = (edge.folder / "envoy.log").read_text()
        assert "deprecated" not in log.lower()
        assert "[error]" not in log


async def test_hosts_may_be_names_and_addresses():
    by_name, by_address = Upstream("by-name", Path()), Upstream("by-address", Path())
    ports = [await by_name.start(tcp=True), await by_address.start(tcp=True)]
    model = replace(a_model("digits"), stable=(f"localhost:{ports[0]}",), canary=(f"127.0.0.1:{ports[1]}",))
    async with running([model]) as edge:
        assert (await edge.infer()).by == "by-name"
        assert (await edge.infer(x_test_cohort="canary")).by == "by-address"
        addresses = {host.address for host in await edge.admin.hosts() if host.model}
        assert addresses == {f"127.0.0.1:{port}" for port in ports}
    await by_name.stop()
    await by_address.stop()

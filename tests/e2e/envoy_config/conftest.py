"""A rendered configuration in the real Envoy, with real upstreams and real ext_proc streams behind it."""

import asyncio
import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption
from envoy_data_plane.envoy.service.accesslog.v3 import StreamAccessLogsMessage
from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc
from envoy_data_plane.google.protobuf import Struct

from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable
from extproc.envoyfile import EnvoySettings, envoy_command, forwarded_headers, render, write
from extproc.modelsfile import Model, own_sockets

TEST_HEADERS = ("x-test-cohort", "x-test-model", "x-test-header", "random")
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


def patient(text: str) -> str:
    """A busy machine may keep what is in this process from answering in time, and Envoy would go on without it.

    The decider and the model servers fail a health check by what they say, or by refusing it, and not by being late;
    and no connection is taken for dead because a ping was answered late.
    """
    text = text.replace('message_timeout: "0.5s"', 'message_timeout: "10s"')
    text = text.replace('health_checks:\n  - timeout: "0.5s"', 'health_checks:\n  - timeout: "10s"')
    return re.sub(r'(connection_keepalive:\s+interval: "10s"\s+timeout: )"1s"', r'\1"20s"', text)


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

    async def canary_log(self, lines: int) -> list[dict[str, Any]]:
        """The file's lines, once Envoy has flushed so many of them at our request."""
        connector = aiohttp.UnixConnector(self.settings.admin.removeprefix("unix:"))
        async with aiohttp.ClientSession(connector=connector) as client, client.post("http://envoy/reopen_logs"):
            path = self.folder / "canary.jsonl"
            await until(lambda: path.read_text().count("\n") >= lines)
            return [json.loads(line) for line in path.read_text().splitlines()]

    async def healthy(self) -> set[str]:
        """Clusters with a healthy host."""
        return {host.cluster for host in await self.admin.hosts() if host.healthy}

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Waits, with a deadline, for the condition's first true answer, and gives it back."""
        return await until(condition)

    async def gone(self, cluster: str) -> bool:
        """No host of the cluster is healthy."""
        return cluster not in await self.healthy()

    async def is_served_by(self, name: str, cohort: str = "canary") -> bool:
        """Ten requests in a row that were decided for a cohort are answered by this server."""
        return {(await self.infer(x_test_cohort=cohort)).by for _ in range(10)} == {name}

    async def filter_is(self, version: str) -> bool:
        """Envoy uses this version of the ext_proc filter."""
        return await self.admin.filter_version() == version

    async def answers(self, model: str, status: int) -> bool:
        """A request for the model gets this status."""
        return (await self.infer(model)).status == status

    async def counted(self, pattern: str) -> bool:
        """A counter that matches is above zero."""
        return any((await self.admin.counters(pattern)).values())

    def files(self, **change: Any) -> dict[str, str]:
        """The files of this edge, rendered again with a change."""
        models = change.pop("models", self.models)
        files = render(models, self.settings, forwarded_headers(TEST_HEADERS), **change)
        return {name: patient(text) for name, text in files.items()}


def a_model(name: str, canaries: int = 1) -> Model:
    canary = tuple(f"unix:{name}-canary-{n}.sock" for n in range(canaries))
    return Model(name, f"/v2/models/{name}/", (f"unix:{name}-stable-0.sock",), canary, f"/v2/models/{name}/ready")


@contextlib.asynccontextmanager
async def running(
    models: Iterable[Model],
    change: Callable[[dict[str, str]], dict[str, str]] = lambda files: files,
    before_start: Callable[[Edge], None] = lambda _: None,
    **settings: Any,
) -> AsyncIterator[Edge]:
    """Envoy and all behind it, up and healthy; `change` may edit the rendered text, `before_start` the folder."""
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
        before_start(edge)
        await stack.enter_async_context(_envoy(edge))
        yield edge


@contextlib.asynccontextmanager
async def _envoy(edge: Edge) -> AsyncIterator[None]:
    with (edge.folder / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*envoy_command(edge.settings), stderr=log, stdout=log)
    try:
        edge.port = await until(lambda: _port(edge, process))
        await until(lambda: _all_healthy(edge))
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


async def _all_healthy(edge: Edge) -> bool:
    """Not only one of each cluster: with checks switched off, what is unhealthy now stays so."""
    hosts = await edge.admin.hosts()
    checked = [host.healthy for host in hosts if host.cluster != "perch_als"]
    return all(checked) and len(checked) > sum(len(model.stable + model.canary) for model in edge.models)


@pytest.fixture(name="a_model")
def _a_model() -> Callable[..., Model]:
    """A model on sockets of the run folder, by name and number of canary servers."""
    return a_model


@pytest.fixture(name="running")
def _running() -> Callable[..., Any]:
    """The context of a running edge: `async with running([models], change_of_files, **settings) as edge`."""
    return running


@pytest.fixture
async def stranger(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server that perch does not own, by name, on a free port or on a given socket."""
    started = []

    async def start(name: str, path: Path | None = None) -> tuple[Upstream, int]:
        started.append(Upstream(name, path or tmp_path / "unused"))
        return started[-1], await started[-1].start(tcp=path is None)

    yield start
    for upstream in started:
        await upstream.stop()


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    """An edge with two models, each with one server per arm."""
    async with running([a_model("digits"), a_model("words")]) as edge:
        yield edge


@pytest.fixture
def never_check_again() -> Callable[[dict[str, str]], dict[str, str]]:
    """Health checks once at the start: a host that goes away then stays healthy in Envoy's eyes."""

    def change(files: dict[str, str]) -> dict[str, str]:
        assert 'interval: "1s"' in files["cds.yaml"]
        return files | {"cds.yaml": files["cds.yaml"].replace('interval: "1s"', 'interval: "600s"')}

    return change

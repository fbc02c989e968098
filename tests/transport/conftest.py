"""Peers for the transport tests: a real Envoy, a client that writes raw frames, and servers on ephemeral addresses."""
# ruff: noqa: D102  methods here are named after the frame they build or the bytes they read

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from hpack import Decoder, Encoder

from extproc.transport.connection import Connection
from extproc.transport.fastlane import FastLane
from extproc.transport.grpcio import GrpcioTransport
from extproc.transport.limits import Limits

ENVOY = Path(sys.executable).with_name("envoy")
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
DEFAULTS = Limits()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Envoy's patience is longer than a stall of the process that serves and asks: what it tells of is the server's doing.
BOOTSTRAP = """
node: {{id: test, cluster: test}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
layered_runtime:
  layers:
  - {{name: static, static_layer: {{envoy.reloadable_features.ext_proc_graceful_grpc_close: {graceful}}}}}
static_resources:
  listeners:
  - name: edge
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: edge
          http_filters:
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {{cluster_name: perch, skip_envoy_headers: true}}
                retry_policy:
                  num_retries: 2
                  retry_on: connect-failure,refused-stream,unavailable
                  retry_back_off: {{base_interval: 0.001s, max_interval: 0.005s}}
                  host_selection_retry_max_attempts: 5
                  retry_host_predicate:
                  - name: envoy.retry_host_predicates.previous_hosts
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
              failure_mode_allow: true
              message_timeout: 60s
              stat_prefix: perch
              processing_mode: {{response_header_mode: SKIP}}
              mutation_rules: {{allow_expression: {{regex: x-model-cohort}}}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: v
              domains: ["*"]
              routes:
              - match: {{prefix: "/", headers: [{{name: x-model-cohort, string_match: {{exact: canary}}}}]}}
                direct_response: {{status: 200, body: {{inline_string: canary}}}}
              - {{match: {{prefix: "/"}}, direct_response: {{status: 200, body: {{inline_string: stable}}}}}}
  clusters:
  - name: perch
    type: STATIC
    connect_timeout: 30s
    common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}
    circuit_breakers: {{thresholds: [{{max_requests: 65536, max_pending_requests: 65536, max_retries: 65536}}]}}
    health_checks:
    - timeout: 30s
      interval: 0.2s
      no_traffic_interval: 0.2s
      unhealthy_threshold: 1
      healthy_threshold: 1
      grpc_health_check: {{}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{connection_keepalive: {{interval: 1s, timeout: 30s}}}}}}
    load_assignment:
      cluster_name: perch
      endpoints: [{{lb_endpoints: [{endpoints}]}}]
"""


def pytest_asyncio_loop_factories(config, item):
    """Every async test here runs on asyncio's own loop and on uvloop, whose transports are another implementation."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def canary() -> bytes:
    """A serialized ProcessingResponse: x-model-cohort: canary as raw_value, clear_route_cache."""
    return bytes.fromhex("0a240a22121e0a1c0a180a0e782d6d6f64656c2d636f686f72741a0663616e61727918022801")


@dataclass
class Envoy:
    """A running Envoy: the port of its listener, its counters, and requests to it."""

    admin: str
    port: int
    process: subprocess.Popen

    def stats(self, wanted: str) -> dict[str, int]:
        with urllib.request.urlopen(f"http://{self.admin}/stats?format=json&filter={wanted}", timeout=60) as response:
            return {stat["name"]: stat.get("value", 0) for stat in json.load(response)["stats"] if "name" in stat}

    def healthy(self, servers: int = 1) -> bool:
        return self.stats("cluster.perch.membership_healthy").get("cluster.perch.membership_healthy") == servers


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    """Blocks until the condition holds; never on the event loop's thread."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.02)
    pytest.fail(f"still not after {deadline_s} s: {what}")


@contextlib.contextmanager
def running_envoy(folder: Path, *sockets: Path, graceful: bool) -> Iterator[Envoy]:
    folder.mkdir(exist_ok=True)
    config, admin_file = folder / "envoy.yaml", folder / "admin.txt"
    endpoints = ", ".join(f"{{endpoint: {{address: {{pipe: {{path: {path}}}}}}}}}" for path in sockets)
    config.write_text(BOOTSTRAP.format(graceful=str(graceful).lower(), endpoints=endpoints))
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            [ENVOY, "-c", config, "--admin-address-path", admin_file, "--concurrency", "1",
             "--use-dynamic-base-id", "--log-level", "warning"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: admin_file.exists() and ":" in admin_file.read_text(), "Envoy's admin address")
        admin = admin_file.read_text().strip()
        wait_until(lambda: b"LIVE" in urllib.request.urlopen(f"http://{admin}/ready", timeout=60).read(), "Envoy ready")
        with urllib.request.urlopen(f"http://{admin}/listeners?format=json", timeout=60) as response:
            (listener,) = json.load(response)["listener_statuses"]
        yield Envoy(admin, listener["local_address"]["socket_address"]["port_value"], process)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def start_envoy() -> Callable[..., contextlib.AbstractContextManager[Envoy]]:
    """A context manager (folder, *sockets, graceful=...) around a running Envoy. It blocks: call it in a thread."""
    if not ENVOY.exists():
        pytest.skip("no envoy beside the Python that runs the tests")
    return running_envoy


@pytest.fixture
def eventually() -> Callable[..., None]:
    return wait_until


@pytest.fixture(params=["fastlane", "grpcio"])
def transport_class(request) -> type:
    """Both transports, for everything that must hold over either."""
    return {"fastlane": FastLane, "grpcio": GrpcioTransport}[request.param]


@dataclass
class Served:
    """A fast lane that runs in the test's loop; `serving` may be changed."""

    lane: FastLane
    address: str
    serving: bool = True
    seen: list[bytes] = field(default_factory=list)


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """Starts fast lanes (answer, limits=..., listen=...) that the end of the test stops."""
    started: list[FastLane] = []

    async def start(answer=None, *, limits: Limits = DEFAULTS, listen: str = "127.0.0.1:0") -> Served:
        served: Served

        def echo(message: bytes) -> bytes:
            served.seen.append(message)
            return b"re:" + message

        lane = FastLane(answer or echo, lambda: served.serving, limits=limits)
        served = Served(lane, await lane.start(listen))
        started.append(lane)
        return served

    yield start
    for lane in started:
        await lane.stop(0.2)


# Raw frames.

TYPES = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE",
         "CONTINUATION")  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """One received frame. Header blocks are decoded into `headers`."""

    kind: str
    flags: int
    stream_id: int
    payload: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The error code of RST_STREAM or GOAWAY."""
        return struct.unpack(">I", self.payload[:4] if self.kind == "RST_STREAM" else self.payload[4:8])[0]

    @property
    def ends(self) -> bool:
        return self.kind in ("DATA", "HEADERS") and bool(self.flags & 1)


class Wire:
    """Builds frames by hand, right or wrong, and reads them; independent of the code under test."""

    def __init__(self) -> None:
        self.encoder = Encoder()
        self.encoder.header_table_size = 0
        self.encoder.table_size_changes = []
        self.encoder.header_table.resized = False
        self.decoder = Decoder()
        self._rest = b""

    @staticmethod
    def frame(kind: int | str, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
        number = TYPES.index(kind) if isinstance(kind, str) else kind
        return len(payload).to_bytes(3, "big") + bytes((number, flags)) + struct.pack(">I", stream_id) + payload

    def block(self, fields: list[tuple[str, str]]) -> bytes:
        return self.encoder.encode(fields, huffman=False)

    @staticmethod
    def grpc_fields(path: str = PROCESS, **more: str) -> list[tuple[str, str]]:
        return [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "perch"), ("te", "trailers"),
            ("content-type", "application/grpc"), *((name.replace("_", "-"), value) for name, value in more.items()),
        ]  # fmt: skip

    @staticmethod
    def plain_fields(method: str = "GET", **more: str) -> list[tuple[str, str]]:
        return [
            (":method", method), (":scheme", "http"), (":path", "/"), (":authority", "perch"),
            *((name.replace("_", "-"), value) for name, value in more.items()),
        ]  # fmt: skip

    def headers(self, stream_id: int, fields: list[tuple[str, str]], *, end: bool = False) -> bytes:
        return self.frame("HEADERS", 0x4 | end, stream_id, self.block(fields))

    def data(self, stream_id: int, payload: bytes, *, end: bool = False) -> bytes:
        return self.frame("DATA", int(end), stream_id, payload)

    def message(self, stream_id: int, payload: bytes, *, end: bool = False) -> bytes:
        return self.data(stream_id, b"\0" + struct.pack(">I", len(payload)) + payload, end=end)

    def settings(self, *values: tuple[int, int], flags: int = 0) -> bytes:
        return self.frame("SETTINGS", flags, 0, b"".join(struct.pack(">HI", *value) for value in values))

    def window_update(self, stream_id: int, increment: int) -> bytes:
        return self.frame("WINDOW_UPDATE", 0, stream_id, struct.pack(">I", increment))

    def rst(self, stream_id: int, code: int = 8) -> bytes:
        return self.frame("RST_STREAM", 0, stream_id, struct.pack(">I", code))

    def read(self, data: bytes) -> list[Frame]:
        """The complete frames in what has been received so far and not been read."""
        data = self._rest + data
        found = []
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
            size, kind, flags = int.from_bytes(data[:3], "big"), TYPES[data[3]], data[4]
            payload, stream_id = data[9 : 9 + size], struct.unpack(">I", data[5:9])[0]
            decoded = dict(self.decoder.decode(payload)) if kind == "HEADERS" else {}
            found.append(Frame(kind, flags, stream_id, payload, decoded))
            data = data[9 + size :]
        self._rest = data
        return found


@pytest.fixture
def wire() -> Wire:
    return Wire()


class Peer:
    """A client in memory: writes to a Connection and reads its frames."""

    def __init__(self, answer: Callable[[bytes], bytes], limits: Limits, serving: Callable[[], bool]) -> None:
        self.connection = Connection(answer, serving, limits)
        self.wire = Wire()
        self.opening = self.wire.read(self.connection.open())

    def send(self, *pieces: bytes) -> list[Frame]:
        return self.wire.read(self.connection.receive(b"".join(pieces)))

    def greet(self, *settings: tuple[int, int]) -> list[Frame]:
        return self.send(PREFACE, self.wire.settings(*settings), self.wire.settings(flags=1))


@pytest.fixture
def new_peer() -> Callable[..., Peer]:
    """Makes clients in memory (answer, limits=..., serving=..., greet=True)."""

    def new(answer=lambda message: b"re:" + message, *, limits=DEFAULTS, serving=lambda: True, greet=True) -> Peer:
        peer = Peer(answer, limits, serving)
        if greet:
            peer.greet()
        return peer

    return new


@pytest.fixture
def peer(new_peer) -> Peer:
    """A client that has exchanged SETTINGS."""
    return new_peer()


@dataclass
class Socket:
    """A raw client over a real socket."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    wire: Wire

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    async def read_until(self, wanted: Callable[[Frame], bool], deadline_s: float = 60.0) -> list[Frame]:
        """Frames up to the first wanted one; fails at the end of the stream or the deadline."""
        got: list[Frame] = []
        async with asyncio.timeout(deadline_s):
            while True:
                data = await self.reader.read(65_536)
                assert data, f"closed after {got[-3:]}"
                new = self.wire.read(data)
                got += new
                if any(map(wanted, new)):
                    return got

    async def read_to_end(self, deadline_s: float = 60.0) -> list[Frame]:
        async with asyncio.timeout(deadline_s):
            return self.wire.read(await self.reader.read(-1))


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., object]]:
    """Connects raw clients to "unix:PATH" or "HOST:PORT"; they are closed at the end of the test."""
    opened: list[asyncio.StreamWriter] = []

    async def open_one(address: str, *, receive_buffer: int | None = None) -> Socket:
        unix = address.startswith("unix:")
        raw = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        host, _, port = address.rpartition(":")
        raw.connect(address.removeprefix("unix:") if unix else (host, int(port)))
        raw.setblocking(False)
        opener = asyncio.open_unix_connection if unix else asyncio.open_connection
        reader, writer = await opener(sock=raw)
        opened.append(writer)
        return Socket(reader, writer, Wire())

    yield open_one
    for writer in opened:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

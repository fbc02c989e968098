"""A running `perch serve` and what speaks to it: Envoy's messages, health checks, flag files. All of it real."""
# ruff: noqa: D102  methods here are named after what they give

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

with warnings.catch_warnings():  # envoy-data-plane 2.2 uses pydantic in a way that pydantic 2.12 dislikes
    warnings.simplefilter("ignore", DeprecationWarning)
    from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
    from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest, ProcessingResponse

ROOT = Path(__file__).parents[2]
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/"
PATH = b"/v2/models/digits/infer"
MODELS = """\
digits: {prefix: /v2/models/digits/, stable: [unix:d-s.sock], canary: [unix:d-c.sock]}
wine: {prefix: /v2/models/wine/, stable: [unix:w-s.sock], canary: [unix:w-c0.sock, unix:w-c1.sock], min_healthy: 2}
"""
TOKEN = "correct-horse-battery"
DEADLINE_S = 60.0


def flags_yaml(canary: object = 5, *, salt: str = "digits", more: str = "") -> str:
    """A flag file of one flag; `more` are further lines of the flag."""
    lines = [f"    {line}\n" for line in more.splitlines()]
    return f"version: 1\nflags:\n  digits:\n    salt: {salt}\n    canary: {canary}\n" + "".join(lines)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Blocks until the condition holds, and gives what it gave."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    return pytest.fail(f"still not after {deadline_s} s: {what}")


def request_bytes(pairs: Iterable[tuple[bytes, bytes]] = (), path: bytes = PATH) -> bytes:
    """A serialized ProcessingRequest as Envoy sends it: pseudo headers first, values in raw_value."""
    every = [(b":method", b"POST"), (b":path", path), (b":authority", b"models"), *pairs]
    headers = [HeaderValue(key=name.decode(), raw_value=value) for name, value in every]
    return bytes(ProcessingRequest(request_headers=HttpHeaders(headers=HeaderMap(headers=headers))))


@dataclass(frozen=True)
class Reply:
    """A ProcessingResponse to request headers, taken apart with envoy-data-plane's types."""

    cohort: str
    clears_route_cache: bool
    metadata: dict[str, Any]

    @property
    def what(self) -> tuple[str, str]:
        return self.cohort, self.metadata["reason"]


def decode(reply: bytes) -> Reply:
    """The one reply to request headers; fails for anything else."""
    message = ProcessingResponse.parse(reply)
    assert message.request_headers is not None, message
    common = message.request_headers.response
    (option,) = common.header_mutation.set_headers
    assert option.header.key == "x-model-cohort"
    assert option.header.value == ""
    assert not common.header_mutation.remove_headers
    (fields,) = (value.struct_value.fields for key, value in message.dynamic_metadata.fields.items() if key == "perch")
    metadata = {
        key: value.number_value if value.number_value is not None else value.string_value
        for key, value in fields.items()
    }
    cohort = option.header.raw_value.decode()
    assert metadata["cohort"] == cohort
    return Reply(cohort, common.clear_route_cache, metadata)


@dataclass
class Client:
    """A gRPC client of one ext_proc address."""

    address: str
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
        )

    def process(self, *messages: bytes) -> list[bytes]:
        """The replies on one stream to these messages."""
        return list(self.channel.stream_stream(PROCESS)(iter(messages), timeout=DEADLINE_S, wait_for_ready=True))

    def ask(self, user: str | None = "alice", *headers: tuple[bytes, bytes], path: bytes = PATH) -> Reply:
        """What one user gets."""
        pairs = [(b"x-user-id", user.encode()), *headers] if user is not None else headers
        (reply,) = self.process(request_bytes(pairs, path))
        return decode(reply)

    def health(self, service: str = "") -> int:
        """1 serving, 2 not serving. Raises grpc.RpcError."""
        name = service.encode()
        request = b"\x0a" + bytes([len(name)]) + name if name else b""
        answer = self.channel.unary_unary(HEALTH + "Check")(request, timeout=DEADLINE_S, wait_for_ready=True)
        return answer[1]

    def close(self) -> None:
        self.channel.close()


@dataclass
class Folder:
    """Where one perch lives: flag file, models, state, sockets."""

    root: Path

    def __post_init__(self) -> None:
        (self.root / "flags").mkdir()
        self.models.write_text(MODELS, encoding="utf-8")

    @property
    def flags(self) -> Path:
        return self.root / "flags" / "flags.yaml"

    @property
    def models(self) -> Path:
        return self.root / "models.yaml"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def socket(self) -> Path:
        return self.root / "p.sock"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def put(self, content: str | bytes) -> str:
        """Renames a new flag file over the old one, as editors do; the version's first part."""
        data = content.encode() if isinstance(content, str) else content
        scratch = self.flags.with_name(".scratch")
        scratch.write_bytes(data)
        scratch.replace(self.flags)
        return digest(data)

    def put_exposures(self, text: str) -> None:
        """The same for the controller's file."""
        self.state.mkdir(exist_ok=True)
        scratch = self.state / ".scratch"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(self.state / "exposure.json")


def digest(content: bytes) -> str:
    """The part of a ruleset's version that comes from the flag file."""
    return hashlib.sha256(content).hexdigest()[:12]


def perch_environment(folder: Folder, **settings: object) -> dict[str, str]:
    """The environment of one perch: nothing of it comes from outside but the PATH."""
    given = {"models": folder.models, "flags": folder.flags, "state": folder.state, "run": folder.root, **settings}
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        **{f"PERCH_{name.upper()}": str(value) for name, value in given.items()},
    }


@dataclass
class Perch:
    """A `perch serve` that runs."""

    folder: Folder
    workers: int = 1
    settings: dict[str, object] = field(default_factory=dict)
    process: subprocess.Popen = field(init=False)
    clients: dict[str, Client] = field(default_factory=dict)

    def start(self) -> "Perch":
        command = [sys.executable, "-m", "extproc", "serve", "--listen", f"unix:{self.folder.socket}"]
        with self.folder.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", str(self.workers)],
                env=perch_environment(self.folder, **self.settings),
                cwd=self.folder.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self.listens, f"perch serve listens; its log:\n{self.log()}")
        return self

    @property
    def sockets(self) -> list[Path]:
        socket = self.folder.socket
        return [socket] if self.workers == 1 else [Path(f"{socket}.{i}") for i in range(self.workers)]

    def listens(self) -> bool:
        assert self.process.poll() is None, f"perch serve ended:\n{self.log()}"
        return all(socket.is_socket() for socket in self.sockets)

    def log(self) -> str:
        return self.folder.log.read_text(encoding="utf-8", errors="replace") if self.folder.log.exists() else ""

    def events(self, kind: str) -> list[str]:
        """The texts of the events of this kind that were told so far."""
        return re.findall(rf" serve: {kind}: (.*)\n", self.log())

    def client(self, worker: int = 0) -> Client:
        address = f"unix:{self.sockets[worker]}"
        if address not in self.clients:
            self.clients[address] = Client(address)
        return self.clients[address]

    def connect_anew(self) -> None:
        """After a worker was killed: who asks over its connection may be the first to hear of it, and gets an error."""
        while self.clients:
            self.clients.popitem()[1].close()

    def ask(self, *args, worker: int = 0, **kwargs) -> Reply:
        assert self.process.poll() is None, f"perch serve ended:\n{self.log()}"
        return self.client(worker).ask(*args, **kwargs)

    def version(self, worker: int = 0) -> str:
        return self.ask(worker=worker).metadata["version"]

    def wait_for_file(self, file_digest: str, worker: int = 0) -> Reply:
        """Waits until the flag file with this digest decides."""
        wait_until(
            lambda: self.version(worker).partition(".")[0] == file_digest, f"{file_digest} is served\n{self.log()}"
        )
        return self.ask(worker=worker)

    def put(self, content: str | bytes) -> Reply:
        """Puts a good flag file and waits until it decides."""
        return self.wait_for_file(self.folder.put(content))

    def wait_for_event(self, kind: str, n: int = 1) -> list[str]:
        """Waits until `n` events of this kind have been told."""
        wait_until(lambda: len(self.events(kind)) >= n, f"{n} {kind}")
        return self.events(kind)

    def children(self) -> list[int]:
        """Processes that this one started."""
        return children_of(self.process.pid)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def end(self) -> None:
        """Whatever state it is in, nothing of it is left."""
        for client in self.clients.values():
            client.close()
        children = self.children()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """The processes whose parent this one is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def murmur3_x86_32(data: bytes, seed: int) -> int:
    """Written from the algorithm's description: blocks of four bytes, a tail, a finalizer."""

    def rotate(word: int, by: int) -> int:
        return (word << by | word >> (32 - by)) & 0xFFFFFFFF

    def scramble(block: int) -> int:
        return rotate(block * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    h = seed
    whole = len(data) // 4 * 4
    for i in range(0, whole, 4):
        h = rotate(h ^ scramble(int.from_bytes(data[i : i + 4], "little")), 13) * 5 + 0xE6546B64 & 0xFFFFFFFF
    if whole < len(data):
        h ^= scramble(int.from_bytes(data[whole:], "little"))
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


@pytest.fixture(scope="session")
def murmur3() -> Callable[[bytes, int], int]:
    """The independent hash: (data, seed) -> 0 .. 2**32 - 1."""
    return murmur3_x86_32


@pytest.fixture(scope="session")
def service() -> SimpleNamespace:
    """The pieces above, for tests to use by name."""
    return SimpleNamespace(
        Client=Client, Folder=Folder, Perch=Perch, TOKEN=TOKEN, decode=decode, digest=digest, flags_yaml=flags_yaml,
        children_of=children_of, is_alive=is_alive, environment=perch_environment, request_bytes=request_bytes,
        wait_until=wait_until,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with a models file and no flag file."""
    return Folder(tmp_path)


@pytest.fixture
def launch(folder: Folder) -> Iterator[Callable[..., Perch]]:
    """Starts `perch serve` in the folder: (workers=1, **settings)."""
    started: list[Perch] = []

    def start(*, workers: int = 1, **settings: object) -> Perch:
        perch = Perch(folder, workers, settings)
        started.append(perch)
        return perch.start()

    yield start
    for perch in started:
        perch.end()


@pytest.fixture(scope="module")
def shared_perch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Perch]:
    """One `perch serve` for the tests of a module; each puts the files that it wants."""
    perch = Perch(Folder(tmp_path_factory.mktemp("perch")), settings={"force_token": TOKEN})
    perch.folder.put(flags_yaml())
    try:
        yield perch.start()
    finally:
        perch.end()

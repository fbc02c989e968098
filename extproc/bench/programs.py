"""What runs during a bench: one Envoy, and an ext_proc server for each path, with every feature in use.

Several flags with rules, StatsD counters, metadata with the hash, health checks: `perch serve` as people run it.
"""

import asyncio
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from extproc.bench.envoyfile import Way, bootstrap
from extproc.bench.load import BenchError
from extproc.bench.samples import FAST, GRPCIO, LOGGED, OFF
from extproc.envoyadmin import EnvoyAdmin
from extproc.envoyfile import envoy_binary
from extproc.modelsfile import load_models
from extproc.settings import environment
from extproc.supervisor import Process

PATH = "/v2/models/digits/infer"
FLAGS = """\
version: 1
segments:
  testers: {any: [{header: x-tenant, in: [acme, globex]}, {header: x-app-version, semver: ">=2.1.0 <3"}]}
flags:
  digits:
    unit: [x-user-id, x-session-id]
    salt: bench
    rules:
      - {name: testers, when: {segment: testers}, serve: canary}
      - {name: pilot, when: {header: x-region, prefix: eu-}, canary: 50}
    canary: 50
  letters: {model: letters, salt: bench2, canary: 5}
  faces: {model: faces, salt: bench3, canary: 1}
"""
RULE_HEADERS = ("x-tenant", "x-app-version", "x-region")
MODELS = "".join(
    f"{name}: {{prefix: /v2/models/{name}/, stable: [unix:{name}-s.sock], canary: [unix:{name}-c.sock]}}\n"
    for name in ("digits", "letters", "faces")
)
SOCKET = "SOCKET"
"""In the command of another server: stands for the path of the unix socket that it is to listen at."""
READY_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: the paths, and for how long. `others` are servers of other kinds, command lines by name."""

    rounds: int
    seconds: int
    access_log: bool = False
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def ways(self) -> tuple[Way, ...]:
        """Each path, the one without a filter first."""
        logged = (Way(LOGGED, FAST, logged=True),) if self.access_log else ()
        others = tuple(Way(name, name) for name in self.others)
        return (Way(OFF, None), Way(FAST, FAST), *logged, Way(GRPCIO, GRPCIO), *others)


class Ports:
    """Where Envoy listens, once it has started. Its admin interface may take `within_s` seconds for an answer."""

    def __init__(self, folder: Path, within_s: float = 2.0) -> None:
        self._within_s = within_s
        self._file = folder / "admin.txt"
        self._admin: EnvoyAdmin | None = None

    async def answering(self, servers: Sequence[str]) -> bool:
        """Whether Envoy and all servers are ready. For a supervisor, which takes an error for "not yet"."""
        if self._admin is None:
            address = self._file.read_text(encoding="ascii").strip()
            if not address:  # Envoy has made the file and not yet written it
                return False
            self._admin = EnvoyAdmin(address, self._within_s)
        healthy = await self._admin.counters(r"^cluster\..*\.membership_healthy$")
        return all(healthy.get(f"cluster.{name}.membership_healthy") == 1 for name in servers)

    async def url(self, path: str) -> str:
        """Where requests of this path go."""
        return f"http://127.0.0.1:{await self._require().listener_port(path)}{PATH}"

    async def unanswered(self) -> int:
        """How many requests Envoy let through without an answer of ext_proc."""
        counted = await self._require().counters(r"ext_proc\..*failure_mode_allowed$")
        return sum(counted.values())

    async def close(self) -> None:
        """Ends the connection to Envoy."""
        if self._admin is not None:
            await self._admin.close()

    def _require(self) -> EnvoyAdmin:
        if self._admin is None:
            raise BenchError("Envoy has not started")
        return self._admin


@contextmanager
def statsd_sink() -> Iterator[str]:
    """The address of a StatsD that nobody reads: the kernel drops what does not fit."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sink.getsockname()[1]}"


def processes(plan: Plan, folder: Path, statsd: str, ports: Ports) -> Iterator[Process]:
    """Everything that runs. Their sockets, logs and files are in `folder`. Raises EnvoyFileError without an Envoy."""
    (folder / "flags").mkdir()
    (folder / "flags" / "flags.yaml").write_text(FLAGS, encoding="ascii")
    (folder / "models.yaml").write_text(MODELS, encoding="ascii")
    env = environment()
    for name in (FAST, GRPCIO):
        serve = (sys.executable, "-m", "extproc", "serve")
        own = _serve_environment(name, folder, statsd)
        yield _server(name, serve, own, folder)
    for name, line in plan.others.items():
        command = tuple(part.replace(SOCKET, str(folder / f"{name}.sock")) for part in shlex.split(line))
        yield _server(name, command, env, folder)
    if plan.access_log:
        sink = (sys.executable, "-m", "extproc.bench.logsink", f"unix:{folder}/log.sock")
        yield _server("log", sink, env, folder)
    config = folder / "envoy.yaml"
    models = {model.name: model for model in load_models(folder / "models.yaml")}
    config.write_text(bootstrap(plan.ways, models, RULE_HEADERS, folder), encoding="utf-8")
    servers = [FAST, GRPCIO, *plan.others]
    yield Process(
        name="envoy",
        argv=(
            *(str(envoy_binary()), "-c", str(config), "--admin-address-path", str(folder / "admin.txt")),
            *("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
        ),
        env=env,
        log_path=folder / "envoy.log",
        stage=1,
        ready=lambda: ports.answering(servers),
        ready_within_s=READY_WITHIN_S,
    )


def _server(name: str, argv: tuple[str, ...], env: Mapping[str, str], folder: Path) -> Process:
    """A server that is ready once something accepts at its socket; one that ends before never will be."""
    path = folder / f"{name}.sock"

    async def accepts() -> bool:
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        return True

    return Process(name=name, argv=argv, env=env, log_path=folder / f"{name}.log", ready=accepts)


def _serve_environment(name: str, folder: Path, statsd: str) -> Mapping[str, str]:
    return environment(
        listen=f"unix:{folder}/{name}.sock",
        transport=name,
        flags=str(folder / "flags" / "flags.yaml"),
        models=str(folder / "models.yaml"),
        state=str(folder / f"state-{name}"),
        statsd=statsd,
        workers="1",
        log_level="warning",
    )


def last_words(folder: Path, name: str) -> str:
    """The end of a program's log, in one line."""
    try:
        lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return " ".join(" ".join(lines[-6:]).split())[-400:]

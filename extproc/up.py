"""`perch up`: the whole system on one machine. Starts it, says where it is, tells what happens, stops it."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from extproc.address import TcpAddress, UnixAddress, parse_address
from extproc.app import StartError, envoy_settings, prefixes, until_stopped, worker_addresses
from extproc.control import close_gates
from extproc.core.document import FlagFileError
from extproc.envoyfile import EnvoyFileError, envoy_command, render, write
from extproc.flagfile import Paths
from extproc.flagread import read_flag_file
from extproc.modelsfile import Model, load_models
from extproc.settings import Settings, environment
from extproc.supervisor import Event, EventKind, Process, StartFailed, Supervisor

READY_WITHIN_S = 90.0
RUN_PREFIX = "perch-"

Say = Callable[[str, str], None]
"""(who, what): one line for the person who started it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `perch up` was asked for, beside the settings: ports of 127.0.0.1, and the artifacts of the two arms."""

    port: int
    control_port: int
    admin_port: int
    stable: Path | None = None
    canary: Path | None = None


async def up(settings: Settings, options: Options, say: Say, ready: Callable[["Running"], None]) -> None:
    """Runs everything until Ctrl-C or SIGTERM. `ready` is called once, when the first request would be answered.

    Raises StartError, ModelsFileError or EnvoyFileError when something stands in the way; nothing is left then.
    """
    models = load_models(settings.models)
    for name, port in (("port", options.port), ("control-port", options.control_port), ("admin", options.admin_port)):
        check_free(name, port)
    check_flags(settings, models)
    with run_folder() as run, told(run / "events.sock") as events:
        running = Running(settings=_settings_for(settings, options, run), options=options, models=models)
        close_gates(running.settings, models)
        write(run / "envoy", render(models, envoy_settings(running.settings)))
        supervisor = Supervisor(list(processes(running)), _Teller(say))
        say("perch", "starting Envoy, ext_proc, control and the model servers; Ctrl-C stops all of it")
        try:
            await _run(running, supervisor, lambda: _relay(events, say), ready)
            say("perch", "stopping")
        except StartFailed as error:
            raise StartError(str(error)) from None
        finally:
            await supervisor.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What runs, and where."""

    settings: Settings
    options: Options
    models: tuple[Model, ...]

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.settings.state / "logs"


def _settings_for(settings: Settings, options: Options, run: Path) -> Settings:
    """The settings of all processes: loopback ports for people, sockets in the run folder for the rest."""
    return settings.model_copy(
        update={
            "run": run,
            "xds": run / "envoy",
            "events": run / "events.sock",
            "counters": run / "counters.sock",
            "listen": f"unix:{run}/ext_proc.sock",
            "access_log": f"unix:{run}/als.sock",
            "envoy_listen": f"127.0.0.1:{options.port}",
            "envoy_admin": f"127.0.0.1:{options.admin_port}",
            "control_listen": f"127.0.0.1:{options.control_port}",
        }
    )


async def _run(
    running: Running,
    supervisor: Supervisor,
    relay: Callable[[], AsyncIterator[None] | object],
    ready: Callable[[Running], None],
) -> None:
    async def start_and_keep() -> None:
        await supervisor.start()
        await _until_ready(running)
        ready(running)
        await supervisor.run()

    await until_stopped(start_and_keep, relay)  # type: ignore[arg-type]


async def _until_ready(running: Running) -> None:
    """Waits for control's /readyz. Raises StartError with what is missing when it takes too long."""
    missing = "control does not answer"
    url = f"http://{running.settings.control_listen}/readyz"
    try:
        async with asyncio.timeout(READY_WITHIN_S), aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                        missing = (await answer.text()).strip()
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise StartError(f"not ready after {READY_WITHIN_S:g} s: {missing}; logs are in {running.logs}/") from None


def processes(running: Running) -> Iterator[Process]:
    """What runs: the model servers whose sockets are in the run folder, serve and control, then Envoy."""
    settings = running.settings
    env = environment(**{name: str(value) for name, value in settings.model_dump(exclude_none=True).items()})
    logs = running.logs
    for model in running.models:
        for arm in ("stable", "canary"):
            yield from _model_servers(running, model, arm, env)
    listens = worker_addresses(settings.listen, settings.workers)
    sockets = tuple(Path(listen.removeprefix("unix:")) for listen in listens)
    perch = (sys.executable, "-m", "extproc")
    yield Process(
        name="serve",
        argv=(*perch, "serve"),
        env=env,
        log_path=logs / "serve.log",
        ready=lambda: _listens(*sockets),
        leftovers=sockets,
        stop_grace_s=settings.drain_s + 3,
    )
    yield Process(
        name="control",
        argv=(*perch, "control"),
        env=env,
        log_path=logs / "control.log",
        ready=lambda: _accepts(settings.control_listen),
        leftovers=(Path(settings.access_log.removeprefix("unix:")),),
    )
    yield Process(
        name="envoy",
        argv=envoy_command(envoy_settings(settings)),
        env=env,
        log_path=logs / "envoy.log",
        stage=1,
        ready=lambda: _accepts(settings.envoy_listen),
    )


def _model_servers(running: Running, model: Model, arm: str, env: object) -> Iterator[Process]:
    """One process per address of this arm that is ours to serve."""
    chosen = running.options.stable if arm == "stable" else running.options.canary
    folder = chosen or (model.artifacts or {}).get(arm)
    for i, address in enumerate(model.stable if arm == "stable" else model.canary):
        match parse_address(address):
            case UnixAddress(path) if not path.is_absolute():
                path = running.settings.run / path
            case _:
                continue
        if folder is None:
            raise StartError(f"models.yaml: {model.name} names no artifacts for {arm}; add them, or use --{arm} DIR")
        name = f"{model.name}-{arm}-{i}"
        yield Process(
            name=name,
            argv=(
                sys.executable,
                "-m",
                "model_servers",
                str(folder),
                *_server_options(running.settings, model, arm, path),
            ),
            env=env,  # type: ignore[arg-type]
            log_path=running.logs / f"{name}.log",
            ready=lambda path=path, warm=model.warm: _answers(path, warm),  # type: ignore[misc]
            leftovers=(path,),
        )


def _server_options(settings: Settings, model: Model, arm: str, path: Path) -> tuple[str, ...]:
    statsd = ("--statsd", settings.statsd, "--statsd-tags", settings.statsd_tags) if settings.statsd else ()
    return ("--name", model.name, "--arm", arm, "--listen", f"unix:{path}", *statsd)


async def _listens(*sockets: Path) -> bool:
    """Whether somebody accepts connections at all of these sockets."""
    for path in sockets:
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.close()
    return True


async def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
    return True


async def _answers(path: Path, warm: str) -> bool:
    """Whether the server at this socket answers its health path with 200."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.get(f"http://model{warm}") as answer,
    ):
        return answer.status == 200


def check_free(option: str, port: int) -> None:
    """Raises StartError when the port of 127.0.0.1 is taken, with the option that chooses another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = (
                "is taken by another program"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used: {error.strerror}"
            )
            raise StartError(f"port {port} {why}; choose another with --{option} PORT") from None


def check_flags(settings: Settings, models: tuple[Model, ...]) -> None:
    """Raises StartError when there is neither a good flag file nor the last good one of an earlier run."""
    paths = Paths(settings.flags, settings.state)
    try:
        read_flag_file(paths.flags, prefixes(models))
    except FlagFileError as error:
        with contextlib.suppress(FlagFileError):
            read_flag_file(paths.last_good, prefixes(models))
            return
        more = f" (and {len(error.problems) - 1} more; see `perch check`)" if len(error.problems) > 1 else ""
        raise StartError(f"{paths.flags}:{error.problems[0]}{more}") from None


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A private folder for sockets and Envoy's files, gone afterwards, and with it those of runs that were killed."""
    top = Path(tempfile.gettempdir())
    if len(str(top)) > 40:
        top = Path("/tmp")  # noqa: S108  socket paths have 107 bytes; mkdtemp below makes a private folder
    for left in top.glob(f"{RUN_PREFIX}[0-9]*-*"):
        with contextlib.suppress(FileNotFoundError):  # its own run removes it just now
            if left.stat().st_uid == os.getuid() and not _lives(left.name.removeprefix(RUN_PREFIX).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{RUN_PREFIX}{os.getpid()}-", dir=top))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def told(path: Path) -> Iterator[socket.socket]:
    """The socket at which the processes tell their events."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as events:
        events.bind(str(path))
        events.setblocking(False)
        yield events


async def _relay(events: socket.socket, say: Say) -> None:
    """Says every event that a process tells."""
    loop = asyncio.get_running_loop()
    while True:
        message = json.loads(await loop.sock_recv(events, 65536))
        if message["kind"] not in _NOT_SAID:
            kind = message["kind"].replace("_", " ")
            say(message["role"], message["text"] if message["kind"] in _WHOLE else f"{kind}: {message['text']}")


_NOT_SAID = {"listening", "exposure_followed", "envoy_files", "headers_forwarded"}
_WHOLE = {"share", "canary_warm", "canary_cold", "canary_lost"}


@dataclass(frozen=True, slots=True)
class _Teller:
    """Says that a process died, will be restarted, or is slow; that it starts and stops is no news.

    One that dies before it was ever ready ends `perch up`, with the same words as its error.
    """

    say: Say
    were_ready: set[str] = field(default_factory=set)

    def __call__(self, event: Event) -> None:
        match event.kind:
            case EventKind.READY:
                self.were_ready.add(event.process)
            case EventKind.DIED if event.process not in self.were_ready:
                pass
            case EventKind.DIED | EventKind.RESTARTING | EventKind.SLOW:
                self.say(event.process, f"{event.kind.value}: {event.detail}")


__all__ = ["EnvoyFileError", "Options", "Running", "TcpAddress", "up"]

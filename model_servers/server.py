"""The life of one server process: bind, warm, serve, drain, end. Start, serve and stop are readable in that order."""

import asyncio
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from model_servers.app import LARGEST_BODY_BYTES, State, answer
from model_servers.listen import Listener, listen
from model_servers.model import Model, example_inputs, load

WARM_UP_INFERENCES = 20
KEEP_ALIVE_S = 7200.0  # above Envoy's hour for idle connections, so that it never meets one just closed
FINISH_S = 15.0  # longest wait for requests in flight once the listener is closed


class Arm(StrEnum):
    """Which cohort's traffic this process gets; only telemetry knows it."""

    STABLE = "stable"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class Settings:
    """One process. Durations in seconds."""

    directory: Path
    name: str
    arm: Arm
    address: str
    drain_s: float


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT and returns after the last answer. Raises ArtifactError or CannotListen."""
    model = load(settings.directory)
    listener = listen(settings.address)
    try:
        await _serve_on(listener, model, settings)
    finally:
        listener.socket.close()
        listener.remove_file()


async def _serve_on(listener: Listener, model: Model, settings: Settings) -> None:
    state = State(model, settings.name)
    server = web.Server(
        partial(answer, state),
        request_factory=_request,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_S,
    )
    accepting = await asyncio.get_running_loop().create_server(server, sock=listener.socket)
    with _stop_signals() as (stop, hurry):
        warm_s = _warm_up(state)
        who = f"{settings.name} {model.manifest.version} ({settings.arm})"
        _say(f"ready: {who} on {listener.address}, warm in {warm_s:.2f} s")
        await stop.wait()
        state.draining = True
        _say(f"draining: {who} for {settings.drain_s:g} s")
        await _first_of(hurry.wait(), asyncio.sleep(settings.drain_s))
        accepting.close()
        server.pre_shutdown()
        await server.shutdown(0 if hurry.is_set() else FINISH_S)


def _request(*args: object) -> web.BaseRequest:
    """A request with our body limit, which aiohttp's low-level server cannot be given otherwise."""
    message, payload, protocol, writer, task = args
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=LARGEST_BODY_BYTES)  # type: ignore[arg-type]


def _warm_up(state: State) -> float:
    """Real inferences until the process has seen its caches filled; returns seconds."""
    start = time.perf_counter()
    for _ in range(WARM_UP_INFERENCES):
        state.model.predict(example_inputs(state.model.manifest, 1))
    state.warm = True
    return time.perf_counter() - start


@contextmanager
def _stop_signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """The first SIGTERM or SIGINT sets the first event, the second one the second."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def note() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note)
    try:
        yield stop, hurry
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

"""The life of one server process: load, bind, warm, serve, reload, drain, end. Readable in that order."""

import asyncio
import gc
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, cast

from aiohttp import web

from extproc.metrics import Dialect, Metrics
from model_servers.app import Rules, State, answer
from model_servers.batching import Limits
from model_servers.errors import ArtifactError
from model_servers.faults import FaultBox, Faults
from model_servers.listen import BACKLOG, Listener, listen
from model_servers.model import Model, load
from model_servers.serving import Served, warm_up
from model_servers.telemetry import Telemetry, rss_bytes
from model_servers.versions import fingerprint, newest

KEEP_ALIVE_S = 7200.0  # above Envoy's hour for idle connections, so that it never meets one just closed
FINISH_S = 15.0  # longest wait for requests in flight once the listener is closed
HURRY_S = 0.05  # the same after a second signal; 0 would mean for ever to aiohttp
FLUSH_S = 1.0


class Arm(StrEnum):
    """Which cohort's traffic this process gets; only telemetry knows it."""

    STABLE = "stable"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class Settings:
    """One process. Durations in seconds."""

    rules: Rules
    arm: Arm
    address: str
    drain_s: float
    reload_s: float = 1.0  # how often the version directories are looked at; 0 = never
    limits: Limits = field(default_factory=Limits)
    statsd: str | None = None
    dialect: Dialect = Dialect.DOGSTATSD
    faults: Faults | None = None  # None: no fault can ever be set


async def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT and returns after the last answer. Raises ArtifactError or CannotListen."""
    started_s = time.perf_counter()
    root = settings.rules.root
    seen = fingerprint(newest(root))
    model = load(newest(root))
    listener = listen(settings.address)
    telemetry = _telemetry(settings)
    state = State(settings.rules, telemetry, None if settings.faults is None else FaultBox(settings.faults))
    try:
        with _stop_signals() as (stop, hurry):
            async with _accepting(listener, state, hurry):
                state.served = await _warm(settings, state, model)
                _settle_memory()
                _say(_ready_line(settings, listener, state.served, time.perf_counter() - started_s))
                async with _running(_reload_forever(settings, state, seen), _flush_forever(telemetry)):
                    await stop.wait()
                await _drain(settings, state, hurry)
    finally:
        listener.socket.close()
        listener.remove_file()
        telemetry.flush()


@asynccontextmanager
async def _accepting(listener: Listener, state: State, hurry: asyncio.Event) -> AsyncIterator[None]:
    """Accepts connections inside; afterwards closes the listener and lets requests in flight finish."""
    # aiohttp asks no more of a response than Written gives; its annotation names the class it ships.
    handle = cast("Any", partial(answer, state))
    server = web.Server(handle, access_log=None, handler_cancellation=True, keepalive_timeout=KEEP_ALIVE_S)
    accepting = await asyncio.get_running_loop().create_server(
        server,
        sock=listener.socket,
        backlog=BACKLOG,  # else asyncio sets it back to 100, and Envoy's 101st connection at once is refused
    )
    try:
        yield
    finally:
        accepting.close()
        server.pre_shutdown()
        if not hurry.is_set():
            await _first_of(hurry.wait(), server.shutdown(FINISH_S))
        if hurry.is_set():
            await server.shutdown(HURRY_S)


async def _warm(settings: Settings, state: State, model: Model) -> Served:
    """Raises ArtifactError when the model fails at what clients will ask of it."""
    seen = partial(_note_batch, state.telemetry, model.manifest.version)
    try:
        served = await warm_up(model, settings.limits, seen)
    except Exception as error:
        where = settings.rules.root
        raise ArtifactError(f"{where}: version {model.manifest.version} fails while warming up: {error!r}") from error
    state.telemetry.reloaded(model.manifest.version, "ok", served.warmth.seconds)
    return served


def _settle_memory() -> None:
    """Takes what is loaded by now out of the garbage collector's sight, and lets it run less often.

    A request makes objects but no cycles; walking all modules again and again took an eighth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _note_batch(telemetry: Telemetry, version: str, seen: Any) -> None:
    telemetry.batch(seen, version)


async def _reload_forever(settings: Settings, state: State, seen: object) -> None:
    """Loads and warms a new or changed version beside the old one, then swaps by one assignment."""
    while settings.reload_s:
        await asyncio.sleep(settings.reload_s)
        try:
            directory = newest(settings.rules.root)
        except ArtifactError:
            continue  # the folder is gone or empty: what is in memory stays in service
        found = fingerprint(directory)
        if found == seen:
            continue
        seen = found
        try:
            model = await asyncio.to_thread(load, directory)
            await _swap(settings, state, model)
        except ArtifactError as error:
            state.telemetry.reloaded(directory.name, "rejected")
            state.telemetry.failed("version_rejected", directory=str(directory), error=str(error))


async def _swap(settings: Settings, state: State, model: Model) -> None:
    before_bytes = rss_bytes()
    old, new = state.served, await _warm(settings, state, model)
    state.served = new
    if old is not None:
        await old.retire()
    grown = f"memory {before_bytes >> 20} > {rss_bytes() >> 20} MiB"
    _say(f"reloaded: {settings.rules.name} {model.manifest.version} ({settings.arm}), {_warmth(new)}, {grown}")


async def _flush_forever(telemetry: Telemetry) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        telemetry.flush()


async def _drain(settings: Settings, state: State, hurry: asyncio.Event) -> None:
    """Not ready, but answering, until whoever checks our health must have noticed."""
    state.draining = True
    _say(f"draining: {settings.rules.name} ({settings.arm}) for {settings.drain_s:g} s")
    async with _running(_flush_forever(state.telemetry)):
        await _first_of(hurry.wait(), asyncio.sleep(settings.drain_s))


def _telemetry(settings: Settings) -> Telemetry:
    tags = {"cohort": settings.arm.value, "model": settings.rules.name}
    metrics = Metrics(settings.statsd, settings.dialect, prefix="perch", tags=tags)
    return Telemetry(metrics, on=settings.statsd is not None)


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


@asynccontextmanager
async def _running(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs the jobs while inside; an error of one of them ends the process loudly rather than silently."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _ready_line(settings: Settings, listener: Listener, served: Served, took_s: float) -> str:
    who = f"{settings.rules.name} {served.model.manifest.version} ({settings.arm})"
    where = "in a thread" if served.threaded else "on the loop"
    memory = f"memory {rss_bytes() >> 20} MiB"
    return f"ready: {who} on {listener.address}, started in {took_s:.2f} s, {_warmth(served)} {where}, {memory}"


def _warmth(served: Served) -> str:
    warmth = served.warmth
    settled = "" if warmth.settled else ", not settled"
    return f"warm after {warmth.requests} inferences ({warmth.first_ms:.2f} > {warmth.settled_ms:.2f} ms{settled})"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

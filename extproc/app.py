"""Wiring: what the roles have in common. Builds the objects, starts them, stops them in reverse."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address

from extproc.address import TcpAddress, parse_address
from extproc.answering import MakeTransport
from extproc.core.flags import Exposures
from extproc.envoyfile import EnvoySettings
from extproc.flagcompiler import Compiler, Task
from extproc.flagfile import Parts
from extproc.metrics import Dialect, Metrics
from extproc.modelsfile import Model
from extproc.settings import Settings

NO_FLAGS = b"version: 1\nflags: {}\n"
"""What is served before there has ever been a good flag file: everybody stable."""


class StartError(Exception):
    """A role that cannot start; the message is the one line that the person who started it sees."""


class Stopped(Exception):  # noqa: N818  ends a task group, and is no error
    """A SIGTERM or SIGINT came."""


async def until_stopped(*works: Callable[[], Awaitable[None]]) -> None:
    """Runs the works side by side until SIGTERM or SIGINT comes or one of them fails; then cancels the others.

    Raises what the first work that failed raised.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def wait_for_signal() -> None:
        await stop.wait()
        raise Stopped

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait_for_signal())
            for work in works:
                group.create_task(_awaited(work))
    except BaseExceptionGroup as failed:
        _, others = failed.split(Stopped)
        if others is not None:
            raise others.exceptions[0] from None


async def _awaited(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def make_metrics(settings: Settings) -> Metrics:
    """StatsD as the settings describe it."""
    return Metrics(settings.statsd, Dialect(settings.statsd_tags))


def make_transport(settings: Settings) -> MakeTransport:
    """The ext_proc transport that the settings name. The other one's libraries are not loaded."""
    if settings.transport == "grpcio":
        from extproc.transport.grpcio import GrpcioTransport  # noqa: PLC0415

        return GrpcioTransport
    from extproc.transport.fastlane import FastLane  # noqa: PLC0415

    return FastLane


def loop_for(transport: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The event loop of a process that answers: uvloop for the fast transport, where the platform has it."""
    if transport != "fast":
        return None
    try:
        import uvloop  # noqa: PLC0415  not on every platform
    except ImportError:
        return None
    return uvloop.new_event_loop


def compile_with(
    compiler: Compiler, models: Mapping[str, str], *, replies: bool
) -> Callable[[bytes, Exposures], Parts]:
    """The flag compiler as the flag file calls it."""

    def compile_file(content: bytes, exposures: Exposures) -> Parts:
        return compiler.compile(Task(content=content, exposures=exposures, models=dict(models), with_replies=replies))

    return compile_file


def prefixes(models: Sequence[Model]) -> dict[str, str]:
    """Each model's path prefix by its name."""
    return {model.name: model.prefix for model in models}


def worker_addresses(listen: str, workers: int) -> tuple[str, ...]:
    """One worker listens at the address itself; N at `PATH.0` .. `PATH.N-1`, or at N ports from the given one on."""
    if workers == 1:
        return (listen,)
    if listen.startswith("unix:"):
        return tuple(f"{listen}.{i}" for i in range(workers))
    host, _, port = listen.rpartition(":")
    return tuple(f"{host}:{int(port) + i}" for i in range(workers))


def envoy_settings(settings: Settings) -> EnvoySettings:
    """Envoy's side of the same settings. Its own stats sink takes an IP address only, so a name gets none."""
    return EnvoySettings(
        run_dir=settings.run,
        files_dir=settings.xds,
        listen=settings.envoy_listen,
        admin=settings.envoy_admin,
        ext_proc=_serves(settings),
        access_log=settings.access_log,
        statsd=settings.statsd if _is_ip(settings.statsd) else None,
        force_token=settings.force_token is not None,
        show_cohort=settings.show_cohort,
        show_version=settings.show_version,
        concurrency=settings.envoy_threads,
    )


def _serves(settings: Settings) -> tuple[str, ...]:
    """Where Envoy finds every `serve`: those that are named, else the one that the same settings start."""
    if settings.ext_proc is None:
        return worker_addresses(settings.listen, settings.workers)
    return tuple(address.strip() for address in settings.ext_proc.split(","))


def _is_ip(address: str | None) -> bool:
    if address is None:
        return False
    parsed = parse_address(address)
    try:
        return isinstance(parsed, TcpAddress) and bool(ip_address(parsed.host))
    except ValueError:
        return False

"""`perch serve`: answers Envoy by the flag file. One process, or a parent that owns the files and N workers."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable

from extproc.answering import Answering, gauge_flags
from extproc.app import (
    NO_FLAGS,
    StartError,
    compile_with,
    make_metrics,
    make_transport,
    prefixes,
    until_stopped,
    worker_addresses,
)
from extproc.core.flags import Exposures
from extproc.events import Events, start_log
from extproc.flagcompiler import Compiler
from extproc.flagfile import FlagFile, Parts, Paths, Verdict
from extproc.metrics import Metrics
from extproc.modelsfile import Model, load_models
from extproc.receiver import Received, Receiver
from extproc.settings import Settings
from extproc.wire.answer import Answerer
from extproc.workers import Parent, Workers

COUNT_EVERY_S = 1.0


async def serve(settings: Settings) -> None:
    """Answers until SIGTERM, then drains. Raises StartError, or ModelsFileError for a models file that is wrong."""
    start_log("serve", settings.log_level)
    models = load_models(settings.models)
    compiler = Compiler()
    metrics = make_metrics(settings)
    try:
        await (_serve_alone if settings.workers == 1 else _serve_with_workers)(settings, models, compiler, metrics)
    finally:
        await compiler.stop()
        metrics.close()


async def _serve_alone(settings: Settings, models: tuple[Model, ...], compiler: Compiler, metrics: Metrics) -> None:
    compile_file = compile_with(compiler, prefixes(models), replies=True)
    answering = await first_answering(settings, models, compile_file(NO_FLAGS, Exposures()), metrics)

    def publish(received: Received) -> None:
        answering.publish(received)
        gauge_flags(metrics, received.published.ruleset.version, received.flags)

    receiver = Receiver(prefixes(models), settings.force_token, publish)
    events = Events("serve", settings.events)
    flag_file = FlagFile(
        paths=Paths(settings.flags, settings.state),
        compile=compile_file,
        publish=receiver.take,
        tell=events.tell,
        count=count_reloads(metrics),
    )
    await answer_until_stopped(settings, settings.listen, answering, flag_file.follow)


async def first_answering(settings: Settings, models: tuple[Model, ...], parts: Parts, metrics: Metrics) -> Answering:
    """An Answering with a ruleset of no flags: everybody stable, not serving. Raises StartError."""
    first: list[Received] = []
    verdict = await Receiver(prefixes(models), settings.force_token, first.append).take(parts)
    if not first:
        raise StartError(f"the flag compiler does not work: {'; '.join(map(str, verdict.problems)) or 'it ended'}")
    return Answering(metrics, Answerer(first[0].published))


def count_reloads(metrics: Metrics) -> Callable[[bool], None]:
    """Counts what became of the flag file, by result."""

    def count(accepted: bool) -> None:  # noqa: FBT001  the one thing it says
        metrics.count("decision.reload", result="accepted" if accepted else "rejected")

    return count


async def answer_until_stopped(
    settings: Settings, listen: str, answering: Answering, work: Callable[[], Awaitable[None]]
) -> None:
    """Listens, runs the work beside, and on SIGTERM drains: no new streams, those under way are answered."""
    transport = make_transport(settings)(answering.answerer, lambda: answering.serving)
    try:
        address = await transport.start(listen)
    except OSError as error:
        raise StartError(str(error)) from None
    Events("serve", settings.events).tell("listening", f"ext_proc at {address}")

    async def count() -> None:
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            answering.count_decisions()

    try:
        await until_stopped(count, answering.metrics.run, work)
    finally:
        await transport.stop(settings.drain_s)
        answering.count_decisions()
        answering.metrics.flush()


async def _serve_with_workers(
    settings: Settings, models: tuple[Model, ...], compiler: Compiler, metrics: Metrics
) -> None:
    """The parent of N workers: follows the flag file and hands every ruleset to all of them; answers nothing itself."""
    events = Events("serve", settings.events)
    workers = Workers(
        addresses=worker_addresses(settings.listen, settings.workers),
        command=lambda address: ("serve-worker", address),
        greeting=pickle.dumps(settings),
        tell=events.warn,
        grace_s=settings.drain_s,
    )

    async def publish(parts: Parts) -> Verdict:
        kept: list[bytes] = []
        receiver = Receiver(
            prefixes(models), None, lambda got: gauge_flags(metrics, got.published.ruleset.version, got.flags)
        )
        verdict = await receiver.take(_kept(parts, kept))
        if not verdict.problems:
            workers.publish(kept)
        return verdict

    compile_file = compile_with(compiler, prefixes(models), replies=True)
    no_flags = [part async for part in compile_file(NO_FLAGS, Exposures())]
    workers.begin_with(no_flags)
    flag_file = FlagFile(
        paths=Paths(settings.flags, settings.state),
        compile=compile_file,
        publish=publish,
        tell=events.tell,
        count=count_reloads(metrics),
    )
    try:
        await until_stopped(workers.run, flag_file.follow, metrics.run)
    finally:
        await workers.stop()


async def _kept(parts: Parts, kept: list[bytes]) -> AsyncIterator[bytes]:
    """The parts as they come, remembered."""
    async for part in parts:
        kept.append(part)
        yield part


async def serve_worker(listen: str) -> None:
    """One worker: settings first, then rulesets from standard input, until it is closed or SIGTERM comes."""
    parent = Parent()
    await parent.connect()
    settings: Settings = pickle.loads(await parent.message())  # noqa: S301  from our own parent
    start_log("serve", settings.log_level)
    models = load_models(settings.models)
    metrics = make_metrics(settings)
    answering = await first_answering(settings, models, parent.parts(), metrics)
    receiver = Receiver(prefixes(models), settings.force_token, answering.publish)

    async def take_rulesets() -> None:
        try:
            while True:
                await receiver.take(parent.parts())
        except asyncio.IncompleteReadError:
            raise StartError("the parent of this worker is gone") from None

    try:
        await answer_until_stopped(settings, listen, answering, take_rulesets)
    finally:
        metrics.close()

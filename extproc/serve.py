"""`perch serve`: answers Envoy by the flag file. One process, or a parent that owns the files and N workers."""

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from extproc.answering import Answering, Reports, gauge_flags
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
from extproc.modelsfile import load_models
from extproc.receiver import Received, Receiver
from extproc.settings import Settings
from extproc.wire.answer import Answerer
from extproc.workers import FOLLOWS, Parent, Workers

GAUGE_EVERY_S = 10.0
"""Gauges are told again this often: some collectors forget those that are silent."""

Work = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Role:
    """What every process of serve has: the settings, the models' prefixes, and where it tells what happens."""

    settings: Settings
    models: dict[str, str]
    metrics: Metrics
    events: Events
    compiler: Compiler
    received: Received | None = field(default=None, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @classmethod
    def of(cls, settings: Settings) -> "Role":
        """Built from the settings. Raises ModelsFileError."""
        start_log("serve", settings.log_level)
        models = prefixes(load_models(settings.models))
        return cls(settings, models, make_metrics(settings), Events("serve", settings.events), Compiler())

    async def close(self) -> None:
        """Ends what was started."""
        await self.compiler.stop()
        self.metrics.close()

    def flag_file(self, publish: Callable[[Parts], Awaitable[Verdict]]) -> FlagFile:
        """The flag file and the state folder, followed by this process alone."""
        return FlagFile(
            paths=Paths(self.settings.flags, self.settings.state),
            compile=compile_with(self.compiler, self.models, replies=True),
            publish=publish,
            tell=self.events.tell,
            count=self.count_reload,
        )

    def count_reload(self, accepted: bool) -> None:  # noqa: FBT001  the one thing it says
        """Counts what became of a flag file."""
        self.metrics.count("decision.reload", result="accepted" if accepted else "rejected")

    def no_flags(self) -> Parts:
        """The ruleset of no flags: everybody stable."""
        return compile_with(self.compiler, self.models, replies=True)(NO_FLAGS, Exposures())

    async def gauge(self) -> None:
        """Tells StatsD the percentages when they change, and again and again."""
        while True:
            self._changed.clear()
            if self.received is not None:
                await gauge_flags(self.metrics, self.received.published.ruleset.version, self.received.flags)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GAUGE_EVERY_S):
                    await self._changed.wait()

    def now_served(self, received: Received) -> None:
        """Remembers what is served, for the gauges."""
        self.received = received
        self._changed.set()


async def serve(settings: Settings) -> None:
    """Answers until SIGTERM, then drains. Raises StartError, or ModelsFileError for a models file that is wrong."""
    role = Role.of(settings)
    try:
        await (_serve_alone if settings.workers == 1 else _serve_with_workers)(role)
    finally:
        await role.close()


async def _serve_alone(role: Role) -> None:
    answering, reports = await first_answering(role, role.settings.listen, role.no_flags())

    def hand_on(received: Received) -> None:
        answering.publish(received)
        role.now_served(received)

    flag_file = role.flag_file(Receiver(role.models, role.settings.force_token, hand_on).take)
    try:
        # Before anybody can ask: Envoy may not have noticed that this is a new process, and would send users of canary.
        await flag_file.refresh()
        await answer_until_stopped(role, role.settings.listen, answering, (flag_file.follow, role.gauge))
    finally:
        reports.close()


async def first_answering(role: Role, listen: str, no_flags: Parts) -> tuple[Answering, Reports]:
    """An Answering with a ruleset of no flags, not serving, and what its reports go through. Raises StartError."""
    first: list[Received] = []
    verdict = await Receiver(role.models, role.settings.force_token, first.append).take(no_flags)
    if not first:
        raise StartError(f"the flag compiler does not work: {'; '.join(map(str, verdict.problems)) or 'it ended'}")
    reports = Reports(role.settings.counters)
    answering = Answering(
        metrics=role.metrics,
        answerer=Answerer(first[0].published),
        worker=listen,
        report=reports.send,
        listener=reports.listener,
        warn=role.events.warn,
        show_units=role.settings.show_heavy_units,
    )
    return answering, reports


async def answer_until_stopped(role: Role, listen: str, answering: Answering, works: tuple[Work, ...]) -> None:
    """Listens, runs the works beside, and on SIGTERM drains: no new streams, those under way are answered."""
    transport = make_transport(role.settings)(answering.answerer, lambda: answering.serving)
    try:
        address = await transport.start(listen)
    except OSError as error:
        raise StartError(str(error)) from None
    role.events.tell("listening", f"ext_proc at {address}")
    try:
        await until_stopped(answering.count, role.metrics.run, *works)
    finally:
        await transport.stop(role.settings.drain_s)
        answering.count_decisions()
        role.metrics.flush()


async def _serve_with_workers(role: Role) -> None:
    """The parent of N workers: follows the flag file and hands every ruleset to all of them; answers nothing itself."""
    workers = Workers(
        addresses=worker_addresses(role.settings.listen, role.settings.workers),
        command=lambda address: ("serve-worker", address, "--transport", role.settings.transport),
        greeting=pickle.dumps(role.settings),
        tell=role.events.warn,
        grace_s=role.settings.drain_s,
    )
    workers.begin_with([part async for part in role.no_flags()])

    async def publish(parts: Parts) -> Verdict:
        kept: list[bytes] = []
        verdict = await Receiver(role.models, None, role.now_served).take(_kept(parts, kept))
        if not verdict.problems:
            workers.publish(kept)
        return verdict

    flag_file = role.flag_file(publish)
    try:
        await flag_file.refresh()
        await until_stopped(workers.run, flag_file.follow, role.metrics.run, role.gauge)
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
    role = Role.of(pickle.loads(await parent.message()))  # noqa: S301  from our own parent
    answering, reports = await first_answering(role, listen, parent.parts())
    receiver = Receiver(role.models, role.settings.force_token, answering.publish)
    if await parent.message() == FOLLOWS:
        await receiver.take(parent.parts())

    async def take_rulesets() -> None:
        try:
            while True:
                await receiver.take(parent.parts())
        except asyncio.IncompleteReadError:
            raise StartError("the parent of this worker is gone") from None

    try:
        await answer_until_stopped(role, listen, answering, (take_rulesets,))
    finally:
        reports.close()
        await role.close()

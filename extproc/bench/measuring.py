"""The rounds: all paths one after the other in each, in turning order, through one Envoy in one run."""

import asyncio
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from extproc.bench.load import BenchError, Tools, latencies_us, throughput
from extproc.bench.programs import READY_WITHIN_S, Plan, Ports, last_words, processes, statsd_sink
from extproc.bench.samples import Sample
from extproc.supervisor import Event, EventKind, StartFailed, Supervisor

WARM_UP_S = 1
Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what is measured now)"""


async def measure(plan: Plan, tools: Tools, progress: Progress) -> list[Sample]:
    """Starts everything, warms every path up, runs the rounds, stops everything. Raises BenchError, EnvoyFileError."""
    with (
        tempfile.TemporaryDirectory(prefix="perch-bench-", ignore_cleanup_errors=True) as name,
        statsd_sink() as statsd,
    ):
        folder = Path(name)
        ports = Ports(folder)
        died: list[str] = []
        supervisor = Supervisor(list(processes(plan, folder, statsd, ports)), partial(_note, died))
        try:
            await _start(supervisor, folder)
            samples = await _Rounds(plan, tools, ports, supervisor.pids(), folder).run(progress, died)
        finally:
            await ports.close()
            await supervisor.stop()
    return samples


async def _start(supervisor: Supervisor, folder: Path) -> None:
    """Raises BenchError when something ends before it is ready, or is not ready in time."""
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            await supervisor.start()
    except StartFailed as error:
        raise BenchError(f"{error}: {last_words(folder, str(error).partition(':')[0])}") from None
    except TimeoutError:
        words = "; ".join(f"{name}: {said}" for name in supervisor.pids() if (said := last_words(folder, name)))
        raise BenchError(f"not everything was ready after {READY_WITHIN_S:g} s: {words or 'no log says why'}") from None


def _note(died: list[str], event: Event) -> None:
    if event.kind is EventKind.DIED:
        died.append(f"{event.process} died: {event.detail}")


class _Rounds:
    """What every measurement needs."""

    def __init__(self, plan: Plan, tools: Tools, ports: Ports, pids: dict[str, int], folder: Path) -> None:
        self._plan = plan
        self._tools = tools
        self._ports = ports
        self._pids = pids
        self._folder = folder

    async def run(self, progress: Progress, died: list[str]) -> list[Sample]:
        """All rounds. The order of the paths turns with each, so that none is always the first."""
        ways = self._plan.ways
        urls = {way.name: await self._ports.url(way.name) for way in ways}
        steps = len(ways) * (self._plan.rounds + 1)
        samples: list[Sample] = []
        for done, way in enumerate(ways):
            progress(done, steps, f"warming up, {way.name}")
            await throughput(self._tools, urls[way.name], WARM_UP_S, self._folder)
        for number in range(1, self._plan.rounds + 1):
            turn = number % len(ways)
            for place, way in enumerate((*ways[turn:], *ways[:turn])):
                progress(number * len(ways) + place, steps, f"round {number} of {self._plan.rounds}, {way.name}")
                samples.append(await self._sample(way.name, way.server, number, urls[way.name]))
                await self._check(died)
        progress(steps, steps, "done")
        order = [way.name for way in ways]
        return sorted(samples, key=lambda sample: (sample.round, order.index(sample.path)))

    async def _sample(self, path: str, server: str | None, number: int, url: str) -> Sample:
        envoy, served = self._pids["envoy"], self._pids[server] if server is not None else None
        before = cpu_s(envoy), cpu_s(served)
        load = await throughput(self._tools, url, self._plan.seconds, self._folder)
        after = cpu_s(envoy), cpu_s(served)
        p50_us, p99_us = await latencies_us(self._tools, url, self._plan.seconds, self._folder) or (None, None)
        each_us = [(now - then) / load.requests * 1e6 for then, now in zip(before, after, strict=True)]
        server_us = each_us[1] if served is not None else None
        return Sample(path, number, load.per_s, server_us, each_us[0], p50_us, p99_us)

    async def _check(self, died: list[str]) -> None:
        """Raises BenchError when what was measured is not what was meant."""
        if died:
            raise BenchError(died[0])
        if unanswered := await self._ports.unanswered():
            raise BenchError(f"Envoy let {unanswered} requests through without an answer: the figures mean nothing")


def cpu_s(pid: int | None) -> float:
    """User and system CPU seconds of a process so far; 0 for None. Raises BenchError where there is no /proc."""
    if pid is None:
        return 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        raise BenchError(f"/proc/{pid}/stat cannot be read: bench needs Linux, and the program alive") from None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

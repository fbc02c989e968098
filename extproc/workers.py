"""The worker processes of `perch serve --workers N`: started, given every ruleset, restarted when they die."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from extproc.flagcompiler import END, frame, read_frame

BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MAX_BACKLOG_BYTES = 64 * 1024 * 1024
"""A worker that has not read this much is hung, and is replaced."""

FOLLOWS, NONE_YET = b"follows", b"none yet"
"""Whether there is a ruleset already, which a new worker is to take before it listens."""

STEADY_S = 10.0
"""A worker that lived this long starts the back-off anew when it dies."""


@dataclass(slots=True)
class Workers:
    """One process per address, which reads what it serves from its standard input and ends when that is closed.

    It gets the greeting, the ruleset of no flags, FOLLOWS or NONE_YET, and then every ruleset. `command` gives its
    arguments by address.
    """

    addresses: Sequence[str]
    command: Callable[[str], Sequence[str]]
    greeting: bytes
    tell: Callable[[str, str], None]
    grace_s: float
    _first: tuple[bytes, ...] = field(default=(), init=False)
    _latest: tuple[bytes, ...] = field(default=(), init=False)
    _running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict, init=False)
    _stopping: bool = field(default=False, init=False)

    async def run(self) -> None:
        """Keeps one process per address until cancelled."""
        async with asyncio.TaskGroup() as group:
            for address in self.addresses:
                group.create_task(self._keep(address))

    def publish(self, parts: Sequence[bytes]) -> None:
        """Gives these parts to every worker, and to every one started later."""
        self._latest = (*parts, END)
        for process in self._running.values():
            self._give(process, self._latest)

    def begin_with(self, parts: Sequence[bytes]) -> None:
        """What every worker is given first, so that it can answer before there is a good flag file."""
        self._first = (*parts, END)

    async def stop(self) -> None:
        """SIGTERM to all, then SIGKILL to those still there after the grace."""
        self._stopping = True
        processes = list(self._running.values())
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace_s + 2):
                await asyncio.gather(*(process.wait() for process in processes))
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _keep(self, address: str) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            started = loop.time()
            code = await self._run_one(address)
            if self._stopping:
                return
            failures = 0 if loop.time() - started > STEADY_S else failures + 1
            wait_s = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1] if failures else 0.0
            self.tell("worker_restarting", f"{address} ended with {code}; again in {wait_s:g} s")
            await asyncio.sleep(wait_s)

    async def _run_one(self, address: str) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "extproc", *self.command(address), stdin=asyncio.subprocess.PIPE
        )
        self._running[address] = process
        self._give(process, (self.greeting, *self._first, FOLLOWS if self._latest else NONE_YET, *self._latest))
        code = await process.wait()
        del self._running[address]  # not in a finally: what still runs when this is cancelled is `stop`'s to end
        return code

    @staticmethod
    def _give(process: asyncio.subprocess.Process, parts: Sequence[bytes]) -> None:
        """Writes the parts without waiting, so that a worker that hangs does not keep a rollback from the others."""
        if process.stdin is None or process.stdin.is_closing():
            return
        if process.stdin.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            process.kill()
            return
        process.stdin.write(b"".join(map(frame, parts)))


class Parent:
    """The worker's side of the pipe: messages from the parent, on standard input."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader(limit=1 << 20)

    async def connect(self) -> None:
        """Begins to read. Call once."""
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self._reader), sys.stdin)

    async def message(self) -> bytes:
        """The next message. Raises asyncio.IncompleteReadError once the parent is gone."""
        return await read_frame(self._reader)

    async def parts(self) -> AsyncIterator[bytes]:
        """The parts of the next ruleset. Raises asyncio.IncompleteReadError once the parent is gone."""
        while (part := await self.message()) != END:
            yield part

"""Runs programs on one machine: starts them in stages, waits until they are ready, restarts what dies, stops in order.

It knows nothing of what it runs. Each program gets a session of its own, so that a terminal's Ctrl-C reaches only the
supervisor, which then stops them in order; no program, and no child of a program, outlives the supervisor, even when
that is killed with SIGKILL (`supervisor_child` says how). Call it from the main thread's event loop: Linux ties a
program to the thread that started it.

One task per program, its keeper, owns everything about it. `stop` only raises flags and waits for the keepers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extproc import supervisor_child

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

_ASK_EVERY_S: Final = 0.05  # between two readiness probes
_PROBE_WITHIN_S: Final = 5.0  # a probe that hangs is asked again
_TAIL_BYTES: Final = 4096  # of the log, for the last lines in a message
_BACKOFF_S: Final = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A program to run.

    `env` is the whole environment, nothing is inherited. `ready` is asked every 50 ms, may raise, and means True; None
    is ready once started. `leftovers` are removed before a start and after an end. `stop_signal` goes to the program
    alone, so that it can stop its own children; after `stop_grace_s` all of them are killed.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log_path: Path
    stage: int = 0
    ready: Callable[[], Awaitable[bool]] | None = None
    ready_within_s: float = 30.0
    stop_signal: int = signal.SIGTERM
    stop_grace_s: float = 10.0
    leftovers: tuple[Path, ...] = ()


class EventKind(StrEnum):
    """What can happen to a program, in the order of its life."""

    STARTED = "started"
    SLOW = "slow"  # not ready within `ready_within_s`, and again after each such time; it goes on waiting
    READY = "ready"
    DIED = "died"  # ended, or could not be started, without being asked to stop
    RESTARTING = "restarting"  # will be started again after the pause in `detail`
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a program. `pid` is None where there is no process."""

    kind: EventKind
    process: str
    detail: str = ""
    pid: int | None = None


class StartFailed(Exception):  # noqa: N818  reads as what happened, and is no fault of ours
    """A program ended before it was ready for the first time. The message is one line."""


class Supervisor:
    """Keeps the processes running from `start` to `stop`. `on_event` is called from the loop and must not block.

    `backoff_s` are the pauses before the first, second, ... restart in a row; the last one repeats. A program that
    stayed up for `steady_s` starts again at the first. Raises ValueError for two processes of one name.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        on_event: Callable[[Event], None],
        *,
        backoff_s: Sequence[float] = _BACKOFF_S,
        steady_s: float = 30.0,
    ) -> None:
        names = [process.name for process in processes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two processes named {', '.join(twice)}: give each its own name")
        self._kept = [_Kept(process) for process in processes]
        self._on_event = on_event
        self._backoff_s = tuple(backoff_s)
        self._steady_s = steady_s
        self._guard: _Guard | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start stage by stage, each once all of the stage before are ready. Returns early when stopped meanwhile.

        Raises StartFailed, after stopping all, if a program ends before it is ready for the first time.
        """
        if self._guard is not None:
            raise RuntimeError("a supervisor starts once")
        if self._stopping is None:
            self._guard = _Guard()
        for stage in sorted({kept.process.stage for kept in self._kept}):
            if self._stopping is not None:
                return
            members = [kept for kept in self._kept if kept.process.stage == stage]
            for kept in members:
                kept.keeper = asyncio.create_task(self._keep(kept), name=f"keep {kept.process.name}")
            for next_one in asyncio.as_completed([kept.first_time.wait() for kept in members]):
                await next_one
                failed = next((kept.failed for kept in members if kept.failed is not None), None)
                if failed is not None:
                    await self.stop()
                    raise failed

    async def run(self) -> None:
        """Wait until stopped. The keepers restart what dies from `start` on; this raises if one of them breaks."""
        keepers = [kept.keeper for kept in self._kept if kept.keeper is not None]
        if keepers:
            ended, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            for keeper in ended:
                keeper.result()
        await self.stop()

    async def stop(self) -> None:
        """Stop all, the last stage first, the members of a stage together. May be called at any time and repeatedly."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop_all(), name="stop processes")
        await asyncio.shield(self._stopping)

    def pids(self) -> dict[str, int]:
        """The process id of every program that runs now, by name."""
        return {kept.process.name: kept.pid for kept in self._kept if kept.pid is not None}

    async def _stop_all(self) -> None:
        for stage in sorted({kept.process.stage for kept in self._kept}, reverse=True):
            members = [kept for kept in self._kept if kept.process.stage == stage]
            for kept in members:
                kept.halt.set()
            keepers = [kept.keeper for kept in members if kept.keeper is not None]
            await asyncio.gather(*keepers, return_exceptions=True)  # `run` tells of exceptions
        if self._guard is not None:
            await self._guard.close()

    async def _keep(self, kept: _Kept) -> None:
        """Start the program again and again until halted."""
        loop = asyncio.get_running_loop()
        restarts = 0
        try:
            while not kept.halt.is_set():
                began_s = loop.time()
                how_it_died = await self._live(kept)
                if how_it_died is None:
                    return
                if not kept.first_time.is_set():
                    kept.failed = StartFailed(f"{kept.process.name}: {how_it_died}")
                    return
                if loop.time() - began_s >= self._steady_s:
                    restarts = 0
                pause_s = self._backoff_s[min(restarts, len(self._backoff_s) - 1)]
                restarts += 1
                self._tell(kept, EventKind.RESTARTING, f"in {pause_s:g} s")
                await _happens(kept.halt, pause_s)
        except Exception as error:  # on_event's: neither may `start` wait for ever nor the fault be lost
            kept.failed = error
            raise
        finally:
            kept.first_time.set()

    async def _live(self, kept: _Kept) -> str | None:
        """One life of the program: how it died, or None when it was stopped. Nothing of it is left either way."""
        try:
            running = await kept.spawn()
        except OSError as error:
            how = f"could not be started: {error}"
            self._tell(kept, EventKind.DIED, how)
            return how
        kept.pid = running.pid
        try:
            if self._guard is not None:
                self._guard.add(running.pid)
            self._tell(kept, EventKind.STARTED)
            how = await self._watch(kept, running)
        finally:
            kept.pid = None
            _kill_group(running.pid)
            if self._guard is not None:
                self._guard.remove(running.pid)
            kept.remove_leftovers()
        self._tell(kept, EventKind.STOPPED if kept.halt.is_set() else EventKind.DIED, how, running.pid)
        return None if kept.halt.is_set() else how

    async def _watch(self, kept: _Kept, running: asyncio.subprocess.Process) -> str:
        """Wait for the end, or bring it about when halted; tell of readiness on the way. Returns how it ended."""
        exited = asyncio.create_task(running.wait())
        halted = asyncio.create_task(kept.halt.wait())
        ready = asyncio.create_task(kept.until_ready())
        waiting = {exited, halted, ready}
        try:
            while True:
                within_s = kept.process.ready_within_s if ready in waiting else None
                done, _ = await asyncio.wait(waiting, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
                if exited in done:
                    return kept.epitaph(exited.result(), was_ready=ready not in waiting)
                if halted in done:
                    return await kept.end(running, exited)
                if ready in done:
                    waiting.remove(ready)
                    self._tell(kept, EventKind.READY)
                    kept.first_time.set()
                else:
                    self._tell(kept, EventKind.SLOW, f"not ready within {within_s:g} s{kept.last_probe}")
        finally:
            for task in (exited, halted, ready):
                task.cancel()

    def _tell(self, kept: _Kept, kind: EventKind, detail: str = "", pid: int | None = None) -> None:
        self._on_event(Event(kind, kept.process.name, detail, pid or kept.pid))


@dataclass(slots=True, eq=False)
class _Kept:
    """A process and where it is in its life."""

    process: Process
    halt: asyncio.Event = field(default_factory=asyncio.Event)  # asks the keeper to end it
    first_time: asyncio.Event = field(default_factory=asyncio.Event)  # ready, or given up, for the first time
    failed: Exception | None = None
    keeper: asyncio.Task[None] | None = None
    pid: int | None = None
    log_from: int = 0  # where in the log this life begins, bytes
    last_probe: str = ""  # what the last readiness probe raised

    async def spawn(self) -> asyncio.subprocess.Process:
        """Start the program in a session of its own. OSError when that fails."""
        process = self.process
        for leftover in process.leftovers:
            leftover.unlink(missing_ok=True)
        if shutil.which(process.argv[0], path=process.env.get("PATH", os.defpath)) is None:
            raise FileNotFoundError(f"there is no program {process.argv[0]!r}")
        process.log_path.parent.mkdir(parents=True, exist_ok=True)
        with process.log_path.open("ab") as log:
            self.log_from = log.tell()
            return await asyncio.create_subprocess_exec(
                *_child_program("tie", str(os.getpid()), *process.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(process.env),
                start_new_session=True,
            )

    async def until_ready(self) -> None:
        """Return once the program says that it is ready."""
        ready = self.process.ready
        self.last_probe = ""
        while ready is not None:
            try:
                if await asyncio.wait_for(ready(), _PROBE_WITHIN_S):
                    return
                self.last_probe = ""
            except Exception as error:  # noqa: BLE001  a probe of what is not up yet may raise anything
                self.last_probe = f" ({type(error).__name__}: {error})"
            await asyncio.sleep(_ASK_EVERY_S)

    async def end(self, running: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> str:
        """Ask the program to stop, kill its group after the grace; how it ended."""
        grace_s = self.process.stop_grace_s
        with contextlib.suppress(ProcessLookupError):
            running.send_signal(self.process.stop_signal)
        await asyncio.wait({exited}, timeout=grace_s)
        if exited.done():
            return _how_ended(exited.result())
        _kill_group(running.pid)
        await exited
        return f"killed, still running {grace_s:g} s after {signal.Signals(self.process.stop_signal).name}"

    def epitaph(self, code: int, *, was_ready: bool) -> str:
        """How it ended and its last words, in one line."""
        last = " | ".join(_last_lines(self.process.log_path, self.log_from))
        when = "" if was_ready else " before it was ready"
        return f"{_how_ended(code)}{when}: {last or 'it wrote nothing'} (log: {self.process.log_path})"

    def remove_leftovers(self) -> None:
        """After an end; what cannot be removed is an error at the next start."""
        for leftover in self.process.leftovers:
            with contextlib.suppress(OSError):
                leftover.unlink()


class _Guard:
    """The process that kills the groups left behind when this one is killed. It costs one small Python.

    If somebody kills the guard itself, programs still die with the supervisor, on Linux; their children may not.
    """

    def __init__(self) -> None:
        read_end, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own program
                _child_program("guard"),
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,  # Ctrl-C is not for it
            )
        finally:
            os.close(read_end)

    def add(self, group: int) -> None:
        self._write(f"+{group}\n")

    def remove(self, group: int) -> None:
        self._write(f"-{group}\n")

    def _write(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())

    async def close(self) -> None:
        os.close(self._pipe)
        await asyncio.to_thread(self._process.wait)


def _child_program(*arguments: str) -> tuple[str, ...]:
    """The command line of `supervisor_child`: by path and isolated, which starts in half the time of `-m`."""
    return (sys.executable, "-I", "-S", supervisor_child.__file__, *arguments)


def _kill_group(group: int) -> None:
    """SIGKILL what is left of a group. Its number cannot be another's yet: ids are given out in turn."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, all of it zombies
        os.killpg(group, signal.SIGKILL)


def _how_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


def _last_lines(log_path: Path, since: int, count: int = 3) -> list[str]:
    """The last lines that are not empty, from byte `since` on, without control characters."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(since, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:  # removed meanwhile
        return []
    lines = ("".join(char for char in line if char.isprintable()).strip() for line in text.splitlines())
    return [line for line in lines if line][-count:]


async def _happens(event: asyncio.Event, within_s: float) -> None:
    """Wait for the event, but no longer."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), within_s)

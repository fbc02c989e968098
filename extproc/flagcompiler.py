"""The process that reads flag files for serve and control: `python -m extproc.flagcompiler`, one request at a time.

A process of its own, because parsing 1,000 flags in a thread stalls the loop that answers requests, and because the
YAML, schema and message libraries it needs are most of perch's memory. It answers on a pipe, in parts small enough that
the reader's loop does not stall on any of them, and it ends when its parent does.
"""

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import struct
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from extproc.core.document import FlagFileError, Place, Problem
from extproc.core.flags import Exposure, Exposures, Flag
from extproc.core.ruleset import Choice, Draft, choices_of, ruleset_version

FLAGS_PER_PART = 16
"""Unpickling and compiling this many takes well under a millisecond."""

NICE = 5
"""Steps of priority below the processes that answer: where processors are short, requests come first."""

MOST_PROBLEMS = 200
"""More are of no use to a person, and unpickling them all would stall the loop that answers requests."""

DEADLINE_S = 60.0
"""Nothing legible takes this long; a parser that does is stopped."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be compiled: a flag file's bytes, what the controller decided, and the models with their prefixes."""

    content: bytes
    exposures: Exposures
    models: Mapping[str, str]
    with_replies: bool


@dataclass(frozen=True, slots=True)
class Head:
    """The first part of an answer: the version, how many flags follow, and the replies that belong to no flag.

    Another one begins the answer anew.
    """

    version: str
    flags: int
    replies: tuple[bytes, ...]
    other_phases: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Part:
    """Some flags, each with its exposure and the replies to its choices."""

    flags: tuple[tuple[Flag, Exposure | None, tuple[bytes, ...]], ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The file must not be served, and this is all that is wrong with it."""

    problems: tuple[Problem, ...]


Answer = Head | Part | Refused

END = b""
"""The frame after the last part of an answer."""


class Compiler:
    """The parent's side. `compile` yields the parts as they come; the process is started when needed and kept warm."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Starts the process now, so that the first task does not wait for its imports."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "extproc.flagcompiler",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 20,
            )

    async def compile(self, task: Task) -> AsyncIterator[bytes]:
        """The pickled parts of the answer to `task`, to be read to the end.

        A process that dies over it is given a second chance, as it may have been killed for no fault of the file: its
        answer begins anew, with another Head. One that dies again, or takes too long, is a Refused.
        """
        async with self._turn:
            for is_last_try in (False, True):
                try:
                    async for part in self._answer(task):
                        yield part
                    return
                except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
                    await self.stop()
                    late = isinstance(error, TimeoutError)
                    if late or is_last_try:
                        yield pickle.dumps(_gave_up("took too long" if late else "died"))
                        return
                except (asyncio.CancelledError, GeneratorExit):
                    await self.stop()  # a half-read answer would be taken for the next one's
                    raise

    async def _answer(self, task: Task) -> AsyncIterator[bytes]:
        async with asyncio.timeout(DEADLINE_S):
            await self.start()
            assert self._process is not None  # noqa: S101  just started; the type does not say so
            assert self._process.stdin is not None  # noqa: S101  asked for as a pipe
            self._process.stdin.write(frame(pickle.dumps(task)))
        stream = self._process.stdout
        assert stream is not None  # noqa: S101  asked for as a pipe
        while True:
            async with asyncio.timeout(DEADLINE_S):
                part = await read_frame(stream)
            if part == END:
                return
            yield part

    async def stop(self) -> None:
        """Ends the process; a later task starts a new one."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _gave_up(what: str) -> Refused:
    message = f"the process that reads flag files {what} over this file; make it smaller or simpler"
    return Refused((Problem(Place(1, 1), "", message),))


def frame(message: bytes) -> bytes:
    """A message as it goes through a pipe: its length, then itself."""
    return _LENGTH.pack(len(message)) + message


async def read_frame(stream: asyncio.StreamReader) -> bytes:
    """The next message from a pipe. Raises asyncio.IncompleteReadError at its end."""
    return await stream.readexactly(_LENGTH.unpack(await stream.readexactly(_LENGTH.size))[0])


class _Reader:
    """The child's side: remembers the last file's flags, since most tasks differ only in their exposures."""

    def __init__(self) -> None:
        self._content: tuple[bytes, tuple[str, ...]] | None = None
        self._flags: tuple[Flag, ...] = ()

    def answer(self, task: Task) -> Iterator[Answer]:
        try:
            flags = self._read(task)
        except FlagFileError as error:
            yield Refused(error.problems[:MOST_PROBLEMS])
            return
        except (MemoryError, RecursionError) as error:
            yield Refused((Problem(Place(1, 1), "", f"this file is too much to read: {type(error).__name__}"),))
            return
        version = ruleset_version(task.content, task.exposures.seq)
        yield from _compiled(flags, task, version)

    def _read(self, task: Task) -> tuple[Flag, ...]:
        from extproc.flagread import flags_in  # noqa: PLC0415  not for the parent, which imports this module too

        wanted = (task.content, tuple(task.models))
        if self._content != wanted:
            self._flags = flags_in(task.content, task.models).flags
            self._content = wanted
        return self._flags


def _compiled(flags: tuple[Flag, ...], task: Task, version: str) -> Iterator[Head | Part]:
    """The head and the parts. The choices are numbered as the parent's Draft will number them."""
    from extproc.wire.replies import OTHER_PHASES, replies  # noqa: PLC0415  not for the parent

    def made(choices: tuple[Choice, ...]) -> tuple[bytes, ...]:
        return tuple(replies(choices, version)) if task.with_replies else ()

    draft = Draft(version, task.models).finish()
    yield Head(version, len(flags), made(draft.choices), OTHER_PHASES)
    index = len(draft.choices)
    for start in range(0, len(flags), FLAGS_PER_PART):
        part = []
        for flag in flags[start : start + FLAGS_PER_PART]:
            choices = choices_of(flag, index)
            index += len(choices)
            part.append((flag, task.exposures.of(flag), made(choices)))
        yield Part(tuple(part))


def _serve(tasks: BinaryIO, answers: BinaryIO) -> None:
    reader = _Reader()
    while header := tasks.read(_LENGTH.size):
        task = pickle.loads(tasks.read(_LENGTH.unpack(header)[0]))  # noqa: S301  from our own parent
        for answer in reader.answer(task):
            answers.write(frame(pickle.dumps(answer)))
            answers.flush()
        answers.write(frame(END))
        answers.flush()


def main() -> None:
    """Reads tasks from stdin until it is closed. Signals are the parent's matter: it closes the pipe or kills."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import extproc.core.schema  # noqa: PLC0415  warmed up before the first task comes
    import extproc.flagyaml  # noqa: PLC0415
    import extproc.wire.replies  # noqa: F401, PLC0415

    os.nice(NICE)
    gc.freeze()
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # a stray print must not end up between the answers
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    # Classes pickled as __main__.X would not be known to the parent.
    from extproc import flagcompiler  # noqa: PLW0406

    flagcompiler.main()

"""Follows the flag file and the controller's exposures, and publishes a ruleset whenever either changes.

The last good file stays: while the flag file is missing, half-written or wrong, and across restarts. Nothing here runs
between a request and its answer.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from extproc.core.document import Place, Problem
from extproc.core.exposure import ExposureError, parse_exposures, plain_exposures
from extproc.core.flags import Exposures
from extproc.flagyaml import MAX_BYTES
from extproc.statefiles import read_or_none, write_atomically
from extproc.watch import changes, signature

SETTLE_S = 0.02
"""A file that changed again within this time is still being written."""

SETTLE_UNENDED_S = 0.5
"""The same for a file whose last line has no end, as a half-written one mostly has not."""

SETTLE_AT_MOST_S = 1.5
"""A file that never stops changing is given up for this look, so that the exposures are followed meanwhile."""

RESTLESS_CHANGES = 3

MAX_EXPOSURE_BYTES = 64 * 1024 * 1024

Parts = AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the flag file and the state folder are."""

    flags: Path
    state: Path

    @property
    def exposure(self) -> Path:
        """The controller's decisions."""
        return self.state / "exposure.json"

    @property
    def last_good(self) -> Path:
        """The last flag file that was served."""
        return self.state / "flags.last-good.yaml"

    @property
    def rulesets(self) -> Path:
        """What was served under each version, for a replay."""
        return self.state / "rulesets"

    def kept(self, version: str) -> Path:
        """The record of one version, the last file that serve writes of it."""
        return self.rulesets / f"{version}.json"


@dataclass(frozen=True, slots=True)
class Published:
    """What is served now."""

    version: str
    content: bytes
    exposures: Exposures
    flags: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an attempt to publish: problems, or the version and the number of flags."""

    version: str = ""
    flags: int = 0
    problems: tuple[Problem, ...] = ()


def read_exposures(path: Path) -> Exposures | None:
    """The controller's file; None if there is none. Raises ExposureError when it cannot be followed."""
    try:
        content = read_or_none(path, MAX_EXPOSURE_BYTES)
    except OSError as error:
        raise ExposureError(f"cannot be read: {error.strerror}") from None
    if content is None:
        return None
    try:
        return parse_exposures(json.loads(content, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        raise ExposureError(str(error)) from None


def _refuse_constant(name: str) -> Any:
    raise ExposureError(f"{name} is not a number that can be followed")


class Unsettled(Enum):
    """A file that would not stop changing."""

    RESTLESS = "restless"


RESTLESS: Final = Unsettled.RESTLESS


async def read_settled(path: Path) -> bytes | Unsettled | None:
    """The file once it has stopped changing; None if there is none. A file of more than MAX_BYTES is cut there.

    RESTLESS if it still changes after SETTLE_AT_MOST_S and was seen to change RESTLESS_CHANGES times: on a machine that
    stands still for a second, one edit is no restless file. Raises OSError where it cannot be read.
    """
    clock = asyncio.get_running_loop().time
    end_s = clock() + SETTLE_AT_MOST_S
    changed = 0
    while clock() < end_s or changed < RESTLESS_CHANGES:
        before = signature(path)
        content = read_or_none(path, MAX_BYTES)
        if content is None:
            return None
        await asyncio.sleep(SETTLE_S if content.endswith((b"\n", b"}")) else SETTLE_UNENDED_S)
        if signature(path) == before and read_or_none(path, MAX_BYTES) == content:
            return content
        changed += 1
    return RESTLESS


@dataclass(slots=True)
class FlagFile:
    """Reads, has compiled, publishes and keeps. One per process tree; `keep` is for the one that owns the state files.

    compile:  (content, exposures) -> the parts of an answer, pickled, as the flag compiler gives them
    publish:  takes those parts; returns the problems if the file was refused, else None and the number of flags
    tell:     (kind, text): an event for people
    count:    (accepted): a reload was accepted or rejected
    """

    paths: Paths
    compile: Callable[[bytes, Exposures], Parts]
    publish: Callable[[Parts], Awaitable[Verdict]]
    tell: Callable[[str, str], None]
    count: Callable[[bool], None]
    keep: bool = True
    published: Published | None = None
    problems: tuple[Problem, ...] = ()
    _refused: bytes | None = field(default=None, init=False)
    _unserved: str = field(default="", init=False)
    _unkept: str = field(default="", init=False)
    _exposures: Exposures | None = field(default=None, init=False)
    _exposure_problem: str = field(default="", init=False)

    async def follow(self) -> None:
        """Publishes what is there, then every change, until cancelled."""
        async for _ in changes([self.paths.flags, self.paths.exposure]):
            await self.refresh()

    async def refresh(self) -> None:
        """Reads both files and publishes them if they differ from what is served.

        The exposures first, with the flag file that is served: a rollback waits for no flag file, however broken.
        """
        exposures = self._read_exposures()
        published = self.published
        if self._unkept and published is not None:
            await self._keep(published)
        if published is not None and published.exposures != exposures:
            self._not_served(self.paths.exposure, await self._serve(published.content, exposures))
        content, problems = await self._read_flags()
        if content is not None and self.published is not None and content == self.published.content:
            if self.problems:
                self._repaired()
            return
        if content is not None and content == self._refused:
            problems = self.problems
        elif content is not None:
            problems = await self._serve(content, exposures)
        if problems:
            self._refuse(content, problems)
            if self.published is None:
                await self._fall_back(exposures)

    async def _read_flags(self) -> tuple[bytes | None, tuple[Problem, ...]]:
        """The flag file's content, or why there is none that could be tried."""
        try:
            content = await read_settled(self.paths.flags)
        except OSError as error:
            return None, _problem(f"cannot be read: {error.strerror}; check its permissions")
        if content is None:
            return None, _problem("there is no such file; the last good one stays")
        if content is RESTLESS:
            return None, _problem("the file never stops changing; the last good one stays until it does")
        return content, ()

    def _repaired(self) -> None:
        """The file is again the one that is served, after it was missing or wrong."""
        self.problems, self._refused = (), None
        self.tell("flags_restored", f"{self.paths.flags} is again what is served")

    def _read_exposures(self) -> Exposures:
        """The exposures; the last good ones while the file is missing or unreadable.

        With no good ones yet, a file that is missing closes no gate, and one that is unreadable closes them all.
        """
        try:
            exposures = read_exposures(self.paths.exposure)
        except ExposureError as error:
            if str(error) != self._exposure_problem:
                self.tell("exposure_unreadable", f"{self.paths.exposure}: {error}; the last good one stays")
            self._exposure_problem = str(error)
            return self._exposures if self._exposures is not None else Exposures(closed=True)
        self._exposure_problem = ""
        if exposures is None:
            return self._exposures if self._exposures is not None else Exposures()
        self._exposures = exposures
        return exposures

    async def _serve(self, content: bytes, exposures: Exposures) -> tuple[Problem, ...]:
        """Has both compiled and published. What is wrong, if they are not served now."""
        if len(content) > MAX_BYTES:
            return _problem(f"larger than the {MAX_BYTES:,} bytes that are read")
        verdict = await self.publish(self.compile(content, exposures))
        if verdict.problems:
            return verdict.problems
        before, self.published = self.published, Published(verdict.version, content, exposures, verdict.flags)
        self._unserved = ""
        if before is not None and before.content == content:
            self.tell("exposure_followed", f"version {verdict.version}")
        else:
            self.problems, self._refused = (), None
            self.count(True)
            flags = "1 flag" if verdict.flags == 1 else f"{verdict.flags} flags"
            self.tell("flags_reloaded" if before else "flags_loaded", f"{flags}, version {verdict.version}")
        await self._keep(self.published)
        return ()

    async def _keep(self, published: Published) -> None:
        """Writes to the state folder what is served. A full disk is told once, and stops nothing."""
        if not self.keep:
            return
        try:
            await asyncio.to_thread(keep_state, self.paths, published)
        except OSError as error:
            problem = f"{error.filename or self.paths.state}: {error.strerror}"
            if not self._unkept:
                self.tell("state_not_kept", f"{problem}; served all the same, but a restart would forget it")
            self._unkept = problem
        else:
            self._unkept = ""

    def _refuse(self, content: bytes | None, problems: tuple[Problem, ...]) -> None:
        """Says once what is wrong with the flag file."""
        if self._refused != content or self.problems != problems:
            self.count(False)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.tell("flags_rejected", f"{self.paths.flags}:{problems[0]}{more}")
        self.problems, self._refused = problems, content

    async def _fall_back(self, exposures: Exposures) -> None:
        """At the start, with a bad flag file: the last good one of an earlier run. Tried again at each look."""
        problems, refused = self.problems, self._refused
        try:
            content = read_or_none(self.paths.last_good, MAX_BYTES)
        except OSError as error:
            self._not_served(self.paths.last_good, _problem(f"cannot be read: {error.strerror}"))
            return
        if content is None:
            return
        found = await self._serve(content, exposures)
        self.problems, self._refused = problems, refused  # it is the flag file that they are about
        self._not_served(self.paths.last_good, found)
        if not found:
            self.tell("last_good", f"serving {self.paths.last_good} until the flag file is good")

    def _not_served(self, path: Path, problems: tuple[Problem, ...]) -> None:
        """Says once that a file which was good before could not be served."""
        if problems and self._unserved != str(problems[0]):
            self._unserved = str(problems[0])
            self.tell("not_served", f"{path}:{problems[0]}; what is served stays")


def _problem(message: str) -> tuple[Problem, ...]:
    return (Problem(Place(1, 1), "", message),)


def keep_state(paths: Paths, published: Published) -> None:
    """Writes the last good file and what was served under this version; its record last: where it is, all is.

    Raises OSError.
    """
    digest, _, _ = published.version.partition(".")
    text = paths.rulesets / f"{digest}.yaml"
    record = {"version": published.version, "flag_file": text.name, **plain_exposures(published.exposures, "serve")}
    if not text.exists():
        write_atomically(text, published.content)
    if read_or_none(paths.last_good, MAX_BYTES) != published.content:
        write_atomically(paths.last_good, published.content)
    write_atomically(paths.kept(published.version), json.dumps(record, indent=1).encode() + b"\n")

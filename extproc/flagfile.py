"""Follows the flag file and the controller's exposures, and publishes a ruleset whenever either changes.

The last good file stays: while the flag file is missing, half-written or wrong, and across restarts. Nothing here runs
between a request and its answer.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    content = read_or_none(path, MAX_EXPOSURE_BYTES)
    if content is None:
        return None
    try:
        return parse_exposures(json.loads(content, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        raise ExposureError(str(error)) from None


def _refuse_constant(name: str) -> Any:
    raise ExposureError(f"{name} is not a number that can be followed")


async def read_settled(path: Path) -> bytes | None:
    """The file once it has stopped changing; None if there is none. A file of more than MAX_BYTES is cut there."""
    while True:
        before = signature(path)
        content = read_or_none(path, MAX_BYTES)
        if content is None:
            return None
        await asyncio.sleep(SETTLE_S if content.endswith((b"\n", b"}")) else SETTLE_UNENDED_S)
        if signature(path) == before and read_or_none(path, MAX_BYTES) == content:
            return content


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
    _refused: tuple[bytes | None, Exposures] | None = field(default=None, init=False)
    _exposures: Exposures | None = field(default=None, init=False)
    _exposure_problem: str = field(default="", init=False)

    async def follow(self) -> None:
        """Publishes what is there, then every change, until cancelled."""
        async for _ in changes([self.paths.flags, self.paths.exposure]):
            await self.refresh()

    async def refresh(self) -> None:
        """Reads both files and publishes them if they differ from what is served."""
        try:
            content = await read_settled(self.paths.flags)
            exposures = self._read_exposures()
        except OSError as error:
            await self._refuse(None, Exposures(), _problem(f"cannot be read: {error.strerror}; check its permissions"))
            return
        if content is None:
            await self._refuse(None, exposures, _problem("there is no such file; the last good one stays"))
        elif self.published is None or (content, exposures) != (self.published.content, self.published.exposures):
            await self._try(content, exposures)
        elif self.problems:
            self._repaired()

    def _repaired(self) -> None:
        """The file is again the one that is served, after it was missing or wrong."""
        self.problems, self._refused = (), None
        self.tell("flags_restored", f"{self.paths.flags} is again what is served")

    def _read_exposures(self) -> Exposures:
        """The exposures; the last good ones while the file is unreadable; with none ever, nobody is let through."""
        try:
            exposures = read_exposures(self.paths.exposure)
            self._exposure_problem = ""
        except ExposureError as error:
            if str(error) != self._exposure_problem:
                self.tell("exposure_unreadable", f"{self.paths.exposure}: {error}; the last good one stays")
            self._exposure_problem = str(error)
            exposures = self._exposures if self._exposures is not None else Exposures(closed=True)
        else:
            exposures = exposures if exposures is not None else self._exposures or Exposures()
        self._exposures = exposures
        return exposures

    async def _try(self, content: bytes, exposures: Exposures) -> None:
        """Publishes a file that has not been refused before."""
        if self._refused == (content, exposures):
            return
        if len(content) > MAX_BYTES:
            await self._refuse(content, exposures, _problem(f"larger than the {MAX_BYTES:,} bytes that are read"))
            return
        verdict = await self.publish(self.compile(content, exposures))
        if verdict.problems:
            await self._refuse(content, exposures, verdict.problems)
            return
        self.problems, self._refused = (), None
        await self._now_served(Published(verdict.version, content, exposures, verdict.flags))

    async def _now_served(self, published: Published) -> None:
        before, self.published = self.published, published
        if before is None or before.content != published.content:
            self.count(True)
            flags = "1 flag" if published.flags == 1 else f"{published.flags} flags"
            self.tell("flags_reloaded" if before else "flags_loaded", f"{flags}, version {published.version}")
        else:
            self.tell("exposure_followed", f"version {published.version}")
        if self.keep:
            await asyncio.to_thread(keep_state, self.paths, published, self.tell)

    async def _refuse(self, content: bytes | None, exposures: Exposures, problems: tuple[Problem, ...]) -> None:
        """Says once what is wrong, and sees to it that the exposures are followed all the same."""
        if self._refused is None or self._refused[0] != content or self.problems != problems:
            self.count(False)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.tell("flags_rejected", f"{self.paths.flags}:{problems[0]}{more}")
        self.problems, self._refused = problems, (content, exposures)
        if self.published is None:
            await self._fall_back(exposures)
        elif self.published.exposures != exposures and content != self.published.content:
            await self._republish(self.published.content, exposures)

    async def _fall_back(self, exposures: Exposures) -> None:
        """At the start, with a bad flag file: the last good one of an earlier run."""
        content = read_or_none(self.paths.last_good, MAX_BYTES)
        if content is not None and await self._republish(content, exposures):
            self.tell("last_good", f"serving {self.paths.last_good} until the flag file is good")

    async def _republish(self, content: bytes, exposures: Exposures) -> bool:
        verdict = await self.publish(self.compile(content, exposures))
        if verdict.problems:
            self.tell("last_good_rejected", f"{self.paths.last_good}:{verdict.problems[0]}")
            return False
        self.published = Published(verdict.version, content, exposures, verdict.flags)
        if self.keep:
            await asyncio.to_thread(keep_state, self.paths, self.published, self.tell)
        return True


def _problem(message: str) -> tuple[Problem, ...]:
    return (Problem(Place(1, 1), "", message),)


def keep_state(paths: Paths, published: Published, tell: Callable[[str, str], None]) -> None:
    """Writes the last good file and what was served under this version. A full disk is told, and stops nothing."""
    digest, _, _ = published.version.partition(".")
    text = paths.rulesets / f"{digest}.yaml"
    record = {"version": published.version, "flags": text.name, **plain_exposures(published.exposures, "serve")}
    try:
        if not text.exists():
            write_atomically(text, published.content)
        write_atomically(paths.rulesets / f"{published.version}.json", json.dumps(record, indent=1).encode() + b"\n")
        if read_or_none(paths.last_good, MAX_BYTES) != published.content:
            write_atomically(paths.last_good, published.content)
    except OSError as error:
        tell("state_not_kept", f"{paths.state}: {error.strerror}; served all the same, but a restart would forget it")

"""One process that answers Envoy: what it answers with, and what it counts, told each second to StatsD and control."""

import asyncio
import json
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from extproc.core.decided import Key, Report, plain_report
from extproc.core.flags import Exposure, Flag, effective_percent
from extproc.core.heavyhitters import HEAVY_SHARE, HeavyHitters
from extproc.core.ruleset import Choice
from extproc.metrics import Metrics
from extproc.receiver import Received
from extproc.wire.answer import LESSONS, Answerer

COUNT_EVERY_S = 1.0
SLICE = 2_000
"""Units counted, or rows told, between two looks at the loop: well under a millisecond."""

MANY = 1_000
"""Of so many requests, a unit with the share of a heavy one has some fifty."""

GAUGES_AT_ONCE = 100
ROWS_PER_REPORT = 500
MAX_TOTALS = 20_000
"""Counts kept here: one per choice given under each version of the ruleset."""

TELL_FOR_SENDS = 60
"""A count that has not changed for this many sends is known to control, or nobody listens."""


class Transport(Protocol):
    """What every ext_proc transport can do."""

    async def start(self, listen: str) -> str:
        """Listens; returns the address it got. Raises OSError."""

    async def stop(self, grace_s: float) -> None:
        """Drains and closes."""


MakeTransport = Callable[[Callable[[bytes], bytes], Callable[[], bool]], Transport]


@dataclass(slots=True)
class Answering:
    """Answers with the last ruleset it was given. Not serving, as the health check sees it, until one was good.

    `worker` names this process in its reports; `report` takes each of them, and `listener` tells who hears them: for
    another one, everything is reported again. `show_units`: a unit that makes up an unusual share of the traffic may be
    named.
    """

    metrics: Metrics
    answerer: Answerer
    worker: str
    report: Callable[[Report], None]
    warn: Callable[[str, str], None]
    listener: Callable[[], object] = lambda: None
    show_units: bool = False
    serving: bool = False
    _boot: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _seq: int = field(default=0, init=False)
    _totals: dict[Key, int] = field(default_factory=dict, init=False)
    _changed: dict[Key, int] = field(default_factory=dict, init=False)
    _heavy: dict[str, HeavyHitters] = field(default_factory=dict, init=False)
    _alerted: set[str] = field(default_factory=set, init=False)
    _heard_by: object = field(default=None, init=False)

    def publish(self, received: Received) -> None:
        """Serves this ruleset from the next request on."""
        self.count_decisions()
        self.answerer.published = received.published
        self.serving = True

    async def count(self) -> None:
        """Counts and tells each second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            self.answerer.lessons = LESSONS
            await self._count_units(loop.time())
            self.count_decisions()
            self._tell()

    def count_decisions(self) -> None:
        """Hands to StatsD what was decided since the last call: plain integers, off the request path."""
        counts, self.answerer.counts = self.answerer.counts, {}
        ruleset = self.answerer.published.ruleset
        for index, n in counts.items():
            choice = ruleset.choices[index]
            self.metrics.count("decision.count", n, **tags_of(choice))
            key = Key(choice.flag, choice.model, ruleset.version, choice.cohort, choice.reason, choice.rule)
            self._totals[key] = self._totals.get(key, 0) + n
            self._changed[key] = self._seq

    async def _count_units(self, now_s: float) -> None:
        """Finds the units that make up an unusual share of a flag's traffic."""
        seen, self.answerer.seen = self.answerer.seen, []
        choices = self.answerer.published.ruleset.choices
        entries = iter(seen)
        by_flag: dict[str, Counter[int]] = {}
        requests: Counter[str] = Counter()
        while some := list(islice(entries, SLICE)):
            for flag, (counts, n) in units_by_flag(some, choices).items():
                by_flag.setdefault(flag, Counter()).update(counts)
                requests[flag] += n
            await asyncio.sleep(0)
        for flag, counts in by_flag.items():
            heavy = self._heavy.setdefault(flag, HeavyHitters())
            heavy.add(counts, now_s, requests[flag] - counts.total())
            await asyncio.sleep(0)

    def _heaviest(self) -> dict[str, tuple[float, str | None]]:
        """The heaviest unit of each flag that has one above the share, told as an event when it appears."""
        found: dict[str, tuple[float, str | None]] = {}
        named = set()
        for flag, heavy in self._heavy.items():
            heaviest = heavy.heaviest()
            if heaviest is None:
                continue
            unit, share = heaviest
            self.metrics.gauge("decision.heaviest_unit_share", share, flag=flag)
            if share > HEAVY_SHARE:
                named.add(unit)
                found[flag] = (share, self._name(unit))
        self.answerer.named = frozenset(named) if self.show_units else frozenset()
        for flag in found.keys() - self._alerted:
            self.warn("heavy_unit", f"{flag}: one unit makes up {found[flag][0]:.0%} of the traffic; is it a person?")
        self._alerted = set(found)
        return found

    def _name(self, unit: int) -> str | None:
        name = self.answerer.names.get(unit) if self.show_units else None
        return None if name is None else name.decode(errors="backslashreplace")

    def _tell(self) -> None:
        """Reports what has changed lately; the rest control must know by now."""
        heavy = self._heaviest()
        self._seq += 1
        listener = self.listener()
        if listener != self._heard_by:  # it knows nothing yet: what has not changed lately would look new when it does
            self._heard_by, self._changed = listener, dict.fromkeys(self._totals, self._seq)
        self._changed = {key: at for key, at in self._changed.items() if self._seq - at <= TELL_FOR_SENDS}
        rows = list(self._changed)
        for start in range(0, max(len(rows), 1), ROWS_PER_REPORT):
            counts = {key: self._totals[key] for key in rows[start : start + ROWS_PER_REPORT]}
            self.report(Report(self.worker, self._boot, self._seq, counts, heavy))
        if len(self._totals) > MAX_TOTALS:
            # Counting begins anew under another id: control keeps what it has, and memory here stays bounded.
            self._boot, self._totals, self._changed = uuid.uuid4().hex, {}, {}


def units_by_flag(entries: Sequence[int], choices: Sequence[Choice]) -> dict[str, tuple[Counter[int], int]]:
    """Entries of Answerer.seen by flag: the requests of units that may be heavy, and the number of all requests.

    Of MANY requests for a flag, a unit that came once is none of the heavy ones, and in busy traffic nearly all are.
    """
    # A ruleset published meanwhile has other choices: at worst a second's units count for another flag.
    flags = {index: choices[min(index, len(choices) - 1)].flag for index in {entry >> 32 for entry in entries}}
    requests: Counter[str] = Counter()
    for index, n in Counter([entry >> 32 for entry in entries]).items():
        requests[flags[index]] += n
    few = {flag for flag, n in requests.items() if n < MANY}
    units: dict[str, Counter[int]] = {flag: Counter() for flag in requests}
    for entry, n in Counter(entries).items():
        if n > 1 or (few and flags[entry >> 32] in few):
            units[flags[entry >> 32]][entry & 0xFFFFFFFF] += n
    return {flag: (units[flag], n) for flag, n in requests.items()}


def tags_of(choice: Choice) -> dict[str, str]:
    """The tags of a decision's counter. A rule has one only where a rule decided."""
    tags = {"cohort": choice.cohort.value, "flag": choice.flag, "model": choice.model, "reason": choice.reason.value}
    if choice.rule:
        tags["rule"] = choice.rule
    return {key: value or "none" for key, value in tags.items()}


async def gauge_flags(metrics: Metrics, version: str, flags: Iterable[tuple[Flag, Exposure | None]]) -> None:
    """The ruleset's version and every flag's percentage as gauges, told by the one process that owns the flag file."""
    metrics.gauge("decision.ruleset", 1, version=version)
    for i, (flag, exposure) in enumerate(flags):
        if i % GAUGES_AT_ONCE == 0:
            await asyncio.sleep(0)
        percent = float(effective_percent(flag, exposure))
        metrics.gauge("decision.canary_percent", percent, flag=flag.key, model=flag.model)


class Reports:
    """Sends reports to control's socket: datagrams that are dropped where it is slow, gone, or not configured."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, report: Report) -> None:
        """Sends one report. Never blocks, never raises."""
        if self._path is not None:
            try:
                self._socket.sendto(json.dumps(plain_report(report)).encode(), str(self._path))
            except OSError:
                return  # the next one carries the same counts

    def listener(self) -> tuple[int, int] | None:
        """What tells one listener's socket from the next one's; None without any."""
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_ino, found.st_ctime_ns)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

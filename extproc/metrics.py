"""StatsD out: counts, gauges, timings, aggregated in process and sent each second; a dead or slow StatsD costs nothing.

Made for one thread, the event loop's. No method waits and none raises, whatever the caller passes and whatever the
network does; only the constructor refuses an address it cannot read. Everything is bounded: series, samples, packets.
What could not be sent is itself sent, as the counter `<prefix>.metrics.dropped` with the tag `why`:
`series` (too many between two flushes), `value` (not a usable number, or a name or tag that is no text), `line` (longer
than a packet), `send` (lines the socket did not take, or that a dead port sent back).

How a tagged line looks (PERCH_STATSD_TAGS):

    dogstatsd   perch.decision.count:3|c|#cohort:canary,flag:digits
    influx      perch.decision.count,cohort=canary,flag=digits:3|c
    graphite    perch.decision.count;cohort=canary;flag=digits:3|c
    none        perch.decision.count.canary.digits:3|c

Tags are always sorted by key; `none` appends the values alone, in that order. Lines and their packing into packets are
the `statsd` package's; tags, which it does not have, and the socket, on which it would block, are ours.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import statsd

from extproc.datagrams import PACKET_BYTES, Outlet, read_address

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SAMPLES: Final = 64  # timings kept per series and flush: a p95 of 64 samples is good to about one rank in twenty
_MAX_TIMED_SERIES: Final = 128  # with _SAMPLES, at most 8,192 timing lines a flush
_SLICE: Final = 64  # lines between two pauses of `run`: well under a millisecond of work
_PAUSE_S: Final = 0.002  # lets requests, and a StatsD with a short queue, run between two slices
_VALUE_BYTES: Final = 64  # room in a line for the longest number, its type and its sample rate
_LARGEST: Final = 1e18  # beyond it a fixed-point number says nothing; dropped as `value`

_Key = tuple[str, frozenset[tuple[str, str]]]


class Dialect(StrEnum):
    """How tags are written into a line. The values are those of PERCH_STATSD_TAGS."""

    DOGSTATSD = "dogstatsd"
    INFLUX = "influx"
    GRAPHITE = "graphite"
    NONE = "none"


_NAME = re.compile(r"[^A-Za-z0-9_.\-]")
_TAG_KEY = re.compile(r"[^A-Za-z0-9_\-]")
_TAG_VALUE: Final = {
    Dialect.DOGSTATSD: re.compile(r"[^A-Za-z0-9_.\-/:]"),  # what Datadog keeps; it turns the rest into underscores too
    Dialect.INFLUX: re.compile(r"[^A-Za-z0-9_.\-/]"),  # a colon would end the name
    Dialect.GRAPHITE: re.compile(r"[^A-Za-z0-9_.\-/]"),
    Dialect.NONE: re.compile(r"[^A-Za-z0-9_\-]"),  # a dot would add a level, a slash a folder
}


class Metrics:
    """The counters of one process. `address` is `host:port`, `[v6]:port`, `unix:/path` (datagram) or None for off.

    `tags` go on every line, a call's own tags override them. A host name is looked up in a thread of its own, again
    and again, so it may appear, vanish and move. Raises ValueError for an address of no such form.
    """

    def __init__(
        self,
        address: str | None,
        dialect: Dialect = Dialect.DOGSTATSD,
        *,
        prefix: str = "perch",
        tags: Mapping[str, str] | None = None,
        max_series: int = 2000,
    ) -> None:
        self._dialect = dialect
        self._prefix = _plain_name(prefix)
        self._tags = dict(tags or {})
        self._max_series = max_series
        self._dropped: Counter[str] = Counter()
        self._texts: dict[_Key, _Text] = {}
        self._tally = _Tally()
        self._counts = self._tally.counts  # one attribute less on the hot path
        self._outlet = None if address is None else Outlet(read_address(address), self._dropped)
        self._client = None if self._outlet is None else _statsd_client(self._outlet, self._prefix)

    def count(self, name: str, n: int = 1, **tags: str) -> None:
        """Add `n` to the counter; a sum of 0 is not sent."""
        if self._outlet is None:
            return
        try:
            self._counts[name, frozenset(tags.items())] += n
        except (KeyError, TypeError):  # a new series, or arguments of a wrong type
            number = _number(n)
            key = self._admit(self._counts, name, tags, number)
            if key is not None:
                self._counts[key] = n

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Set the gauge: a flush sends its last value, if it was set since the flush before."""
        if self._outlet is None:
            return
        number = _number(value)
        key = self._admit(self._tally.gauges, name, tags, number)
        if key is not None and number is not None:
            self._tally.gauges[key] = number

    def timing(self, name: str, ms: float, **tags: str) -> None:
        """Note a duration in milliseconds; beyond 64 per series and flush a fair sample goes out, with its rate."""
        if self._outlet is None:
            return
        number = _number(ms)
        reservoir = self._reservoir(name, tags, number)
        if reservoir is not None and number is not None:
            reservoir.add(number)

    def timings(self, name: str, ms: Sequence[float], seen: int, **tags: str) -> None:
        """Note at once `seen` durations in milliseconds of which `ms` is a fair sample: all of them, or at least 64."""
        if self._outlet is None or not ms:
            return
        kept = [number for number in map(_number, ms) if number is not None and number >= 0]
        if len(kept) < len(ms):
            self._dropped["value"] += len(ms) - len(kept)
        reservoir = self._reservoir(name, tags, kept[0]) if kept else None
        if reservoir is not None:
            reservoir.add_sample(kept, max(seen - len(ms), 0) + len(kept))

    def _reservoir(self, name: str, tags: Mapping[str, str], number: float | None) -> _Reservoir | None:
        """Where the timing of a series goes; None after counting why nowhere."""
        timings = self._tally.timings
        key = self._admit(timings, name, tags, None if number is None or number < 0 else number)
        if key is None:
            return None
        if key not in timings:
            if len(timings) >= _MAX_TIMED_SERIES:
                self._dropped["series"] += 1
                return None
            timings[key] = _Reservoir()
        return timings[key]

    def flush(self) -> None:
        """Send what has gathered. A full or dead socket loses its lines, counted; it never makes this wait."""
        for _ in self._slices():
            pass

    async def run(self, every_s: float = 1.0) -> None:
        """Flush every `every_s` seconds until cancelled, then once more. Yields to the loop between slices of lines."""
        slices: Iterator[None] = iter(())
        try:
            while True:
                await asyncio.sleep(every_s)
                slices = self._slices()
                for _ in slices:
                    await asyncio.sleep(_PAUSE_S)
        finally:
            for _ in slices:  # the part of a flush that the cancellation cut off
                pass
            self.flush()

    def close(self) -> None:
        """Close the socket. Does not flush; later calls do nothing."""
        if self._client is not None:
            self._client.close()
        self._outlet = self._client = None

    def _admit(
        self, known: Mapping[_Key, object], name: str, tags: Mapping[str, str], number: float | None
    ) -> _Key | None:
        """The key of a series that may take the number now, or None after counting why not."""
        try:
            key = (name, frozenset(tags.items()))
            if number is not None and key in known:
                return key
            text = self._text(key)
        except (TypeError, AttributeError):  # a name or tag that is no text
            text = None
            number = None
        if number is None:
            self._dropped["value"] += 1
        elif text is None:
            self._dropped["line"] += 1
        elif len(self._tally) >= self._max_series:
            self._dropped["series"] += 1
        else:
            return key
        return None

    def _text(self, key: _Key) -> _Text | None:
        """The series as the dialect writes it; None when no value would fit into a packet after it."""
        text = self._texts.get(key)
        if text is not None:
            return text
        name, tags = key
        room = PACKET_BYTES - _VALUE_BYTES - len(self._prefix)
        if len(name) + sum(len(tag) + len(value) for tag, value in tags) > room:
            return None  # before the work of writing it: an absurd string costs no more than its length
        text = _write(self._dialect, name, {**self._tags, **dict(tags)})
        if len(text.name) + len(text.suffix) > room:
            return None
        if len(self._texts) >= 2 * self._max_series:
            self._texts.clear()
        self._texts[key] = text
        return text

    def _slices(self) -> Iterator[None]:
        """One flush; yields after every _SLICE lines so that `run` can pause there."""
        outlet = self._outlet
        if outlet is None or self._client is None or not outlet.knows_where():
            return
        tally, self._tally = self._tally, _Tally()
        self._counts = self._tally.counts
        if not outlet.open():
            self._dropped["send"] += tally.lines()
            return
        lines = self._lines(tally)
        while batch := list(islice(lines, _SLICE)):
            _send(self._client, batch)
            yield
            if self._client is None:  # closed meanwhile
                return
        self._report_dropped(outlet)

    def _lines(self, tally: _Tally) -> Iterator[_Line]:
        """Every line of the tally. Written late, so that a slice costs only its own lines."""
        for key, total in list(tally.counts.items()):
            if total:
                yield from self._line(key, (_fixed(_number(total)),), "c")
        for key, value in tally.gauges.items():
            number = _fixed(value)
            # A leading sign means "change by": a negative value has to start from zero, in the same packet.
            yield from self._line(key, ("0", number) if number and number.startswith("-") else (number,), "g")
        for key, reservoir in tally.timings.items():
            rate = reservoir.rate()
            kind = "ms" if rate == 1 else f"ms|@{_fixed(rate, 12)}"
            for ms in reservoir.kept:
                yield from self._line(key, (_fixed(ms),), kind)

    def _line(self, key: _Key, numbers: tuple[str | None, ...], kind: str) -> Iterator[_Line]:
        text = self._text(key)
        if None in numbers:
            self._dropped["value"] += 1
        elif text is None or len(numbers) * (len(self._prefix) + len(text.name) + len(text.suffix) + 40) > PACKET_BYTES:
            self._dropped["line"] += 1
        else:
            yield _Line(text.name, tuple(f"{number}|{kind}{text.suffix}" for number in numbers))

    def _report_dropped(self, outlet: Outlet) -> None:
        if not self._dropped:
            return
        report = Counter(self._dropped)
        self._dropped.clear()
        lines = []
        for why, n in sorted(report.items()):
            text = _write(self._dialect, "metrics.dropped", {**self._tags, "why": why})
            lines.append(_Line(text.name, (f"{n}|c{text.suffix}",)))
        outlet.at_stake = report  # owed again when this packet is lost too
        _send(self._client, lines)
        outlet.at_stake = None


@dataclass(frozen=True, slots=True)
class _Text:
    """A series as its dialect writes it: what stands before the value and what stands after the type."""

    name: str
    suffix: str


@dataclass(frozen=True, slots=True)
class _Line:
    """The values (with type, rate and tags) of one name that have to travel in one packet, in this order."""

    name: str
    values: tuple[str, ...]


@dataclass(slots=True)
class _Reservoir:
    """A fair sample of at most _SAMPLES values (Vitter's algorithm R)."""

    kept: list[float] = field(default_factory=list)
    seen: int = 0

    def add(self, value: float) -> None:
        self.seen += 1
        if len(self.kept) < _SAMPLES:
            self.kept.append(value)
        elif (place := int(random.random() * self.seen)) < _SAMPLES:  # noqa: S311  a sample, not a secret
            self.kept[place] = value

    def add_sample(self, values: list[float], seen: int) -> None:
        """Values that stand for `seen`. When all do not fit, each side keeps as many as what it stands for has."""
        together = self.seen + seen
        if len(self.kept) + len(values) > _SAMPLES:
            mine = min(len(self.kept), max(_SAMPLES - len(values), round(_SAMPLES * self.seen / together)))
            self.kept = [*random.sample(self.kept, mine), *random.sample(values, min(len(values), _SAMPLES - mine))]
        else:
            self.kept += values
        self.seen = together

    def rate(self) -> float:
        return len(self.kept) / self.seen


@dataclass(slots=True)
class _Tally:
    """What gathered since the last flush."""

    counts: dict[_Key, int] = field(default_factory=dict)
    gauges: dict[_Key, float] = field(default_factory=dict)
    timings: dict[_Key, _Reservoir] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts) + len(self.gauges) + len(self.timings)

    def lines(self) -> int:
        return len(self.counts) + len(self.gauges) + sum(len(one.kept) for one in self.timings.values())


def _write(dialect: Dialect, name: str, tags: Mapping[str, str]) -> _Text:
    """Name and tags with every character replaced that would break the dialect's line; tags sorted by key."""
    unsafe = _TAG_VALUE[dialect]
    clean = {_TAG_KEY.sub("_", tag) or "_": unsafe.sub("_", value) or "_" for tag, value in tags.items()}
    pairs = sorted(clean.items())
    name = _plain_name(name) or "_"
    match dialect:
        case Dialect.DOGSTATSD:
            return _Text(name, "|#" + ",".join(f"{tag}:{value}" for tag, value in pairs) if pairs else "")
        case Dialect.INFLUX:
            return _Text(name + "".join(f",{tag}={value}" for tag, value in pairs), "")
        case Dialect.GRAPHITE:  # its tag `name` is the metric's own name
            return _Text(name + "".join(f";{'name_' if tag == 'name' else tag}={value}" for tag, value in pairs), "")
        case Dialect.NONE:
            return _Text(name + "".join(f".{value}" for _, value in pairs), "")


def _plain_name(name: str) -> str:
    """Letters, digits, `_`, `-` and single dots inside."""
    return re.sub(r"\.{2,}", ".", _NAME.sub("_", name)).strip(".")


def _number(value: Any) -> float | None:
    """An int as it is, anything else that is finite as a float, None for the rest."""
    try:
        number = value if isinstance(value, int) else float(value)
        return number if abs(number) < _LARGEST else None  # false for NaN too
    except (TypeError, ValueError, OverflowError):
        return None


def _fixed(number: float | None, places: int = 9) -> str | None:
    """The number in fixed-point notation: StatsD servers do not agree about exponents."""
    if number is None:
        return None
    if isinstance(number, int):
        return str(int(number))
    text = f"{number:.{places}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _send(client: Any, lines: list[_Line]) -> None:
    """Pack the lines into packets and send them, by the statsd package's pipeline.

    `_send_stat` rather than its public verbs: they have no place for tags, and would draw lots on a sample rate that
    has already been drawn.
    """
    with client.pipeline() as packets:
        for line in lines:
            with packets.pipeline() as together:
                for value in line.values:
                    together._send_stat(line.name, value, 1)  # noqa: SLF001  see above


def _statsd_client(outlet: Outlet, prefix: str) -> Any:
    """The statsd package's client, sending through `outlet` in place of the blocking socket it opened for itself."""
    client = statsd.StatsClient("127.0.0.1", 9, prefix=prefix or None, maxudpsize=PACKET_BYTES)
    client._sock.close()  # noqa: SLF001  it offers no way to bring a socket
    client._sock = outlet  # noqa: SLF001
    return client

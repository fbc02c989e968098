"""Values that are reported later, joined to who was served: labels and business KPIs. Bounded memory, O(1) each.

Three things are kept: who was served, by request id and, for eligible requests, by unit; reports that came before the
access log told of their request; and what was reported already, so that a repeated report counts once. Ids, units and
reports are kept as hashes of 60 bits: with a million of them, one pair is the same by chance in three million runs.

A report is the same as another if request id (or flag and unit), name and key are equal, whatever its value. Without a
key, a request has one value per name; a unit may have many (three purchases are three reports), and each one counts.

All times are seconds of one clock, the caller's; one that never steps is best. An entry is 150 to 300 bytes: its two
keys, one number for group and time, and its places in the dictionaries and in the order of arrival.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import mmh3

from extproc.core.bucketing import effective_salt, hash_prefix, hash_unit, rule_salt
from extproc.core.flags import Flag

MAX_VALUE = 1e12
"""Larger values are refused: the sum of their squares would no longer be exact enough to judge by."""

MAX_TEXT = 256
"""Characters of a request id, a unit, a flag, a key."""

MAX_NAMES = 64
"""Names of one flag; more than that is an id in the place of a name."""

MAX_GROUPS = 10_000
MAX_CELLS = 100_000
BINS = 288
"""Bins of assignment time in one window: five minutes each in 24 hours. What is older is summed without its time."""

LATE = 2
"""Windows after which an entry is forgotten. Between one and two, a report is known to be late and not of nobody."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""As in a guardrail `kpi.NAME`."""

_SIXTY = (1 << 60) - 1
_TIME = (1 << 32) - 1


class State(StrEnum):
    """What became of a report."""

    JOINED = "joined"
    PENDING = "pending"
    DUPLICATE = "duplicate"
    LATE = "late"
    REFUSED = "refused"


class Result(NamedTuple):
    """What became of a report, and why if it was refused."""

    state: State
    reason: str = ""


class Reported(NamedTuple):
    """One value about one request or one unit: exactly one of the two is set. `flag` is needed with a unit."""

    name: str
    value: float
    request_id: str = ""
    unit: str = ""
    flag: str = ""
    key: str = ""


class Served(NamedTuple):
    """Who was served: `cohort` is the arm that was assigned, `arm` the one that answered, `hash` the unit's or None."""

    flag: str
    stratum: str
    step: int
    arm: str
    cohort: str
    hash: int | None
    eligible: bool
    time_s: float


class Lane(NamedTuple):
    """What many requests have in common: the upper bits of what is kept for them; `split` is 0 if not by unit."""

    group: int
    split: int


class Key(NamedTuple):
    """What is summed separately.

    `judged`: the request was eligible and served by the arm it was assigned to. The others are shown only: one that
    fell back would bring canary's users, at their worst moment, into stable's mean.
    """

    flag: str
    stratum: str
    step: int
    arm: str
    name: str
    judged: bool


class Moments(NamedTuple):
    """Number, sum and sum of squares of values."""

    n: int = 0
    sum: float = 0.0
    squares: float = 0.0

    def plus(self, other: "Moments") -> "Moments":
        """Both together."""
        return Moments(self.n + other.n, self.sum + other.sum, self.squares + other.squares)


@dataclass(slots=True)
class Counts:
    """Reports by what became of them, and what was given up to stay within bounds.

    `pending` came before their request and are waited for; `unknown` waited in vain. `pushed_out` are requests
    forgotten before their window was over, `unkept` those of too many groups, `keys_forgotten` reports of which a
    repetition would count again.
    """

    joined: int = 0
    pending: int = 0
    unknown: int = 0
    late: int = 0
    duplicates: int = 0
    refused: int = 0
    remembered: int = 0
    pushed_out: int = 0
    unkept: int = 0
    keys_forgotten: int = 0


class KpiError(ValueError):
    """A report that is refused; the message says why."""


_FIELDS = {"request_id", "unit", "flag", "name", "value", "key"}


def parse_reported(data: Any) -> Reported:
    """A report from what JSON gave. Raises KpiError."""
    if not isinstance(data, dict):
        raise KpiError("expected an object with request_id or unit, flag, name, value")
    if unknown := sorted(map(str, data.keys() - _FIELDS)):
        raise KpiError(f"unknown field {_shown(unknown[0])}; known are request_id, unit, flag, name, value, key")
    texts = {name: _text(data, name) for name in ("request_id", "unit", "flag", "key")}
    if bool(texts["request_id"]) == bool(texts["unit"]):
        raise KpiError("expected request_id or unit, one of the two")
    if texts["unit"] and not texts["flag"]:
        raise KpiError("a unit needs its flag")
    name = data.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise KpiError(f"name: expected letters, digits, '.', '_', '-', at most 100, not {_shown(name)}")
    return Reported(name, _value(data.get("value")), **texts)


def _text(data: Mapping[str, Any], name: str) -> str:
    text = data.get(name)
    if text is None:
        return ""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
        raise KpiError(f"{name}: expected text of 1 to {MAX_TEXT} characters, not {_shown(text)}")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise KpiError(f"{name}: not encodable as UTF-8") from None
    return text


def _value(value: Any) -> float:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float):
        raise KpiError(f"value: expected a number, true or false, not {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise KpiError(f"value: {value} is no finite number")
    if abs(value) > MAX_VALUE:
        raise KpiError(f"value: larger than {MAX_VALUE:g}")
    return float(value)


def _shown(value: Any) -> str:
    """A value as a message can hold it. Whole numbers are not shown: they may have a million digits."""
    text = type(value).__name__ if not isinstance(value, str) else ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def unit_prefixes(flag: Flag, attempt: int) -> dict[str, bytes]:
    """What stands before a unit of this flag where it is hashed, by stratum: its own percentage's and its rules'."""
    salt = effective_salt(flag.salt, attempt)
    rules = {rule.name: hash_prefix(rule_salt(salt, rule.name)) for rule in flag.rules if rule.percent is not None}
    return {"": hash_prefix(salt), **rules}


class _Group(NamedTuple):
    flag: str
    stratum: str
    step: int
    arm: str
    judged: bool


@dataclass(slots=True, eq=False)
class _Early:
    """A report that waits for its request. `places` are where it is found: one id, or one per split of the flag."""

    until_s: float
    reported: Reported
    identity: int
    places: tuple[int, ...]
    waits: bool = True


Cells = dict[tuple[int, str], Moments]


@dataclass(slots=True)
class Kpis:
    """The store. `capacity` bounds requests and, apart from them, reports that are recognised when repeated."""

    capacity: int = 1_000_000
    window_s: float = 24 * 3600.0
    pending_s: float = 10.0
    max_pending: int = 200_000
    counts: Counts = field(default_factory=Counts)
    _prefixes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _numbers: dict[tuple[str, str, int, str, bool], int] = field(default_factory=dict)
    _groups: list[_Group] = field(default_factory=lambda: [_Group("", "", 0, "", judged=False)])
    _splits: dict[tuple[str, str], int] = field(default_factory=dict)
    _served: dict[int, int] = field(default_factory=dict)
    _units: dict[int, int] = field(default_factory=dict)
    _order: deque[int] = field(default_factory=deque)
    _known: set[int] = field(default_factory=set)
    _known_order: deque[int] = field(default_factory=deque)
    _early: dict[int, dict[_Early, None]] = field(default_factory=dict)
    _early_order: deque[_Early] = field(default_factory=deque)
    _names: dict[str, dict[str, str]] = field(default_factory=dict)
    _bins: dict[int, Cells] = field(default_factory=dict)
    _old: Cells = field(default_factory=dict)
    _cells: int = 0
    _advanced_s: float = -math.inf

    # --- what is served ---

    def take_flags(self, prefixes: Mapping[str, Mapping[str, bytes]]) -> None:
        """The flags that reports may name, each with its `unit_prefixes`. Those served before a reseed are not found.

        What was reported about a flag that is gone stays in the sums.
        """
        self._prefixes = {flag: dict(splits) for flag, splits in prefixes.items()}
        self._names = {flag: names for flag, names in self._names.items() if flag in self._prefixes}

    def lane(self, served: Served) -> Lane | None:
        """Where requests are kept that differ from this one in nothing but hash and time; None without room."""
        flag, stratum, step, arm, cohort, _, eligible, _ = served
        group = _Group(flag, stratum, step, arm, eligible and arm == cohort)
        number = self._numbers.get(group)
        if number is None:
            number = self._new_group(group)
        if number is None:
            return None
        return Lane(number << 32, self._split(flag, stratum) << 32 if eligible else 0)

    def remember(self, request_id: str, served: Served, now_s: float) -> bool:
        """Keeps who was served, and joins what was reported before. False for an id that is known, or no room."""
        self.keep_time(now_s)
        time_s = served.time_s if 0 < served.time_s < now_s else now_s
        return bool(self.remember_all([(self.lane(served), request_id, served.hash)], max(0, int(time_s))))

    def remember_all(self, requests: Iterable[tuple[Lane | None, str, int | None]], second: int) -> int:
        """The same for many, each with its lane, id and hash, at a whole second from 0: how many were kept.

        The path of every entry of the access log. Who calls it has said the time with `keep_time`.
        """
        served, units, order, early = self._served, self._units, self._order, self._early
        kept = 0
        for lane, request_id, unit_hash in requests:
            place = _place(request_id)
            if place in served:
                continue
            if lane is None:
                self.counts.unkept += 1
                continue
            group, split = lane
            served[place] = packed = group | second
            unit = 0
            if split and unit_hash is not None:
                unit = split | unit_hash
                units[unit] = packed
            order.append(place)
            order.append(unit)
            kept += 1
            if early:
                self._join_early(place, packed)
                self._join_early(unit, packed)
            if len(served) > self.capacity:
                self._forget_first()
                self.counts.pushed_out += 1
        self.counts.remembered += kept
        return kept

    def _new_group(self, group: _Group) -> int | None:
        if len(self._groups) > MAX_GROUPS:
            return None
        self._groups.append(group)
        return self._numbers.setdefault(group, len(self._groups) - 1)

    def _split(self, flag: str, stratum: str) -> int:
        """The number of a split, from 1."""
        number = self._splits.get((flag, stratum))
        return self._splits.setdefault((flag, stratum), len(self._splits) + 1) if number is None else number

    def _forget_first(self) -> None:
        place, unit = self._order.popleft(), self._order.popleft()
        packed = self._served.pop(place)
        # The very number, not an equal one: groups count from 1, so each is made anew and none is a small integer.
        if unit and self._units.get(unit) is packed:
            del self._units[unit]

    def keep_time(self, now_s: float) -> None:
        """`advance`, if a second has passed or the clock has stepped."""
        if not 0 <= now_s - self._advanced_s < 1:
            self.advance(now_s)

    def advance(self, now_s: float) -> None:
        """Forgets what is old, counts what waited in vain. The other calls do it too, once a second."""
        self._advanced_s = now_s
        while self._order and now_s - (self._served[self._order[0]] & _TIME) > LATE * self.window_s:
            self._forget_first()
        early = self._early_order
        while early and (not early[0].waits or early[0].until_s < now_s):
            gone = early.popleft()
            if gone.waits:
                self._drop(gone)
                self.counts.unknown += 1
                self._known.discard(gone.identity)  # it may be reported again

    # --- what is reported ---

    def report(self, reported: Reported, now_s: float) -> Result:
        """Takes one report. What is joined or pending will be in the sums or be counted as unknown, once."""
        self.keep_time(now_s)
        result = self._report(reported, now_s)
        match result.state:
            case State.DUPLICATE:
                self.counts.duplicates += 1
            case State.LATE:
                self.counts.late += 1
            case State.REFUSED:
                self.counts.refused += 1
            case State.JOINED | State.PENDING:
                pass  # counted where it happens, since the second becomes the first
        return result

    def refuse(self) -> None:
        """Counts a report that never becomes a Reported, because it cannot be read."""
        self.counts.refused += 1

    def _report(self, reported: Reported, now_s: float) -> Result:
        flag = reported.flag
        if flag and flag not in self._prefixes:
            return Result(State.REFUSED, f"unknown flag {_shown(flag)}")
        identity = _identity(reported)
        if identity is not None and identity in self._known:
            return Result(State.DUPLICATE)
        places = self._places(reported)
        found = self._served if reported.request_id else self._units
        packed = max((found[place] for place in places if place in found), key=_time_of, default=None)
        if packed is None:
            return self._wait(reported, identity, places, now_s)
        group = self._groups[packed >> 32]
        if flag and flag != group.flag:
            return Result(State.REFUSED, f"the request belongs to the flag {group.flag}, not {_shown(flag)}")
        if now_s - _time_of(packed) > self.window_s:
            return Result(State.LATE)
        if not self._may_name(group.flag, reported.name):
            return Result(State.REFUSED, f"the flag {group.flag} has {MAX_NAMES} names already")
        self._know(identity)
        self._add(packed, reported)
        return Result(State.JOINED)

    def _places(self, reported: Reported) -> tuple[int, ...]:
        if reported.request_id:
            return (_place(reported.request_id),)
        unit = reported.unit.encode(errors="surrogateescape")
        splits = self._prefixes[reported.flag].items()
        return tuple(self._split(reported.flag, name) << 32 | hash_unit(prefix, unit) for name, prefix in splits)

    def _wait(self, reported: Reported, identity: int | None, places: tuple[int, ...], now_s: float) -> Result:
        if len(self._early_order) >= self.max_pending:
            return Result(State.REFUSED, "too many reports wait for their request; send it again in some seconds")
        identity = self._know(identity)
        early = _Early(now_s + self.pending_s, reported, identity, places)
        self._early_order.append(early)
        for place in places:
            self._early.setdefault(place, {})[early] = None
        self.counts.pending += 1
        return Result(State.PENDING)

    def _join_early(self, place: int, packed: int) -> None:
        flag = self._groups[packed >> 32].flag
        for early in tuple(self._early.get(place, ())):
            self._drop(early)
            if early.reported.flag in ("", flag) and self._may_name(flag, early.reported.name):
                self._add(packed, early.reported)
            else:
                self._known.discard(early.identity)
                self.counts.refused += 1

    def _drop(self, early: _Early) -> None:
        early.waits = False
        self.counts.pending -= 1
        for place in early.places:
            waiting = self._early[place]
            del waiting[early]
            if not waiting:
                del self._early[place]

    def _know(self, identity: int | None) -> int:
        if identity is None:
            return 0
        self._known.add(identity)
        self._known_order.append(identity)
        if len(self._known_order) > self.capacity:
            self._known.discard(self._known_order.popleft())
            self.counts.keys_forgotten += 1
        return identity

    def _may_name(self, flag: str, name: str) -> bool:
        names = self._names.setdefault(flag, {})
        if name not in names and len(names) < MAX_NAMES:
            names[name] = name
        return name in names

    # --- the sums ---

    def _add(self, packed: int, reported: Reported) -> None:
        flag = self._groups[packed >> 32].flag
        key = (packed >> 32, self._names[flag][reported.name])
        cells = self._bins.setdefault(int(_time_of(packed) // self._bin_s), {})
        value = reported.value
        before = cells.get(key)
        if before is None:
            before = Moments()
            self._cells += 1
        cells[key] = before.plus(Moments(1, value, value * value))
        self.counts.joined += 1
        while len(self._bins) > LATE * BINS or (self._cells > MAX_CELLS and len(self._bins) > 1):
            self._fold(min(self._bins))

    @property
    def _bin_s(self) -> float:
        return self.window_s / BINS

    def _fold(self, number: int) -> None:
        for key, moments in self._bins.pop(number).items():
            self._cells -= 1
            self._old[key] = self._old.get(key, Moments()).plus(moments)

    def totals(self, since_s: float = -math.inf, before_s: float = math.inf) -> dict[Key, Moments]:
        """The sums of requests assigned in this time, in whole bins.

        A bin is in it if it begins at `since_s` or later and ends by `before_s`. Without `since_s`, what is too old to
        have a bin is in it too.
        """
        totals: dict[Key, Moments] = {}
        for number, cells in self._bins.items():
            if since_s <= number * self._bin_s and (number + 1) * self._bin_s <= before_s:
                self._sum_into(totals, cells)
        if since_s == -math.inf:
            self._sum_into(totals, self._old)
        return totals

    def _sum_into(self, totals: dict[Key, Moments], cells: Cells) -> None:
        for (number, name), moments in cells.items():
            group = self._groups[number]
            key = Key(group.flag, group.stratum, group.step, group.arm, name, group.judged)
            totals[key] = totals.get(key, Moments()).plus(moments)

    def plain(self) -> Iterator[dict[str, Any]]:
        """The sums as JSON can hold them, an object per key."""
        for key, moments in sorted(self.totals().items()):
            yield {**key._asdict(), **moments._asdict(), "mean": moments.sum / moments.n}

    def __len__(self) -> int:
        """Requests that are remembered."""
        return len(self._served)


def _time_of(packed: int) -> int:
    return packed & _TIME


def _place(text: str) -> int:
    """60 bits of the text's hash: a small integer."""
    digest: int = mmh3.mmh3_x64_128_uintdigest(text.encode("utf-8", "surrogateescape"))
    return digest & _SIXTY


def _identity(reported: Reported) -> int | None:
    """What makes a report the same as another; None for a unit without a key, whose every report counts."""
    name, _, request_id, unit, flag, key = reported
    if request_id:  # lengths tell ("ab", "c") from ("a", "bc")
        return _place(f"{len(request_id)} {len(name)} {request_id}{name}{key}")
    if key:
        return _place(f"{len(flag)} {len(unit)} {len(name)} {flag}{unit}{name}{key}")
    return None

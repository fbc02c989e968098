"""Clients that keep a record of every request, and from the record alone what perch must have counted of it.

Nothing of perch's is used for that: units are bucketed by the design's formula, votes and ranks are counted by hand.
Who served is the model server's own word, and so is whether perch was heard about a request (see obedient.py).
"""

import asyncio
import contextlib
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

import mmh3
from prometheus_client.parser import text_string_to_metric_families

TOKEN = "e2e-token-0123456789"
ARMS = ("stable", "canary")
GAMMA = 1.04
NO_LOG = {"streams": 0, "entries": 0, "unreadable": 0, "envoys": {}}
QUANTILES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}


@dataclass(frozen=True)
class Flag:
    """A flag as the tests write it: everybody of `acme` on canary, half of the people in `eu-`, else a percentage."""

    salt: str
    percent: float

    def plain(self, model: str) -> dict[str, Any]:
        """As it stands in the flag file."""
        rules = [
            {"name": "staff", "when": {"header": "x-tenant", "in": ["acme"]}, "serve": "canary"},
            {"name": "pilot", "when": {"header": "x-region", "prefix": "eu-"}, "canary": 50},
        ]
        return {"model": model, "salt": self.salt, "canary": self.percent, "allow_force": True, "rules": rules}


@dataclass(frozen=True)
class Ask:
    """One request. `do` is what the model server is told to do; `kind` is how the request asks for its cohort."""

    model: str
    user: str
    kind: str = "plain"
    do: dict[str, Any] = field(default_factory=dict)

    def headers(self) -> list[tuple[str, str]]:
        """The request's headers, but for those that every request has."""
        more = {
            "none": [],
            "two": [("x-user-id", self.user), ("x-user-id", "another")],
            "staff": [("x-user-id", self.user), ("x-tenant", "acme")],
            "pilot": [("x-user-id", self.user), ("x-region", "eu-west")],
            "force-canary": [("x-user-id", self.user), ("x-force-cohort", f"canary;{TOKEN}")],
            "force-stable": [("x-user-id", self.user), ("x-force-cohort", f"stable;{TOKEN}")],
        }
        return [*more.get(self.kind, [("x-user-id", self.user)]), ("x-do", json.dumps(self.do))]

    def decided(self, flag: Flag) -> "Decided":
        """What perch must decide, by the design's formula."""
        match self.kind:
            case "none":
                return Decided("stable", "NO_UNIT", None)
            case "two":
                return Decided("stable", "AMBIGUOUS_UNIT", None)
            case "staff":
                return Decided("canary", "TARGETING_MATCH", None)
            case "force-canary" | "force-stable":
                return Decided(self.kind.removeprefix("force-"), "FORCED", None)
        salt, percent, reason = flag.salt, flag.percent, "SPLIT"
        if self.kind == "pilot":
            salt, percent, reason = f"{flag.salt}/pilot", 50, "RULE_SPLIT"
        unit_hash = mmh3.hash(f"{salt}:{self.user}", 0, signed=False)
        inside = unit_hash * 100_000 >> 32 < round(percent * 1000)
        return Decided("canary" if inside else "stable", reason, unit_hash)


class Decided(NamedTuple):
    """Cohort, reason, and the unit's hash where one was made."""

    cohort: str
    reason: str
    unit_hash: int | None


@dataclass(frozen=True)
class Record:
    """What a client knows of one request at its end. Status 0 without an answer. Times are monotonic seconds."""

    ask: Ask
    flag: Flag
    status: int
    headers: dict[str, str]
    began_s: float
    ended_s: float

    @property
    def aborted(self) -> bool:
        """Whether the client itself gave it up."""
        return "part" in self.ask.do

    @property
    def served(self) -> str | None:
        """The arm that answered, by its own word; None where Envoy answered itself."""
        return self.headers.get("x-told-arm")

    @property
    def failed_open(self) -> bool:
        """Whether the model server was told no cohort: perch was not heard. Of one that hung see `Servers.hung`."""
        return ("x-hung" in self.headers or self.served is not None) and "x-told-cohort" not in self.headers

    @property
    def error(self) -> str:
        """The class of the server's error; a hanging server is one at the deadline."""
        if self.aborted or self.status < 500:
            return ""
        return "deadline" if self.status == 504 and self.served is None else "5xx"

    @property
    def decided(self) -> Decided:
        """What perch must have decided; it must be what the model server was told, if it was told anything.

        A canary user on stable was held there: control knew that no canary server could serve.
        """
        decided = self.ask.decided(self.flag)
        told = self.headers.get("x-told-cohort", decided.cohort)
        if (decided.cohort, told) == ("canary", "stable"):
            return Decided("stable", "HELD", None)
        assert told == decided.cohort
        return decided

    @property
    def vote(self) -> str | None:
        """The one prediction of the answer that counts."""
        shown, count = self.headers.get("x-model-prediction"), self.headers.get("x-model-prediction-count")
        if shown is None:
            return None
        items = shown.split(",")
        # Where perch was not heard, nobody knows a hash.
        drawn = 0 if self.failed_open else self.decided.unit_hash or 0
        return unquote(items[drawn % min(int(count or len(items)), 32)])

    @property
    def bounds_ms(self) -> tuple[float, float]:
        """Its duration in Envoy lies between what the model server waited and what the client did."""
        return self.ask.do.get("after", 0) * 1000, (self.ended_s - self.began_s) * 1000


@dataclass
class Count:
    """What perch must have counted of some requests; names are those of the status and of the metrics."""

    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    fell_back: int = 0
    failed_open: int = 0
    aborted: int = 0
    predictions: Counter[str] = field(default_factory=Counter)
    bounds_ms: list[tuple[float, float]] = field(default_factory=list)

    def add(self, record: Record, cohort: str) -> None:
        """Counts one request that was assigned to `cohort`, "none" if it was not assigned."""
        if record.aborted:
            self.aborted += 1
            return
        self.requests += 1
        self.failed_open += record.failed_open
        self.fell_back += cohort == "canary" and record.served == "stable"
        if record.error:
            self.errors[record.error] += 1
        if record.served is not None and cohort in (record.served, "none"):
            self.bounds_ms.append(record.bounds_ms)
            if record.vote is not None:
                self.predictions[record.vote] += 1


@dataclass
class Counts:
    """Everything that must have been counted of the records: by (flag, cohort), and by model version as well."""

    cohorts: dict[tuple[str, str], Count] = field(default_factory=dict)
    series: dict[tuple[str, str, str], Count] = field(default_factory=dict)
    decided: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    assigned: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    votes: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Counts":
        """Counted from the record alone."""
        found = cls()
        for record in records:
            flag, decided = record.ask.model, record.decided
            cohort = decided.cohort
            found.served[flag] += record.served is not None
            if record.failed_open:
                flag, cohort = "none", "none"
            else:
                found.assigned[flag] += 1
                found.decided[flag, decided.cohort, decided.reason] += 1
            version = record.headers.get("x-model-version", "none")
            found.cohorts.setdefault((flag, cohort), Count()).add(record, cohort)
            found.series.setdefault((flag, cohort, version), Count()).add(record, cohort)
            judged = decided.reason == "SPLIT" and not record.failed_open and not record.aborted
            if judged and record.served == cohort and record.vote is not None:
                found.votes[flag, cohort] += 1
        return found

    def versions(self, flag: str, cohort: str) -> dict[str, int]:
        """Requests of a cohort by the model's version."""
        series = {key[2]: count.requests for key, count in self.series.items() if key[:2] == (flag, cohort)}
        return {version: n for version, n in series.items() if n}


def bin_of(ms: float) -> int:
    """The bin of a duration by its formula: bin i > 0 ends at 0.1 ms * GAMMA ** i."""
    return max(0, math.ceil(math.log(ms / 0.1) / math.log(GAMMA) - 1e-9)) if ms > 0.1 else 0


def rank(values: Iterable[float], share: float) -> float:
    """The nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


async def ask_all(
    port: int, flags: dict[str, Flag], asks: Iterable[Ask], connections: int, records: list[Record] | None = None
) -> list[Record]:
    """Sends every request, so many at a time, and keeps what became of each, in `records` if it is given."""
    records = [] if records is None else records
    waiting = iter(asks)
    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(_ask_in_turn(port, flags, waiting, records))
    return records


@dataclass
class Traffic:
    """Users of every model who go on asking while a test breaks something. `kinds` as in Ask."""

    port: int
    flags: dict[str, Flag]
    connections: int = 40
    after_s: float = 0.05
    kinds: tuple[str, ...] = ("plain", "plain", "pilot", "force-canary")
    records: list[Record] = field(default_factory=list)
    _stopped: bool = False
    _task: Any = None

    async def __aenter__(self) -> Self:
        """They ask from now on."""
        self._task = asyncio.create_task(ask_all(self.port, self.flags, self._asks(), self.connections, self.records))
        return self

    async def __aexit__(self, *_: object) -> None:
        """All of them have had their last answer."""
        self._stopped = True
        await self._task

    async def more(self, requests: int) -> None:
        """Waits until so many more have begun and ended."""
        end_s, now_s = time.monotonic() + 60, time.monotonic()
        while sum(record.began_s > now_s for record in self.records) < requests:
            assert time.monotonic() < end_s
            assert not self._task.done(), self._task
            await asyncio.sleep(0.05)

    def _asks(self) -> Iterator[Ask]:
        for i in itertools.count():
            if self._stopped:
                return
            model = list(self.flags)[i % len(self.flags)]
            do = {"version": f"v{i % 2}", "predictions": str(i % 7), "count": 1, "after": self.after_s}
            yield Ask(model, f"user-{i * 7919 % 5000}", self.kinds[i // 3 % len(self.kinds)], do)


async def _ask_in_turn(port: int, flags: dict[str, Flag], waiting: Iterator[Ask], records: list[Record]) -> None:
    """One connection, which is opened again where it was closed."""
    connection: Any = None
    for ask in waiting:
        lines = [f"POST /v2/models/{ask.model}/infer HTTP/1.1", "host: e2e", "content-length: 2"]
        head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in ask.headers()), "", "{}"])
        began_s = time.monotonic()
        status, headers = 0, {}
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            connection[1].write(head.encode())
            status, headers = await _answer(connection[0], body="part" not in ask.do)
        records.append(Record(ask, flags[ask.model], status, headers, began_s, time.monotonic()))
        if "part" in ask.do or not status:
            connection = await _close(connection)
            await asyncio.sleep(0 if status else 0.1)
    await _close(connection)


async def _close(connection: Any) -> None:
    """Closes a connection, if there is one."""
    if connection is not None:
        connection[1].close()
        with contextlib.suppress(OSError):
            await connection[1].wait_closed()


async def _answer(reader: asyncio.StreamReader, *, body: bool) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, of which the body is read as well, or not."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:-2])
    if body:
        await reader.readexactly(int(headers["content-length"]))
    assert headers.get("x-told-arm") in (None, headers.get("x-model-cohort")), "Envoy and the server disagree"
    return int(lines[0].split(" ")[1]), headers


# --- the model servers, and what control says -------------------------------------------------------------------------


class Servers:
    """The model servers of obedient.py, one for each arm, at `stable.sock` and `canary.sock` in a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for arm in ARMS:
            self.begin(arm)
        return self

    def __exit__(self, *_: object) -> None:
        for arm in ARMS:
            self.kill(arm)

    def begin(self, arm: str) -> None:
        """Starts the server of an arm, also in the place of one that was killed."""
        program = [sys.executable, "-I", str(Path(__file__).with_name("obedient.py"))]
        self.processes[arm] = subprocess.Popen([*program, str(self.place / f"{arm}.sock"), arm])

    def hung(self, records: Iterable[Record]) -> list[Record]:
        """The records, of which those without an answer get what the model server was told, as if it had answered."""
        lines = [line for path in self.place.glob("*.hung") for line in path.read_text().splitlines()]
        told = {
            one: {"x-hung": "1"} | ({"x-told-cohort": cohort} if cohort else {})
            for one, cohort in (line.split(" ") for line in lines)
        }
        return [
            replace(one, headers=one.headers | told.get(one.headers.get("x-request-id", ""), {})) for one in records
        ]

    def kill(self, arm: str) -> None:
        """Ends it at once; its socket stays and refuses."""
        self.processes[arm].kill()
        self.processes[arm].wait()


def models(place: Path, names: Iterable[str], deadline_s: float) -> dict[str, Any]:
    """The models' entries in models.yaml: each arm is one server in `place`, the same for all of them."""
    arms = {arm: [f"unix:{place}/{arm}.sock"] for arm in ARMS}
    return {name: {"prefix": f"/v2/models/{name}/", "deadline_s": deadline_s, **arms} for name in names}


def begin_to_count(tools: Any, system: Any) -> None:
    """Control is killed, and one that counts from zero is waited for."""
    system.until_settled()

    def sent() -> bool:
        log = system.counters(r"^access_logs\.grpc_access_log\.(logs_written|grpc_entries_flushed)$")
        return len(log) == 2 and len(set(log.values())) == 1

    tools.until(sent, "an Envoy that has nothing left to log")
    system.signal(signal.SIGKILL, "control")
    tools.until(lambda: system.status().get("access_log") == NO_LOG, "a control that counts from zero")
    system.until_settled()


def metrics_of(system: Any) -> dict[tuple[str, ...], float]:
    """`GET /metrics` as (name, tag values in the order of their names ...) to value."""
    code, text = system.get(system.control_port, "/metrics")
    assert code == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def decided_of(status: dict[str, Any]) -> Counter[tuple[str, str, str]]:
    """What serve decided, by (flag, cohort, reason)."""
    found: Counter[tuple[str, str, str]] = Counter()
    for flag, row in status["flags"].items():
        for cohort, reasons in row["decided"].items():
            found.update({(flag, cohort, reason): n for reason, n in reasons.items()})
    return found


def reconciled(status: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The reconciliation by flag."""
    return {name: row["reconciliation"] for name, row in status.get("flags", {}).items() if "reconciliation" in row}

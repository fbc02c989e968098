"""`POST /v1/outcomes`: values reported later about requests or units, as one JSON object, an array, or NDJSON.

NDJSON is read line by line as it comes, in memory that does not grow with the body; an object or an array is read whole
and may have MAX_BODY bytes. Each report is taken or refused for itself: an error in one says nothing about the others.
Whatever is refused is counted once: by the store where that refuses it, else here, by `refuse`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import StreamReader, web

from extproc.api import UNREADABLE, reason_of
from extproc.core.kpis import KpiError, Reported, Result, State, parse_reported

Report = Callable[[Reported], Result]
Refuse = Callable[[], None]

MAX_BODY = 1 << 20
MAX_LINE = 1 << 16
MAX_ERRORS = 20
"""Errors told one by one; the rest is in `refused`."""

STALL_S = 300.0
"""A body of which nothing comes for this long has ended: its client hangs, or its chunks cannot be told apart."""

TURN = 500
"""Reports taken before others get their turn on the loop: some five milliseconds."""

NDJSON = {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}

_COUNTED = {
    State.JOINED: "joined",
    State.PENDING: "pending",
    State.DUPLICATE: "duplicates",
    State.LATE: "late",
}


class TooLargeError(ValueError):
    """A body that has to be read whole and is too long for it; the message says what to do."""


@dataclass(slots=True)
class Answer:
    """What became of the reports of one body. `place` is what errors are numbered by: "line" or "index".

    `broken` is the status for a body that has no end.
    """

    report: Report
    refuse: Refuse
    place: str = "line"
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED.values(), 0))
    refused: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    broken: int | None = None

    def take(self, number: int, data: Any) -> None:
        """One report as JSON gave it."""
        try:
            reported = parse_reported(data)
        except KpiError as error:
            self.unreadable(number, str(error))
            return
        state, reason = self.report(reported)
        if state is State.REFUSED:
            self._tell(number, reason)
        else:
            self.counts[_COUNTED[state]] += 1

    def unreadable(self, number: int, reason: str) -> None:
        """One report that is none, so that the store never sees it."""
        self.refuse()
        self._tell(number, reason)

    def _tell(self, number: int, reason: str) -> None:
        self.refused += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({self.place: number, "error": reason})

    def break_off(self, reason: str, status: int) -> None:
        """What follows cannot be read, however much it is: it counts as one. It is told behind all other errors."""
        self.refuse()
        self.refused += 1
        self.broken = status
        self.errors.append({"error": f"the body cannot be read to its end: {reason}"})

    def response(self) -> web.Response:
        """200 if anything was understood, and the body had an end; what was reported before or is late was."""
        accepted = sum(self.counts.values())
        if not accepted and not self.refused:
            self.errors.append({"error": "the body holds no outcome"})
        body = {"accepted": accepted, **self.counts, "refused": self.refused, "errors": self.errors}
        response = web.json_response(body, status=self.broken or (200 if accepted else 400))
        if self.broken:
            response.force_close()  # where the next request would begin is not known
        return response


def outcome_routes(report: Report, refuse: Refuse) -> list[web.RouteDef]:
    """The routes. They belong to the loop that serves them, as what they are given does.

    `report` takes one report, at once, and counts it; `refuse` counts one that cannot be read.
    """

    async def outcomes(request: web.Request) -> web.Response:
        answer = Answer(report, refuse)
        try:
            await take_body(request.content, request.content_type, answer)
        except TooLargeError as error:
            refuse()
            return web.json_response({"error": str(error)}, status=413)
        except TimeoutError:
            answer.break_off(f"nothing came for {STALL_S:g} seconds", 408)
        except (*UNREADABLE, OSError) as error:  # OSError: the client is gone, and the answer is for nobody
            answer.break_off(reason_of(error), 400)
        return answer.response()

    return [web.post("/v1/outcomes", outcomes)]


async def take_body(content: StreamReader, content_type: str, answer: Answer) -> None:
    """Takes everything in a body. What was taken before it raises stays taken and is in the answer.

    Raises TooLargeError, and UNREADABLE or OSError, TimeoutError for one, where the body breaks off.
    """
    if content_type in NDJSON:
        await _lines(answer, b"", content)
        return
    begun = await _first_line(content)
    if not begun.startswith(b"[") and _is_json(begun.partition(b"\n")[0]):
        await _lines(answer, begun, content)
    else:
        await _whole(answer, begun, content)


async def _first_line(content: StreamReader) -> bytes:
    """The body up to the end of its first line or a little further; all of it if it ends before.

    What is empty before the first line is left out, of its number too.
    """
    begun = bytearray()
    async for chunk in _chunks(b"", content):
        begun += chunk if begun else chunk.lstrip()
        if b"\n" in chunk and begun:
            break
        if len(begun) > MAX_LINE:
            break
    return bytes(begun)


async def _lines(answer: Answer, begun: bytes, content: StreamReader) -> None:
    """Each line is one report. `begun` was read already."""
    number = 0
    async for line in split_lines(begun, content):
        number += 1
        if number % TURN == 0:
            await asyncio.sleep(0)
        if line is None:
            answer.unreadable(number, f"longer than {MAX_LINE} bytes")
        elif line.strip():
            _take_line(answer, number, line)


def _take_line(answer: Answer, number: int, line: bytes) -> None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        answer.unreadable(number, _not_json(error))
    else:
        answer.take(number, data)


def _not_json(error: Exception) -> str:
    """Why. What the interpreter says of its own limits is for who runs it."""
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeError):
        return f"not JSON: {error}"
    return "not JSON: a number has too many digits"


async def split_lines(begun: bytes, content: StreamReader) -> AsyncIterator[bytes | None]:
    """The lines without their ends, None for each that is longer than MAX_LINE. Holds one line and one chunk."""
    rest, skipping = bytearray(), False
    async for chunk in _chunks(begun, content):
        *lines, last = chunk.split(b"\n")
        for line in lines:
            rest += line
            yield None if skipping or len(rest) > MAX_LINE else bytes(rest)
            rest.clear()
            skipping = False
        rest += last
        if len(rest) > MAX_LINE:
            rest.clear()
            skipping = True
    if rest or skipping:
        yield None if skipping else bytes(rest)


async def _chunks(begun: bytes, content: StreamReader) -> AsyncIterator[bytes]:
    if begun:
        yield begun
    while True:
        async with asyncio.timeout(STALL_S):
            chunk = await content.readany()
        if not chunk:
            break
        yield chunk


async def _whole(answer: Answer, begun: bytes, content: StreamReader) -> None:
    body = bytearray(begun)
    async for chunk in _chunks(b"", content):
        body += chunk
        if len(body) > MAX_BODY:
            break
    if len(body) > MAX_BODY:
        raise TooLargeError(
            f"a JSON body may have {MAX_BODY} bytes; send more as NDJSON, a line per outcome, "
            "with content-type application/x-ndjson"
        )
    answer.place = "index"
    if not body.strip():
        return
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        answer.unreadable(0, _not_json(error))
        return
    for index, item in enumerate(data if isinstance(data, list) else [data]):
        if index % TURN == TURN - 1:
            await asyncio.sleep(0)
        answer.take(index, item)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True

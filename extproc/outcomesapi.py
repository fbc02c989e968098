"""`POST /v1/outcomes`: values reported later about requests or units, as one JSON object, an array, or NDJSON.

NDJSON is read line by line as it comes, in memory that does not grow with the body; an object or an array is read whole
and may have MAX_BODY bytes. Each report is taken or refused for itself: an error in one says nothing about the others.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import StreamReader, web

from extproc.core.kpis import KpiError, Reported, Result, State, parse_reported

Report = Callable[[Reported], Result]

MAX_BODY = 1 << 20
MAX_LINE = 1 << 16
MAX_ERRORS = 20
"""Errors told one by one; the rest is in `refused`."""

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
    """What became of the reports of one body. `place` is what errors are numbered by: "line" or "index"."""

    report: Report
    place: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED.values(), 0))
    refused: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)

    def take(self, number: int, data: Any) -> None:
        """One report as JSON gave it."""
        try:
            state, reason = self.report(parse_reported(data))
        except KpiError as error:
            self.refuse(number, str(error))
            return
        if state is State.REFUSED:
            self.refuse(number, reason)
        else:
            self.counts[_COUNTED[state]] += 1

    def refuse(self, number: int, reason: str) -> None:
        """One report that is not taken."""
        self.refused += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({self.place: number, "error": reason})

    def response(self) -> web.Response:
        """200 if anything was understood; what was reported before or is late was."""
        accepted = sum(self.counts.values())
        if not accepted and not self.refused:
            self.errors.append({"error": "the body holds no outcome"})
        body = {"accepted": accepted, **self.counts, "refused": self.refused, "errors": self.errors}
        return web.json_response(body, status=200 if accepted else 400)


def outcome_routes(report: Report) -> list[web.RouteDef]:
    """The routes. `report` takes one report, at once; it belongs to the loop that serves them."""

    async def outcomes(request: web.Request) -> web.Response:
        try:
            return (await answered(request.content, request.content_type, report)).response()
        except TooLargeError as error:
            return web.json_response({"error": str(error)}, status=413)

    return [web.post("/v1/outcomes", outcomes)]


async def answered(content: StreamReader, content_type: str, report: Report) -> Answer:
    """Takes everything in a body. Raises TooLargeError; lines that were taken before stay taken."""
    if content_type in NDJSON:
        return await _lines(report, b"", content)
    begun = await _first_line(content)
    if not begun.startswith(b"[") and _is_json(begun.partition(b"\n")[0]):
        return await _lines(report, begun, content)
    return await _whole(report, begun, content)


async def _first_line(content: StreamReader) -> bytes:
    """The body up to the end of its first line or a little further; all of it if it ends before.

    What is empty before the first line is left out, of its number too.
    """
    begun = bytearray()
    async for chunk in content.iter_any():
        begun += chunk if begun else chunk.lstrip()
        if b"\n" in chunk and begun:
            break
        if len(begun) > MAX_LINE:
            break
    return bytes(begun)


async def _lines(report: Report, begun: bytes, content: StreamReader) -> Answer:
    """Each line is one report. `begun` was read already."""
    answer = Answer(report, "line")
    number = 0
    async for line in split_lines(begun, content):
        number += 1
        if number % TURN == 0:
            await asyncio.sleep(0)
        if line is None:
            answer.refuse(number, f"longer than {MAX_LINE} bytes")
        elif line.strip():
            _take_line(answer, number, line)
    return answer


def _take_line(answer: Answer, number: int, line: bytes) -> None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        answer.refuse(number, f"not JSON: {error}")
    else:
        answer.take(number, data)


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
    async for chunk in content.iter_any():
        yield chunk


async def _whole(report: Report, begun: bytes, content: StreamReader) -> Answer:
    body = bytearray(begun)
    async for chunk in content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            break
    if len(body) > MAX_BODY:
        raise TooLargeError(
            f"a JSON body may have {MAX_BODY} bytes; send more as NDJSON, a line per outcome, "
            "with content-type application/x-ndjson"
        )
    answer = Answer(report, "index")
    if not body.strip():
        return answer
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        answer.refuse(0, f"not JSON: {error}")
        return answer
    for index, item in enumerate(data if isinstance(data, list) else [data]):
        if index % TURN == TURN - 1:
            await asyncio.sleep(0)
        answer.take(index, item)
    return answer


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True

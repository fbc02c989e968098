"""Sends requests when they are due, not when the last answer came: a slow server does not make the load lighter."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from extproc.traffic.arrivals import Arrival
from extproc.traffic.digits import Digit
from extproc.traffic.labels import Labels
from extproc.traffic.tally import ABANDONED, NO_ANSWER, UNKNOWN, Tally

MAX_WAITING = 10_000
"""Requests that may wait for a connection; what is due beyond that is skipped and counted."""

TIMEOUT_S = 20.0
"""Longer than a model's deadline, so that Envoy's answer comes first."""

GRACE_S = 2.0
"""What requests under way are given when it is stopped."""


class TrafficError(Exception):
    """Nobody to send to; the message says what to do."""


@dataclass(slots=True)
class Sender:
    """Sends to `url` over at most `connections`. Latency counts from when a request was due."""

    session: aiohttp.ClientSession
    url: str
    digits: list[Digit]
    connections: int
    labels: Labels | None = None
    tally: Tally = field(default_factory=Tally)
    _queue: asyncio.Queue[Arrival | None] = field(default_factory=asyncio.Queue)
    _start_s: float = 0.0

    async def send(self, arrivals: Iterator[Arrival], stop: asyncio.Event) -> None:
        """Sends every arrival in its time and waits for the answers, or until `stop` is set."""
        self._start_s = asyncio.get_running_loop().time()
        askers = [asyncio.create_task(self._ask_in_turn()) for _ in range(self.connections)]
        feeder = asyncio.create_task(self._feed(arrivals))
        stopped = asyncio.create_task(stop.wait())
        everything = asyncio.gather(feeder, *askers)
        try:
            await asyncio.wait((everything, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                feeder.cancel()
                self._empty_queue()
                await asyncio.wait(askers, timeout=GRACE_S)
        finally:
            tasks = (feeder, stopped, *askers)
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(everything, *tasks, return_exceptions=True)
        for one in found:
            if isinstance(one, Exception):
                raise one

    async def _feed(self, arrivals: Iterator[Arrival]) -> None:
        loop = asyncio.get_running_loop()
        for arrival in arrivals:
            due_s = self._start_s + arrival.due_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self.tally.behind_s = max(self.tally.behind_s, loop.time() - due_s)
            if self._queue.qsize() < MAX_WAITING:
                self._queue.put_nowait(arrival)
            else:
                self.tally.skipped += 1
        for _ in range(self.connections):
            self._queue.put_nowait(None)

    def _empty_queue(self) -> None:
        while not self._queue.empty():
            self.tally.skipped += self._queue.get_nowait() is not None
        for _ in range(self.connections):
            self._queue.put_nowait(None)

    async def _ask_in_turn(self) -> None:
        while (arrival := await self._queue.get()) is not None:
            self.tally.sent += 1
            try:
                await self._ask(arrival)
            except asyncio.CancelledError:
                self.tally.unanswered(ABANDONED, "stopped before the answer came")
                raise
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.tally.unanswered(NO_ANSWER, str(error) or type(error).__name__)

    async def _ask(self, arrival: Arrival) -> None:
        digit = self.digits[arrival.digit]
        headers = {"content-type": "application/json", "x-user-id": arrival.user}
        async with self.session.post(self.url, data=digit.body, headers=headers) as answer:
            content = await answer.read()
        now_s = asyncio.get_running_loop().time()
        predicted = prediction_of(answer, content) if answer.status == 200 else None
        correct = None if predicted is None else predicted == digit.label
        cohort, version = (answer.headers.get(f"x-model-{name}", UNKNOWN) for name in ("cohort", "version"))
        self.tally.answer(answer.status, cohort, version, (now_s - self._start_s - arrival.due_s) * 1000, correct)
        if self.labels is not None and correct is not None:
            self.labels.add(answer.headers.get("x-request-id", ""), now_s, correct=correct)


def prediction_of(answer: aiohttp.ClientResponse, content: bytes) -> str | None:
    """What the model saw: the header says it, or else the body; None for neither."""
    header = answer.headers.get("x-model-prediction")
    if header:
        return header.partition(",")[0]
    try:
        outputs: Any = {output["name"]: output["data"] for output in json.loads(content)["outputs"]}
        return str(outputs["label"][0])
    except (ValueError, TypeError, KeyError, IndexError):
        return None


async def check_reachable(session: aiohttp.ClientSession, url: str, what: str) -> None:
    """Raises TrafficError if nobody speaks HTTP there. Any answer will do."""
    try:
        async with session.get(url, allow_redirects=False):
            return
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise TrafficError(f"{what} does not answer at {url} ({error or type(error).__name__})") from None

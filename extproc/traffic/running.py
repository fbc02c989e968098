"""One run of traffic: checks that somebody listens, sends, waits for the labels, sums up."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import aiohttp

from extproc.traffic.arrivals import Arrival, Crowd, arrivals
from extproc.traffic.digits import Digit
from extproc.traffic.labels import Labels
from extproc.traffic.sending import GRACE_S, TIMEOUT_S, Sender, TrafficError, check_reachable
from extproc.traffic.tally import Tally

Show = Callable[[float, Tally, str], None]
SHOW_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is sent where; `control` None: no labels. It ends after `seconds` or `requests`, whichever comes first."""

    url: str
    control: str | None
    token: str | None = field(repr=False)
    crowd: Crowd
    digits: list[Digit]
    seconds: float | None
    requests: int | None
    connections: int
    label_delay_s: float

    @property
    def expected_s(self) -> float:
        """How long sending will take, about."""
        of_requests = self.requests / self.crowd.rate if self.requests is not None else float("inf")
        return min(of_requests, self.seconds if self.seconds is not None else float("inf"))

    def arrivals(self) -> Iterator[Arrival]:
        """The requests of this run."""
        seconds = self.seconds
        endless = arrivals(self.crowd)
        timed = endless if seconds is None else takewhile(lambda arrival: arrival.due_s <= seconds, endless)
        return timed if self.requests is None else islice(timed, self.requests)


async def run(plan: Plan, stop: asyncio.Event, show: Show) -> dict[str, Any]:
    """The summary, as JSON can hold it. Raises TrafficError when nobody listens at the start."""
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=plan.connections),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as control,
    ):
        await _check(plan, session, control)
        labels = Labels(control, plan.control, plan.label_delay_s, plan.token) if plan.control else None
        sender = Sender(session, plan.url, plan.digits, plan.connections, labels)
        async with _labelled(labels, stop):
            start_s = asyncio.get_running_loop().time()
            async with _shown(sender.tally, show):
                await sender.send(plan.arrivals(), stop)
            seconds = asyncio.get_running_loop().time() - start_s
            show(plan.expected_s, sender.tally, "waiting for the last labels")
    document = {"seconds": round(seconds, 3), **sender.tally.plain()}
    return document if labels is None else {**document, "labels": labels.plain()}


async def _check(plan: Plan, session: aiohttp.ClientSession, control: aiohttp.ClientSession) -> None:
    try:
        await check_reachable(session, plan.url.partition("/v2/")[0], "Envoy")
    except TrafficError as error:
        raise TrafficError(f"{error}; is `perch up` running? --url says where") from None
    if plan.control is None:
        return
    try:
        await check_reachable(control, f"{plan.control}/livez", "control")
    except TrafficError as error:
        raise TrafficError(f"{error}; --control says where, --no-labels does without") from None


@asynccontextmanager
async def _labelled(labels: Labels | None, stop: asyncio.Event) -> AsyncIterator[None]:
    """Sends labels beside the body, and those that are due later after it; once it is stopped, no more."""
    if labels is None:
        yield
        return
    labelling = asyncio.create_task(labels.run())
    stopped = asyncio.create_task(stop.wait())
    try:
        yield
        labels.close()
        await asyncio.wait((labelling, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not labelling.done():
            labels.give_up()
            await asyncio.wait([labelling], timeout=GRACE_S)
    finally:
        labelling.cancel()
        stopped.cancel()
        await asyncio.wait((labelling, stopped))
    labels.give_up()
    if not labelling.cancelled():
        labelling.result()  # a mistake of ours must be seen


@asynccontextmanager
async def _shown(tally: Tally, show: Show) -> AsyncIterator[None]:
    """Shows how it goes while the body runs."""

    async def show_on() -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while True:
            show(loop.time() - start_s, tally, "")
            await asyncio.sleep(SHOW_EVERY_S)

    showing = asyncio.create_task(show_on())
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.wait([showing])


@contextmanager
def stop_at_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, ends the run in order; the second one at once."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop_once() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, stop_once)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)

"""Sends the truth back later, as an application would that learns it later: `accuracy`, 1 or 0, to the control API."""

import asyncio
import json
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

BATCH = 1_000
EVERY_S = 0.25
MAX_WAITING = 200_000
PATIENCE_S = 10.0
"""How long control may be away at the end before the rest is given up."""


@dataclass(slots=True)
class Told:
    """What became of the labels, as control says; `unsent` ones it never answered to."""

    sent: int = 0
    accepted: int = 0
    joined: int = 0
    pending: int = 0
    duplicates: int = 0
    late: int = 0
    refused: int = 0
    unsent: int = 0


@dataclass(slots=True)
class Labels:
    """Labels that wait for their time, `delay_s` after the answer. Times are those of the event loop."""

    session: aiohttp.ClientSession
    url: str
    delay_s: float
    token: str | None = field(default=None, repr=False)
    told: Told = field(default_factory=Told)
    problem: str = ""
    _waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    _hopeless: bool = False
    _closed: bool = False

    def add(self, request_id: str, now_s: float, *, correct: bool) -> None:
        """The truth about one request, kept until it is due."""
        if self._hopeless or not request_id or len(self._waiting) >= MAX_WAITING:
            self.told.unsent += 1
            return
        label = {"request_id": request_id, "name": "accuracy", "value": int(correct)}
        self._waiting.append((now_s + self.delay_s, json.dumps(label).encode()))

    async def run(self) -> None:
        """Sends what is due, until it is closed and nothing waits, or control stays away."""
        loop = asyncio.get_running_loop()
        alive_s = loop.time()
        while self._waiting or not self._closed:
            if await self.send_due():
                alive_s = loop.time()
            elif self._closed and loop.time() - alive_s > PATIENCE_S:
                break
            await asyncio.sleep(EVERY_S)
        self.give_up()

    def close(self) -> None:
        """No more labels will come."""
        self._closed = True

    def give_up(self) -> None:
        """What still waits will not be sent."""
        self.told.unsent += len(self._waiting)
        self._waiting.clear()

    async def send_due(self) -> bool:
        """Sends every label that is due; False if control did not take them, and they wait for the next time."""
        now_s = asyncio.get_running_loop().time()
        while self._waiting and self._waiting[0][0] <= now_s:
            batch: list[tuple[float, bytes]] = []
            while self._waiting and self._waiting[0][0] <= now_s and len(batch) < BATCH:
                batch.append(self._waiting.popleft())
            try:
                taken = await self._send([line for _, line in batch])
            except BaseException:
                self._waiting.extendleft(reversed(batch))
                raise
            if not taken:
                self._waiting.extendleft(reversed(batch))
                return False
            if self._hopeless:
                self.give_up()
        return True

    async def _send(self, lines: list[bytes]) -> bool:
        headers = {"content-type": "application/x-ndjson"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        try:
            async with self.session.post(f"{self.url}/v1/outcomes", data=b"\n".join(lines), headers=headers) as answer:
                status, content = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.problem = f"control does not answer at {self.url} ({error or type(error).__name__})"
            return False
        if status >= 500:
            self.problem = f"control answers {status} to labels"
            return False
        self._count(status, content, len(lines))
        return True

    def _count(self, status: int, content: bytes, n: int) -> None:
        self.told.sent += n
        try:
            told: Any = json.loads(content)
            for name in ("accepted", "joined", "pending", "duplicates", "late", "refused"):
                setattr(self.told, name, getattr(self.told, name) + int(told[name]))
            if told["refused"]:
                self.problem = f"control refuses labels: {told['errors'][0]['error']}"
        except (ValueError, TypeError, KeyError, IndexError):
            self.told.refused += n
            self._hopeless = True
            hint = "; set PERCH_TOKEN" if status in {401, 403} else ""
            self.problem = f"control answers {status} to labels, no more are sent{hint}"

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self.told), **({"problem": self.problem} if self.problem else {})}

"""Clients that come through the listener, as many at a time as a test likes; every answer is kept with its times."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

ARTIFACTS = Path(__file__).resolve().parents[2] / "model_servers" / "artifacts" / "digits"
DEADLINE_S = 60.0
VERSIONS = {"stable": ("1-logistic", "standin-stable"), "canary": ("2-mlp", "standin-canary")}


@dataclass(frozen=True, repr=False)
class Answer:
    """What a client got. `arm` is who served, None where nobody did; status 0 means the connection failed."""

    user: str
    status: int
    arm: str | None
    began_s: float
    ended_s: float
    headers: Any = None
    body: bytes = b""

    def __repr__(self) -> str:
        """What matters when a test fails."""
        return f"<{self} from {self.began_s:.3f} to {self.ended_s:.3f}: {self.body[:100]!r}>"

    def __str__(self) -> str:
        """`200 canary`, as case files write it."""
        return f"{self.status} {self.arm}" if self.arm else str(self.status)


def inference(rows: int = 1) -> bytes:
    """A V2 request of so many digits; a row takes about 190 bytes."""
    example = json.loads((ARTIFACTS / "1" / "manifest.json").read_text())["examples"]["pixels"][0]
    tensor = {"name": "pixels", "shape": [rows, 64], "datatype": "FP32", "data": example * rows}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]}).encode()


class Client:
    """Requests through the listener, any number at a time over kept connections."""

    def __init__(self, system: Any, session: aiohttp.ClientSession) -> None:
        self.system = system
        self.session = session
        self.small = inference()

    async def infer(self, user: str, *, model: str = "digits", body: bytes | None = None) -> Answer:
        """One inference by one user. The version header must name the same arm as the cohort header."""
        began_s = time.monotonic()
        url = f"http://127.0.0.1:{self.system.port}/v2/models/{model}/infer"
        headers = {"x-user-id": user, "content-type": "application/json"}
        try:
            async with self.session.post(url, data=io.BytesIO(body or self.small), headers=headers) as answer:
                text = await answer.read()
        except (aiohttp.ClientError, OSError):
            return Answer(user, 0, None, began_s, time.monotonic())
        arm = answer.headers.get("x-model-cohort")
        if answer.status == 200:
            assert answer.headers["x-model-version"] in VERSIONS[arm]
        return Answer(user, answer.status, arm, began_s, time.monotonic(), answer.headers, text)

    async def all(
        self, users: Iterable[str], *, model: str = "digits", connections: int = 16, in_flight: int = 1_000_000
    ) -> dict[str, str]:
        """One request of every user: `200 canary` or the like, by user. All connections are open before the first."""
        answers: dict[str, str] = {}
        waiting = iter(users)
        opened = [await asyncio.open_connection("127.0.0.1", self.system.port) for _ in range(connections)]
        turn = asyncio.Semaphore(in_flight)
        await asyncio.gather(*(self._ask_in_turn(each, waiting, model, turn, answers) for each in opened))
        for _, writer in opened:
            writer.close()
            await writer.wait_closed()
        return answers

    async def _ask_in_turn(
        self, connection: Any, users: Iterator[str], model: str, turn: asyncio.Semaphore, answers: dict[str, str]
    ) -> None:
        """One connection, one user after the other. By hand, since it takes a third of the library's time."""
        reader, writer = connection
        head = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: e2e\r\ncontent-length: {len(self.small)}\r\nx-user-id: "
        )
        for user in users:
            async with turn:
                writer.write(head.encode() + user.encode() + b"\r\n\r\n" + self.small)
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:-2])
                body = await reader.readexactly(int(headers["content-length"]))
            answers[user] = f"{lines[0].split(' ')[1]} {headers['x-model-cohort']}"
            if not answers[user].startswith("200"):
                answers[user] += f" {body!r}"

    async def until(self, user: str, wanted: str, *, model: str = "digits") -> None:
        """Asks until the answer is `wanted`."""
        last = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                while last != wanted:
                    last = str(await self.infer(user, model=model))
        assert last == wanted, f"{user} of {model}"


@contextlib.asynccontextmanager
async def client_of(system: Any) -> AsyncIterator[Client]:
    """A client of a system."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(system, session)

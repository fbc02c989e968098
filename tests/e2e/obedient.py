"""A model server that does what each request tells it to: `python obedient.py SOCKET ARM`. Health checks get a yes.

The request's header `x-do` is a JSON object. `status` is the answer's (200), `after` the seconds until it (0);
`version`, `predictions` and `count` become the answer's headers; with `hang` there is no answer, with `part` only its
head.
Every answer says in `x-told-arm` who gave it, and in `x-told-cohort` which cohort the request was said to be in. For a
request without an answer a line with its id and that cohort goes to a file beside the socket, `ARM.hung`.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

HEADERS = {"version": "x-model-version", "predictions": "x-model-prediction", "count": "x-model-prediction-count"}


class Obedient(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.received = b""
        self.transport: Any = None
        self.later: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps what is needed for an answer."""
        self.transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Nobody waits any more."""
        if self.later is not None:
            self.later.cancel()

    def data_received(self, data: bytes) -> None:
        """Answers once the request is whole."""
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
        headers = {name.lower(): value for name, value in headers.items()}
        if len(body) >= int(headers.get("content-length", "0")):
            self.received = b""
            self.obey(headers)

    def obey(self, headers: dict[str, str]) -> None:
        """What the request asked for, now or later."""
        do = json.loads(headers.get("x-do", "{}"))
        if "hang" in do:
            with Path(sys.argv[1]).with_suffix(".hung").open("a") as hung:
                hung.write(f"{headers['x-request-id']} {headers.get('x-model-cohort', '')}\n")
            return
        lines = [f"HTTP/1.1 {do.get('status', 200)} As-Told", f"x-told-arm: {sys.argv[2]}", "content-length: 2"]
        lines += [f"{name}: {do[key]}" for key, name in HEADERS.items() if key in do]
        if "x-model-cohort" in headers:
            lines.append(f"x-told-cohort: {headers['x-model-cohort']}")
        answer = "\r\n".join([*lines, "", "" if "part" in do else "{}"]).encode()
        if do.get("after"):
            self.later = asyncio.get_running_loop().call_later(do["after"], self.transport.write, answer)
        else:
            self.transport.write(answer)


async def main() -> None:
    """Serves until killed."""
    server = await asyncio.get_running_loop().create_unix_server(Obedient, sys.argv[1], backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

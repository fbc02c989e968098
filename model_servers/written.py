"""An HTTP response that is already bytes.

aiohttp's server only asks a response for `prepare`, `write_eof` and `keep_alive`. Its own Response class spends half of
a small inference's time on building headers that are known beforehand, so this one writes them in one piece. Reading,
keep-alive, pipelining, limits and shutdown stay aiohttp's.
"""

import time
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import web

from model_servers import jsontext

_JOIN_BYTES = 64 << 10  # up to here one copy is cheaper than a second buffer
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}


class Written:
    """One response. `headers` are complete lines, each ending in CRLF, without content-length and date."""

    __slots__ = ("_body", "_headers", "_request", "keep_alive", "status")

    def __init__(self, status: int, body: bytes, headers: str) -> None:
        self.status = status
        self.keep_alive: bool | None = None
        self._body = body
        self._headers = headers
        self._request: web.BaseRequest | None = None

    def force_close(self) -> None:
        """Ends the connection after this response."""
        self.keep_alive = False

    async def prepare(self, request: web.BaseRequest) -> None:
        """Writes the response. Called by aiohttp; raises ConnectionResetError when the client is gone."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._request = request
        if self.keep_alive is None:
            self.keep_alive = request.keep_alive
        head = self._head(request).encode("latin-1")
        if request.method == "HEAD":
            transport.write(head)
        elif len(self._body) <= _JOIN_BYTES:
            transport.write(head + self._body)
        else:
            transport.writelines((head, self._body))

    async def write_eof(self) -> None:
        """Waits, before the connection's next request is read, while the client is slow to take this response."""
        request = self._request
        if request is not None and request.transport is not None and request.transport.get_write_buffer_size():
            await request.writer.drain()

    def _head(self, request: web.BaseRequest) -> str:
        if not self.keep_alive:
            connection = "connection: close\r\n"
        else:
            connection = "connection: keep-alive\r\n" if request.version < (1, 1) else ""
        length = len(self._body)
        line = _STATUS_LINES[self.status]
        return f"{line}{self._headers}{connection}content-length: {length}\r\ndate: {_date()}\r\n\r\n"


def json_response(document: object, status: HTTPStatus = HTTPStatus.OK, headers: str = "") -> Written:
    """A JSON document as a response."""
    return Written(status.value, jsontext.write(document), f"content-type: application/json\r\n{headers}")


_dated: tuple[int, str] = (0, "")


def _date() -> str:
    """The Date header's value, written once a second."""
    global _dated  # noqa: PLW0603  one cached string
    now = int(time.time())
    if _dated[0] != now:
        _dated = (now, formatdate(now, usegmt=True))
    return _dated[1]

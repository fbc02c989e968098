"""The fast ext_proc transport: an asyncio Protocol around connection.Connection. Works on asyncio's loop and on uvloop.

All that one read brings is answered with one write. A peer that does not read is not read from either.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, cast

from extproc.transport.connection import Connection
from extproc.transport.limits import Limits
from extproc.transport.listen import BACKLOG, Listener, open_listener

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.transport.calls import Answer

TICK_S: Final = 1.0
WATCH_S: Final = 0.2
LINGER_S: Final = 1.0
"""How long the peer may take to read the last bytes and close."""
SLICE_BYTES: Final = 32_768
"""Of a longer read only so much is answered at a time: it bounds what one write can hold."""


class _Link(asyncio.Protocol):
    """One accepted connection: moves bytes between its transport and its Connection."""

    __slots__ = ("_backlog", "_connection", "_ending", "_lane", "_paused_since_s", "_transport")

    def __init__(self, lane: FastLane, connection: Connection) -> None:
        self._lane = lane
        self._connection = connection
        self._transport: asyncio.Transport | None = None
        self._paused_since_s: float | None = None
        self._backlog = b""
        self._ending = False

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of asyncio's
        transport.set_write_buffer_limits(high=self._lane.limits.write_buffer_bytes)
        self._lane.joined(self)
        self._send(self._connection.open())

    def data_received(self, data: bytes) -> None:
        if self._backlog or self._paused_since_s is not None or len(data) > SLICE_BYTES:
            self._backlog += data
            self._work_off()
            return
        self._send(self._connection.receive(data))
        if self._connection.watched:
            self._lane.watch()

    def pause_writing(self) -> None:
        self._paused_since_s = time.monotonic()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused_since_s = None
        self._work_off()
        if self._paused_since_s is None and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why it was lost changes nothing for us
        self._transport = None
        self._backlog = b""
        self._lane.left(self)

    # What the lane calls.

    def tick(self, now_s: float, passed_s: float) -> None:
        """Lets the connection know the time, and ends it if its peer has not read for too long."""
        if self._paused_since_s is not None and now_s - self._paused_since_s >= self._lane.limits.stalled_s:
            self.abort()
            return
        self._send(self._connection.tick(now_s, passed_s))

    def tell_watchers(self) -> bool:
        """Sends changes of the health status; whether anybody watches."""
        if self._paused_since_s is None:
            self._send(self._connection.tell_watchers())
        return self._connection.watched

    def drain(self) -> None:
        """Begins the end of the connection without losing a request."""
        self._send(self._connection.drain())

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _work_off(self) -> None:
        while self._backlog and self._paused_since_s is None:
            piece, self._backlog = self._backlog[:SLICE_BYTES], self._backlog[SLICE_BYTES:]
            self._send(self._connection.receive(piece))
        if self._connection.watched:
            self._lane.watch()

    def _send(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or self._ending or transport.is_closing():
            return
        if data:
            transport.write(data)
        if self._connection.closing:
            self._end(transport)

    def _end(self, transport: asyncio.Transport) -> None:
        """Closes our direction and lets the peer read GOAWAY; a plain close could reset the connection before that."""
        self._ending = True
        if transport.can_write_eof():
            transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.abort)


class FastLane:
    """The fast transport. `answer` is called once per message, on the loop's thread; `serving` is the health status."""

    def __init__(self, answer: Answer, serving: Callable[[], bool], *, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
        self.limits = limits
        self._answer = answer
        self._serving = serving
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._listener: Listener | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._ticked_s = 0.0
        self._stopping = False

    async def start(self, listen: str) -> str:
        """Listens on "unix:PATH" or "HOST:PORT" (port 0: any) and returns the real address. Raises ListenError."""
        loop = asyncio.get_running_loop()
        self._listener = open_listener(listen)
        if self._listener.path is None:
            self._server = await loop.create_server(self._accept, sock=self._listener.socket, backlog=BACKLOG)
        else:
            self._server = await loop.create_unix_server(self._accept, sock=self._listener.socket, backlog=BACKLOG)
        self._stopping = False
        self._ticked_s = time.monotonic()
        self._timer = loop.call_later(TICK_S, self._tick)
        return self._listener.address

    async def stop(self, grace_s: float) -> None:
        """Accepts no more, asks every peer to leave, and waits up to `grace_s` seconds for their open requests."""
        if self._server is None or self._listener is None:
            return
        self._stopping = True
        self._listener.remove_file()  # before the close, as long as nobody else's file can have its inode number
        self._server.close()
        for link in list(self._links):
            link.drain()
        if self._links:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), grace_s)
            except TimeoutError:
                for link in list(self._links):
                    link.abort()
        for timer in (self._timer, self._watch_timer):
            if timer is not None:
                timer.cancel()
        self._server = self._listener = self._timer = self._watch_timer = None

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._links)

    # What its links call.

    def joined(self, link: _Link) -> None:
        """A connection was made."""
        self._links.add(link)

    def left(self, link: _Link) -> None:
        """A connection was lost."""
        self._links.discard(link)
        if not self._links:
            self._empty.set()

    def watch(self) -> None:
        """Somebody watches the health status: look at it from time to time."""
        if self._watch_timer is None:
            self._watch_timer = asyncio.get_running_loop().call_later(WATCH_S, self._tell_watchers)

    def _accept(self) -> _Link:
        return _Link(self, Connection(self._answer, self._serves, self.limits))

    def _serves(self) -> bool:
        return not self._stopping and self._serving()

    def _tick(self) -> None:
        now_s = time.monotonic()
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        for link in list(self._links):
            link.tick(now_s, passed_s)
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tell_watchers(self) -> None:
        self._watch_timer = None
        watched = [link.tell_watchers() for link in list(self._links)]
        if any(watched):
            self.watch()

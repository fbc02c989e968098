"""The service that Envoy's access log is sent to: gRPC streams in, batches of outcomes out, and counts of both."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from extproc.transport.grpcio import birth_of, free_socket
from extproc.wire.outcomes import Batch, UnreadableLogError, read_slices

SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"
LARGEST_MESSAGE_BYTES: Final = 16 * 2**20
"""Envoy sends what it gathered once that exceeds its buffer (1 MiB); a larger message than this ends the stream."""
SLICE: Final = 500
"""Entries between two pauses of the loop."""
MOST_ENVOYS: Final = 64

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.http2.max_ping_strikes", 0),  # Envoy pings every 10 s, and nothing is ever sent on these streams
)


class StreamInfo(NamedTuple):
    """Whose entries they are. `number` counts streams from 1; `node` is "" until, and unless, the stream named it."""

    number: int
    node: str
    log_name: str


@dataclass(slots=True)
class EnvoySeen:
    """One Envoy: when it was heard last, on the caller's clock, and what of it was read.

    `streams` is how many of its streams are open, normally one per worker thread.
    """

    last_s: float
    streams: int = 0
    entries: int = 0


@dataclass(slots=True)
class Counts:
    """What came. All but `open` and `envoys` only grow.

    `entries` counts those that became outcomes, `unreadable` those that did not, `unreadable_messages` whole messages
    that could not be read. How a stream ended is not counted: gRPC tells an end, a lost connection and a message too
    large in the same way. `envoys` has the MOST_ENVOYS last heard, by node id, "" for those that do not say.
    """

    open: int = 0
    opened: int = 0
    messages: int = 0
    entries: int = 0
    unreadable: int = 0
    unreadable_messages: int = 0
    envoys: dict[str, EnvoySeen] = field(default_factory=dict)


class AccessLogService:
    """Gives every batch to `take`, with the stream it came on, between two awaits of the loop that serves.

    `clock` gives seconds, of any kind. What `take` raises ends the stream, and Envoy opens a new one.
    """

    def __init__(self, take: Callable[[Batch, StreamInfo], None], clock: Callable[[], float]) -> None:
        self.counts = Counts()
        self._take = take
        self._clock = clock
        self._server: Any = None
        self._socket: Path | None = None
        self._born: tuple[int, int] | None = None

    async def start(self, listen: str) -> str:
        """Listens at `unix:/path` (owner only) or `HOST:PORT` (0 for any port); returns the address that it got.

        Raises OSError, with the address in its message, when it is taken or cannot be used.
        """
        socket = Path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None
        if socket is not None:
            socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_socket(socket)
        server = grpc.aio.server(options=_OPTIONS)
        method = grpc.stream_unary_rpc_method_handler(self._stream)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": method}),))
        before = os.umask(0o177)
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError:
            await server.stop(None)
            raise OSError(f"cannot listen at {listen}: the address is taken or not ours") from None
        finally:
            os.umask(before)
        await server.start()
        self._server, self._socket, self._born = server, socket, birth_of(socket)
        return listen if socket is not None else f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Takes no more streams, lets those under way go on for `grace_s` seconds, removes the socket."""
        if self._server is not None:
            await self._server.stop(grace_s)
        # gRPC has removed the socket already, when it began to drain; what is there now may be our successor's.
        if self._socket is not None and birth_of(self._socket) == self._born is not None:
            with contextlib.suppress(FileNotFoundError):
                self._socket.unlink()

    async def _stream(self, messages: AsyncIterator[bytes], _context: Any) -> bytes:
        """One stream to its end. A message that cannot be read is counted, and the next one read."""
        counts = self.counts
        counts.opened += 1
        counts.open += 1
        number, info = counts.opened, None
        try:
            async for message in messages:
                info = await self._take_message(message, number, info)
        finally:
            counts.open -= 1
            if info is not None:
                self._left(info.node)
        return b""

    async def _take_message(self, message: bytes, number: int, info: StreamInfo | None) -> StreamInfo | None:
        """Hands over what a message says, in slices; returns whose stream it is, as soon as that is known."""
        self.counts.messages += 1
        try:
            for batch in read_slices(message, SLICE):
                info = self._identified(batch, number, info)
                self._take_batch(batch, info)
                await asyncio.sleep(0)  # whatever else waits for the loop goes first
        except UnreadableLogError:
            self.counts.unreadable_messages += 1
        return info

    def _identified(self, batch: Batch, number: int, info: StreamInfo | None) -> StreamInfo:
        """The stream's first message says whose it is; a later one may say it again."""
        if info is not None and batch.node in {None, info.node}:
            return info
        if info is not None:
            self._left(info.node)
        self._envoy(batch.node or "").streams += 1
        return StreamInfo(number, batch.node or "", batch.log_name)

    def _take_batch(self, batch: Batch, info: StreamInfo) -> None:
        counts, envoy = self.counts, self._envoy(info.node)
        envoy.last_s = self._clock()
        envoy.entries += len(batch.outcomes)
        counts.entries += len(batch.outcomes)
        counts.unreadable += batch.unreadable
        self._take(batch, info)

    def _envoy(self, node: str) -> EnvoySeen:
        """The record of an Envoy; the one not heard for longest makes room for a new one."""
        envoys = self.counts.envoys
        if node not in envoys:
            if len(envoys) >= MOST_ENVOYS:
                del envoys[min(envoys, key=lambda one: (envoys[one].streams > 0, envoys[one].last_s))]
            envoys[node] = EnvoySeen(self._clock())
        return envoys[node]

    def _left(self, node: str) -> None:
        envoy = self._envoy(node)
        envoy.streams = max(envoy.streams - 1, 0)  # a record that made room began anew

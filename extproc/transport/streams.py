"""The streams of one connection: what is known of an open one, and how the closed ones ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.states import Life

if TYPE_CHECKING:
    from extproc.transport.heads import Head

REMEMBERED: Final = 1024
"""Closed streams of which at least this many are remembered; late frames for older ones find FORGOTTEN."""


class Stream:
    """One open stream. A plain mutable record, made once per request: it has slots and no more than it needs."""

    __slots__ = (
        "answered",
        "call",
        "client_done",
        "content_length",
        "credit",
        "end_block",
        "id",
        "messages",
        "partial",
        "queue",
        "received",
        "status",
        "window",
        "without_body",
    )

    def __init__(self, stream_id: int, head: Head, window: int, credit: int) -> None:
        self.id = stream_id
        self.call = head.call
        self.content_length = head.content_length
        self.without_body = head.without_body
        self.window = window
        """Bytes we may send; negative after the peer lowered its initial window."""
        self.credit = credit
        """Bytes the peer may send."""
        self.received = 0
        """Body bytes so far, for the check against content-length."""
        self.messages = 0
        self.client_done = False
        self.answered = False
        """Response headers were sent."""
        self.partial: bytearray | None = None
        """The beginning of a message that has not arrived in full."""
        self.queue: bytearray | None = None
        """Body bytes that wait for the peer's windows."""
        self.end_block: bytes | None = None
        """Trailers to send behind the queue; b"" ends with END_STREAM on the last DATA frame; None: no end yet."""
        self.status = 0
        """The health status a watcher was told last."""


class Streams:
    """Open streams by identifier, what they hold in memory together, and a bounded memory of closed ones."""

    __slots__ = (
        "_closed_before",
        "blocked",
        "brief",
        "closed",
        "last_id",
        "open",
        "partial_bytes",
        "queued_bytes",
        "watchers",
    )

    def __init__(self) -> None:
        self.open: dict[int, Stream] = {}
        self.brief: dict[int, tuple[int, int]] = {}
        """Open ones that were answered without a Stream: body bytes received, and sent. In `open` or here, not both."""
        self.blocked: dict[int, Stream] = {}
        """Those whose queue waits for a window, the one that waits longest first."""
        self.watchers: dict[int, Stream] = {}
        """Those that want to hear of changes of the health status."""
        self.last_id = 0
        """The highest identifier the peer has used."""
        self.partial_bytes = 0
        self.queued_bytes = 0
        self.closed: dict[int, Life] = {}
        """How the latest ended."""
        self._closed_before: dict[int, Life] = {}

    @property
    def under_way(self) -> int:
        """How many are open."""
        return len(self.open) + len(self.brief)

    def forget(self) -> dict[int, Life]:
        """Makes room in `closed`, which is full at REMEMBERED; returns it."""
        if len(self.closed) >= REMEMBERED:
            self._closed_before, self.closed = self.closed, {}
        return self.closed

    def close(self, stream_id: int, life: Life) -> None:
        """Remembers how a stream ended and frees everything else of it."""
        self.forget()[stream_id] = life
        stream = self.open.pop(stream_id, None)
        if stream is None:
            return
        if stream.partial is not None:
            self.drop_partial(stream)
        if stream.queue is not None:
            self.queued_bytes -= len(stream.queue)
            stream.queue = None
            del self.blocked[stream_id]
        if stream.status:
            self.watchers.pop(stream_id, None)

    def drop_partial(self, stream: Stream) -> None:
        """Forgets an unfinished message."""
        if stream.partial is not None:
            self.partial_bytes -= len(stream.partial)
            stream.partial = None

    def life(self, stream_id: int) -> Life:
        """Where a stream (not 0) stands."""
        stream = self.open.get(stream_id)
        if stream is not None:
            return Life.CLIENT_DONE if stream.client_done else Life.OPEN
        if stream_id > self.last_id or not stream_id & 1:
            return Life.IDLE
        return self.closed.get(stream_id) or self._closed_before.get(stream_id) or Life.FORGOTTEN

"""The connection as a whole: SETTINGS, PING, GOAWAY, and what the passing of time means. RFC 9113 sections 6.5 to 6.8.

Time is an argument (`tick`), so an hour of silence is one call in a test.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from extproc.transport import frames
from extproc.transport.allowance import IDLE_FRAME, SMALL_FRAME
from extproc.transport.errors import ErrorCode, Http2ConnectionError

if TYPE_CHECKING:
    from extproc.transport.allowance import Allowance
    from extproc.transport.heads import HeadReader
    from extproc.transport.limits import Limits
    from extproc.transport.sender import Sender
    from extproc.transport.streams import Streams

_ALIVE: Final = b"perch up"
_DRAIN: Final = b"draining"


class _Asked(Enum):
    """A SETTINGS frame of ours that the peer must acknowledge."""

    OPENING = auto()
    NO_TABLE = auto()


class Control:
    """State of the connection that belongs to no stream."""

    __slots__ = (
        "_allowance",
        "_asked",
        "_block_since_s",
        "_heads",
        "_last_id",
        "_limits",
        "_pinged_s",
        "_quiet_since_s",
        "_sender",
        "_streams",
        "_used_s",
        "_waits_since_s",
        "closing",
        "drained",
        "draining",
        "heard",
        "leaving",
        "table_kept",
    )

    def __init__(
        self, streams: Streams, sender: Sender, heads: HeadReader, allowance: Allowance, limits: Limits
    ) -> None:
        self._streams = streams
        self._sender = sender
        self._heads = heads
        self._allowance = allowance
        self._limits = limits
        self._asked: list[_Asked] = []
        self.table_kept = True
        """The peer was not yet told to give up its dynamic header table."""
        self.closing = False
        """Nothing more is read; what was gathered is the last that is sent."""
        self.draining = False
        self.drained = False
        """The last GOAWAY was sent: new streams are too late."""
        self.leaving = False
        """One side has sent its last GOAWAY; the connection ends with its last stream."""
        self.heard = True
        """Something was received since the last tick."""
        self._quiet_since_s = 0.0
        self._last_id = -1
        self._used_s = 0.0
        self._waits_since_s: float | None = None
        self._block_since_s: float | None = None
        self._pinged_s: float | None = None

    def open(self) -> None:
        """The server's preface, and a connection window wider than the default."""
        limits = self._limits
        self._asked.append(_Asked.OPENING)
        self._sender.add(
            frames.settings(
                (
                    (frames.MAX_CONCURRENT_STREAMS, limits.max_concurrent_streams),
                    (frames.MAX_HEADER_LIST_SIZE, limits.max_header_bytes),
                )
            )
        )
        if (more := limits.connection_window_bytes - frames.DEFAULT_WINDOW) > 0:
            self._sender.add(frames.window_update(0, more))

    def ask_for_no_table(self) -> None:
        """SETTINGS_HEADER_TABLE_SIZE 0, once a peer shows that it speaks gRPC.

        Not in the preface: plain HTTP/2 probes are known to acknowledge it and go on with a table of 4096 bytes, which
        RFC 9113 4.3.1 makes an error. They never need many requests, so decoding theirs with a table costs nothing.
        """
        self.table_kept = False
        self._asked.append(_Asked.NO_TABLE)
        self._sender.add(frames.settings(((frames.HEADER_TABLE_SIZE, 0),)))

    def on_settings(self, flags: int, payload: bytes) -> None:
        """RFC 9113 6.5. Values take effect in their order, then the frame is acknowledged."""
        if flags & frames.ACK:
            self._on_settings_ack(payload)
            return
        if len(payload) % frames.SETTING.size:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS not a multiple of 6 bytes")
        self._allowance.spend(IDLE_FRAME, "SETTINGS")
        for name, value in frames.SETTING.iter_unpack(payload):
            self._allowance.spend(SMALL_FRAME, "a setting")  # a new initial window touches every open stream
            self._apply(name, value)
        self._sender.add(frames.SETTINGS_ACK)
        self._sender.flush()

    def on_ping(self, flags: int, payload: bytes) -> None:
        """RFC 9113 6.7."""
        if len(payload) != 8:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "PING without 8 bytes")
        self._allowance.spend(IDLE_FRAME, "PING")
        if not flags & frames.ACK:
            self._sender.add(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAIN and self.draining:
            self._finish_drain()

    def on_goaway(self, payload: bytes) -> None:
        """RFC 9113 6.8: the peer opens nothing more; what is open is still served."""
        if len(payload) < 8:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY shorter than 8 bytes")
        self.leaving = True

    def drain(self) -> None:
        """Asks the peer to open no more streams; those it opens before it has read that are still served.

        Twice GOAWAY around a PING, as RFC 9113 6.8 advises: after the first one the peer may still open streams, and
        its answer to the PING shows that it no longer will.
        """
        if not self.draining and not self.closing:
            self.draining = True
            self._sender.add(frames.goaway(frames.LARGEST_STREAM_ID, ErrorCode.NO_ERROR, "shutting down"))
            self._sender.add(frames.frame(frames.PING, 0, 0, _DRAIN))

    def _finish_drain(self) -> None:
        if not self.drained:
            self.drained = self.leaving = True
            self._sender.add(frames.goaway(self._streams.last_id, ErrorCode.NO_ERROR, "shutting down"))

    def fail(self, error: Http2ConnectionError) -> None:
        """A connection error: GOAWAY, and nothing after it."""
        self._sender.add(frames.goaway(self._streams.last_id, error.code, error.reason))
        self.closing = True

    def leave_if_done(self) -> bool:
        """Ends a connection on which a side wants no new streams, once none is open. Asked after each frame."""
        if self._streams.under_way:
            return False
        if not self.drained:
            self._sender.add(frames.goaway(self._streams.last_id, ErrorCode.NO_ERROR))
        self.closing = True
        return True

    def tick(self, now_s: float, *, greeted: bool, within_block: bool) -> None:
        """About once a second: `now_s` is any steady clock. Raises Http2ConnectionError when patience ends."""
        limits = self._limits
        if self.heard:
            self.heard = False
            self._quiet_since_s = now_s
            self._pinged_s = None
        self._waits_since_s = self._overdue(self._waits_since_s, now_s, waits=not greeted or bool(self._asked))
        self._block_since_s = self._overdue(self._block_since_s, now_s, waits=within_block)
        if self._streams.under_way or self._streams.last_id != self._last_id:
            self._last_id = self._streams.last_id
            self._used_s = now_s
        elif now_s - self._used_s >= limits.idle_s:
            self.drain()
        if self._pinged_s is not None:
            if now_s - self._pinged_s >= limits.ping_timeout_s:
                raise Http2ConnectionError(ErrorCode.NO_ERROR, "no answer to PING")
        elif now_s - self._quiet_since_s >= limits.ping_after_s:
            self._pinged_s = now_s
            self._sender.add(frames.frame(frames.PING, 0, 0, _ALIVE))

    def _overdue(self, since_s: float | None, now_s: float, *, waits: bool) -> float | None:
        if not waits:
            return None
        if since_s is None:
            return now_s
        if now_s - since_s >= self._limits.first_frame_s:
            raise Http2ConnectionError(ErrorCode.SETTINGS_TIMEOUT, "preface, acknowledgment or header block overdue")
        return since_s

    def _on_settings_ack(self, payload: bytes) -> None:
        if payload:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS acknowledgment with a payload")
        if not self._asked:
            self._allowance.spend(IDLE_FRAME, "SETTINGS acknowledgment of nothing")
        elif self._asked.pop(0) is _Asked.NO_TABLE:
            self._heads.table_size_zero_acknowledged()

    def _apply(self, name: int, value: int) -> None:
        match name:
            case frames.ENABLE_PUSH if value > 1:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
            case frames.INITIAL_WINDOW_SIZE if value > frames.LARGEST_WINDOW:
                raise Http2ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE above 2^31-1")
            case frames.INITIAL_WINDOW_SIZE:
                self._sender.set_initial_window(value)
            case frames.MAX_FRAME_SIZE if not frames.DEFAULT_FRAME_BYTES <= value <= frames.LARGEST_FRAME_BYTES:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "MAX_FRAME_SIZE out of range")
            case frames.MAX_FRAME_SIZE:
                self._sender.max_frame = value
            case _:
                pass  # the rest limits what we never do (push, dynamic table) or is unknown (RFC 9113 6.5.2)

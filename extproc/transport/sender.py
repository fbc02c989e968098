"""Everything we send on one connection, within the peer's flow-control windows (RFC 9113 section 5.2).

Frames are gathered and taken as one piece of bytes, so that one batch read becomes one write. What the windows do not
allow waits in the queue of its stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.transport import frames, messages
from extproc.transport.errors import ErrorCode, Http2ConnectionError, Http2StreamError
from extproc.transport.states import Life

if TYPE_CHECKING:
    from extproc.transport.limits import Limits
    from extproc.transport.streams import Stream, Streams


class Sender:
    """Builds the frames of our answers."""

    __slots__ = ("_limits", "_streams", "initial_window", "max_frame", "parts", "window")

    def __init__(self, streams: Streams, limits: Limits) -> None:
        self._streams = streams
        self._limits = limits
        self.parts: list[bytes] = []
        self.window = frames.DEFAULT_WINDOW
        self.initial_window = frames.DEFAULT_WINDOW
        self.max_frame = frames.DEFAULT_FRAME_BYTES

    def take(self) -> bytes:
        """All bytes gathered since the last call."""
        data = b"".join(self.parts)
        self.parts.clear()
        return data

    def add(self, raw: bytes) -> None:
        """Frames that no window holds back."""
        self.parts.append(raw)

    def reply(self, stream: Stream, payload: bytes) -> None:
        """One gRPC message, behind the response headers if it is the first."""
        if not stream.answered:
            stream.answered = True
            self.add(frames.frame(frames.HEADERS, frames.END_HEADERS, stream.id, messages.REPLY_BLOCK))
        self._enqueue(stream, messages.message(payload))

    def finish(self, stream: Stream, trailers: bytes) -> None:
        """The end of a gRPC answer, behind whatever is still queued."""
        stream.end_block = trailers if stream.answered else messages.REPLY_BLOCK + trailers
        stream.answered = True
        if stream.queue is None:
            self._end(stream)

    def http_answer(self, stream: Stream, status: int) -> None:
        """A whole answer to a request that is not gRPC."""
        block = messages.http_block(status)
        stream.answered = True
        if stream.without_body:
            stream.end_block = block
            self._end(stream)
            return
        self.add(frames.frame(frames.HEADERS, frames.END_HEADERS, stream.id, block))
        stream.end_block = b""
        self._enqueue(stream, messages.NOT_GRPC_BODY)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """RST_STREAM; the stream is closed."""
        self.add(frames.rst_stream(stream_id, code))
        self._streams.close(stream_id, Life.RESET_BY_US)

    def widen(self, increment_bytes: int) -> None:
        """WINDOW_UPDATE of the connection."""
        self.window += increment_bytes
        if self.window > frames.LARGEST_WINDOW:
            raise Http2ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "connection window above 2^31-1")
        self.flush()

    def widen_stream(self, stream: Stream, increment_bytes: int) -> None:
        """WINDOW_UPDATE of a stream."""
        stream.window += increment_bytes
        if stream.window > frames.LARGEST_WINDOW:
            raise Http2StreamError(stream.id, ErrorCode.FLOW_CONTROL_ERROR, "stream window above 2^31-1")
        self._flush(stream)

    def set_initial_window(self, size_bytes: int) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE moves the window of every open stream by the difference (RFC 9113 6.9.2).

        The caller flushes, behind the acknowledgment: the peer counts with the new windows from there on.
        """
        change = size_bytes - self.initial_window
        self.initial_window = size_bytes
        for stream in self._streams.open.values():
            stream.window += change
            if stream.window > frames.LARGEST_WINDOW:
                raise Http2ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "stream window above 2^31-1")

    def flush(self) -> None:
        """Sends what the windows allow by now, the stream that waits longest first."""
        for stream in list(self._streams.blocked.values()):
            if self.window <= 0:
                break
            self._flush(stream)

    def _enqueue(self, stream: Stream, data: bytes) -> None:
        self._streams.queued_bytes += len(data)
        if stream.queue is None:
            stream.queue = bytearray()
            self._streams.blocked[stream.id] = stream
        stream.queue += data
        self._flush(stream)
        if self._streams.queued_bytes > self._limits.queued_bytes:
            raise Http2ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "too many replies wait for a window")

    def _flush(self, stream: Stream) -> None:
        queue = stream.queue
        if queue is None:
            return
        place = 0
        while (room := min(stream.window, self.window, self.max_frame, len(queue) - place)) > 0:
            last = place + room == len(queue) and stream.end_block == b""
            chunk = bytes(queue[place : place + room])
            self.add(frames.frame(frames.DATA, frames.END_STREAM if last else 0, stream.id, chunk))
            stream.window -= room
            self.window -= room
            place += room
        del queue[:place]
        self._streams.queued_bytes -= place
        if not queue:
            stream.queue = None
            del self._streams.blocked[stream.id]
            if stream.end_block is not None:
                self._end(stream)

    def _end(self, stream: Stream) -> None:
        if stream.end_block:
            flags = frames.END_HEADERS | frames.END_STREAM
            self.add(frames.frame(frames.HEADERS, flags, stream.id, stream.end_block))
        if stream.client_done:
            self._streams.close(stream.id, Life.ENDED)
        else:  # a complete answer before the end of the request: RFC 9113 8.1
            self.reset(stream.id, ErrorCode.NO_ERROR)

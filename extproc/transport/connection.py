"""One HTTP/2 connection of the fast lane, without I/O: bytes received in, bytes to send out.

`receive` may be given any pieces of the peer's bytes; the answers do not depend on how they were cut. It never raises:
whatever the peer does wrong becomes RST_STREAM or GOAWAY. Which frame means what in which life of a stream is the table
in states.py; this module parses frames and carries out what the table says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport import frames
from extproc.transport.allowance import IDLE_FRAME, SMALL_FRAME, Allowance
from extproc.transport.calls import Answer, Calls
from extproc.transport.control import Control
from extproc.transport.errors import ErrorCode, Http2ConnectionError, Http2StreamError
from extproc.transport.exchanges import Exchanges
from extproc.transport.frames import CONTINUATION, DATA, END_HEADERS, END_STREAM, HEAD_BYTES, HEADERS, PADDED
from extproc.transport.heads import Call, Head, HeadReader
from extproc.transport.sender import Sender
from extproc.transport.states import CLOSED, Action, Life, judge
from extproc.transport.streams import Stream, Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.transport.limits import Limits

_PROCESS: Final = Call.PROCESS
_HEADERS_OPTIONS: Final = END_HEADERS | PADDED | frames.PRIORITIZED
_STREAM_CREDIT: Final = frames.DEFAULT_WINDOW
_STREAM_CREDIT_LOW: Final = _STREAM_CREDIT // 2


class _Block:
    """A header block whose CONTINUATION frames have not all arrived."""

    __slots__ = ("flags", "fragments", "frames", "self_dependent", "stream_id")

    def __init__(self, stream_id: int, flags: int, fragment: bytes, *, self_dependent: bool) -> None:
        self.stream_id = stream_id
        self.flags = flags
        self.fragments = bytearray(fragment)
        self.frames = 0
        self.self_dependent = self_dependent


class Connection:
    """The server's side of one connection."""

    __slots__ = (
        "_allowance",
        "_block",
        "_calls",
        "_control",
        "_credit",
        "_credit_low",
        "_exchanges",
        "_greeted",
        "_heads",
        "_limits",
        "_open",
        "_sender",
        "_streams",
        "_tail",
    )

    def __init__(self, answer: Answer, serving: Callable[[], bool], limits: Limits) -> None:
        self._limits = limits
        self._streams = Streams()
        self._open = self._streams.open
        self._sender = Sender(self._streams, limits)
        self._heads = HeadReader(limits.max_header_bytes)
        self._allowance = Allowance(limits)
        self._calls = Calls(answer, serving, self._streams, self._sender, limits)
        self._control = Control(self._streams, self._sender, self._heads, self._allowance, limits)
        self._exchanges = Exchanges(answer, self._heads, self._streams, self._sender, limits)
        self._credit = max(limits.connection_window_bytes, frames.DEFAULT_WINDOW)
        self._credit_low = self._credit // 2
        self._greeted = False
        self._block: _Block | None = None
        self._tail = b""

    # What the protocol around it calls.

    def open(self) -> bytes:
        """The server's preface; to be sent before anything else."""
        self._control.open()
        return self._sender.take()

    def receive(self, data: bytes) -> bytes:
        """Takes the next bytes from the peer and returns what to send. After `closing`, nothing is read any more."""
        if self._control.closing:
            return b""
        self._control.heard = True
        if self._tail:
            data = self._tail + data
        try:
            self._tail = self._frames(data)
        except Http2ConnectionError as error:
            self._fail(error)
        if self._calls.answered:
            self._allowance.earn(self._calls.answered)
            self._calls.answered = 0
        return self._sender.take()

    def tick(self, now_s: float, passed_s: float) -> bytes:
        """To be called about once a second, with a steady clock and the time since the last call."""
        if not self._control.closing:
            self._allowance.regain(passed_s)
            try:
                self._control.tick(now_s, greeted=self._greeted, within_block=self._block is not None)
            except Http2ConnectionError as error:
                self._fail(error)
        return self._sender.take()

    def drain(self) -> bytes:
        """Begins a shutdown in which no request is lost: GOAWAY, then `closing` once every stream has ended."""
        if self._control.closing:
            return b""
        if not self._greeted:
            self._control.closing = True
            return b""
        try:
            self._calls.end_watchers()
        except Http2ConnectionError as error:
            self._fail(error)
        self._control.drain()
        return self._sender.take()

    def tell_watchers(self) -> bytes:
        """Sends the health status to whoever watches and has not heard it."""
        try:
            if not self._control.closing:
                self._calls.tell_watchers()
        except Http2ConnectionError as error:
            self._fail(error)
        return self._sender.take()

    @property
    def closing(self) -> bool:
        """Whether the bytes returned last are the last ones: write them, then close."""
        return self._control.closing

    @property
    def watched(self) -> bool:
        """Whether somebody watches the health status."""
        return bool(self._streams.watchers)

    @property
    def open_streams(self) -> int:
        """How many requests are under way."""
        return self._streams.under_way

    # Frames.

    def _frames(self, data: bytes) -> bytes:  # noqa: C901, PLR0912  the hot loop: one dispatch for all frames
        """Carries out every complete frame; returns the rest."""
        end = len(data)
        place = 0
        if not self._greeted:
            place = self._greet(data)
            if not self._greeted:
                return data
        control, brief = self._control, self._streams.brief
        unpack = frames.FRAME_HEAD.unpack_from
        while True:
            if self._block is None and not control.leaving:
                place = self._ordinary(data, place)
            if end - place < HEAD_BYTES:
                return data[place:]
            high, low, kind, flags, stream_id = unpack(data, place)
            begin = place + HEAD_BYTES
            place = begin + low
            if high or low > frames.DEFAULT_FRAME_BYTES:
                raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "frame larger than 16384 bytes")
            if place > end:
                return data[begin - HEAD_BYTES :]
            stream_id &= 0x7FFFFFFF
            if stream_id in brief:
                self._exchanges.unfold(stream_id)
            try:
                if self._block is not None:
                    self._continue(kind, flags, stream_id, data[begin:place])
                elif kind == DATA:
                    self._data(data, begin, place, flags, stream_id)
                elif kind == HEADERS:
                    if flags & _HEADERS_OPTIONS == END_HEADERS and stream_id:
                        self._head(data[begin:place], flags, stream_id)
                    else:
                        self._headers(data[begin:place], flags, stream_id)
                else:
                    self._other(kind, flags, stream_id, data[begin:place])
            except Http2StreamError as error:
                self._stream_error(error)
            if control.leaving and control.leave_if_done():
                return b""

    def _ordinary(self, data: bytes, place: int) -> int:
        """Deals with ordinary exchanges; returns the place of the first frame that is something else."""
        place, used, answers = self._exchanges.run(data, place, self._credit - self._credit_low)
        self._credit -= used
        self._calls.answered += answers
        return place

    def _greet(self, data: bytes) -> int:
        """The client's preface: its magic bytes, then a SETTINGS frame (RFC 9113 3.4). Returns where frames begin."""
        magic = frames.PREFACE
        size = len(magic)
        if data[:size] != magic[: len(data)]:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 preface")
        if len(data) >= size + HEAD_BYTES:
            _, _, kind, flags, _ = frames.FRAME_HEAD.unpack_from(data, size)
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "the preface must end with SETTINGS")
            self._greeted = True
        return size

    def _data(self, data: bytes, begin: int, stop: int, flags: int, stream_id: int) -> None:
        """DATA (RFC 9113 6.1)."""
        size = stop - begin
        self._credit -= size
        if self._credit < self._credit_low:
            self._restore_credit()
        stream = self._open.get(stream_id)
        if stream is None or stream.client_done:
            self._stray_data(stream_id)
            return
        stream.credit -= size
        if stream.credit < _STREAM_CREDIT_LOW:
            self._restore_stream_credit(stream, flags)
        if flags & PADDED:
            begin, stop = frames.unpadded(data, begin, stop)
            size = stop - begin
        stream.received += size
        if stream.received > stream.content_length >= 0:
            raise Http2StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, "more data than content-length")
        if size:
            self._calls.body(stream, data[begin:stop])
        elif not flags & END_STREAM:
            self._allowance.spend(IDLE_FRAME, "empty DATA")
        if flags & END_STREAM and stream_id in self._open:
            self._client_done(stream)

    def _stray_data(self, stream_id: int) -> None:
        if not stream_id:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "DATA on stream 0")
        judge(self._streams.life(stream_id), DATA, stream_id)
        self._allowance.spend(IDLE_FRAME, "DATA on a closed stream")

    def _restore_credit(self) -> None:
        if self._credit < 0:
            raise Http2ConnectionError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection window")
        whole = max(self._limits.connection_window_bytes, frames.DEFAULT_WINDOW)
        self._sender.add(frames.window_update(0, whole - self._credit))
        self._credit = whole

    def _restore_stream_credit(self, stream: Stream, flags: int) -> None:
        if stream.credit < 0:
            raise Http2StreamError(stream.id, ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream window")
        if not flags & END_STREAM:
            self._sender.add(frames.window_update(stream.id, _STREAM_CREDIT - stream.credit))
            stream.credit = _STREAM_CREDIT

    def _client_done(self, stream: Stream) -> None:
        stream.client_done = True
        if stream.content_length not in (-1, stream.received):
            raise Http2StreamError(stream.id, ErrorCode.PROTOCOL_ERROR, "less data than content-length")
        self._calls.client_done(stream)

    # Header blocks.

    def _headers(self, payload: bytes, flags: int, stream_id: int) -> None:
        """HEADERS (RFC 9113 6.2)."""
        if not stream_id:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        self_dependent = False
        if flags & (PADDED | frames.PRIORITIZED):
            begin, stop = frames.unpadded(payload, 0, len(payload)) if flags & PADDED else (0, len(payload))
            if flags & frames.PRIORITIZED:
                if stop - begin < 5:
                    code = ErrorCode.PROTOCOL_ERROR if len(payload) >= begin + 5 else ErrorCode.FRAME_SIZE_ERROR
                    raise Http2ConnectionError(code, "HEADERS too short for its priority and padding")
                self_dependent = frames.dependency(payload, begin) == stream_id
                begin += 5
            payload = payload[begin:stop]
        if flags & END_HEADERS:
            self._head(payload, flags, stream_id, self_dependent)
        else:
            self._block = _Block(stream_id, flags, payload, self_dependent=self_dependent)

    def _continue(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """CONTINUATION (RFC 9113 6.10), the only frame allowed within a header block."""
        block = self._block
        if block is None or kind != CONTINUATION or stream_id != block.stream_id:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
        block.fragments += payload
        block.frames += 1
        if len(block.fragments) > self._limits.max_header_bytes or block.frames > self._limits.max_continuations:
            raise Http2ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "header block too long")
        if flags & END_HEADERS:
            self._block = None
            self._head(bytes(block.fragments), block.flags, stream_id, block.self_dependent)

    def _head(self, block: bytes, flags: int, stream_id: int, self_dependent: bool = False) -> None:  # noqa: FBT001, FBT002  hot
        """A complete header block: of a new request, or trailers of one that is open."""
        if not (stream_id > self._streams.last_id and stream_id & 1):
            self._trailers(block, flags, stream_id)
            return
        head = self._heads.request(block)
        self._streams.last_id = stream_id
        if head.fault or self_dependent:
            raise Http2StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, head.fault or "stream depends on itself")
        if self._streams.under_way >= self._limits.max_concurrent_streams or self._control.drained:
            raise Http2StreamError(stream_id, ErrorCode.REFUSED_STREAM, "too many streams, or too late")
        stream = Stream(stream_id, head, self._sender.initial_window, _STREAM_CREDIT)
        self._open[stream_id] = stream
        if head.call is not _PROCESS or self._control.table_kept:
            self._begin(stream, head)
        if flags & END_STREAM and stream_id in self._open:
            self._client_done(stream)

    def _begin(self, stream: Stream, head: Head) -> None:
        if self._control.table_kept and head.call not in (Call.NOT_GRPC, Call.NOT_POST):
            self._control.ask_for_no_table()
        self._calls.begin(stream)

    def _trailers(self, block: bytes, flags: int, stream_id: int) -> None:
        life = self._streams.life(stream_id)
        if life is Life.IDLE:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "HEADERS on an even stream")
        fault = self._heads.trailers(block)
        if judge(life, HEADERS, stream_id) is Action.DISCARD:
            self._allowance.spend(IDLE_FRAME, "HEADERS on a closed stream")
        elif fault or not flags & END_STREAM:
            raise Http2StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, fault or "trailers without END_STREAM")
        else:
            self._client_done(self._open[stream_id])

    # The other frames of streams.

    def _other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        match kind:
            case frames.RST_STREAM:
                self._rst_stream(stream_id, payload)
            case frames.WINDOW_UPDATE:
                self._window_update(stream_id, payload)
            case frames.PRIORITY:
                self._priority(stream_id, payload)
            case frames.SETTINGS | frames.PING | frames.GOAWAY if stream_id:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} belongs on stream 0")
            case frames.SETTINGS:
                self._control.on_settings(flags, payload)
            case frames.PING:
                self._control.on_ping(flags, payload)
            case frames.GOAWAY:
                self._control.on_goaway(payload)
            case frames.PUSH_PROMISE | frames.CONTINUATION:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} out of place")
            case _:
                self._allowance.spend(IDLE_FRAME, "unknown frame")

    def _rst_stream(self, stream_id: int, payload: bytes) -> None:
        """RST_STREAM (RFC 9113 6.4). Free after an answer, which is how Envoy ends a stream by default."""
        if len(payload) != 4:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM without 4 bytes")
        stream = self._open.get(stream_id)
        if stream is None:
            if not stream_id:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on stream 0")
            judge(self._streams.life(stream_id), frames.RST_STREAM, stream_id)
            self._allowance.spend(SMALL_FRAME, "RST_STREAM on a closed stream")
            return
        if not stream.answered:
            self._allowance.spend(IDLE_FRAME, "RST_STREAM before the answer")
        self._streams.close(stream_id, Life.RESET_BY_CLIENT)

    def _window_update(self, stream_id: int, payload: bytes) -> None:
        """WINDOW_UPDATE (RFC 9113 6.9)."""
        if len(payload) != 4:
            raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE without 4 bytes")
        increment_bytes = frames.UINT32.unpack(payload)[0] & frames.LARGEST_WINDOW
        queued = self._streams.queued_bytes
        if not stream_id:
            if not increment_bytes:
                raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._sender.widen(increment_bytes)
        elif judge(self._streams.life(stream_id), frames.WINDOW_UPDATE, stream_id) is Action.ACCEPT:
            if not increment_bytes:
                raise Http2StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._sender.widen_stream(self._open[stream_id], increment_bytes)
        if self._streams.queued_bytes == queued:
            self._allowance.spend(SMALL_FRAME, "WINDOW_UPDATE that frees nothing")

    def _priority(self, stream_id: int, payload: bytes) -> None:
        """PRIORITY (RFC 9113 6.3): checked, then ignored."""
        if not stream_id:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        self._allowance.spend(IDLE_FRAME, "PRIORITY")
        if len(payload) != 5:
            raise Http2StreamError(stream_id, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY without 5 bytes")
        if frames.dependency(payload, 0) == stream_id and self._streams.life(stream_id) not in CLOSED:
            raise Http2StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, "stream depends on itself")

    # Errors.

    def _stream_error(self, error: Http2StreamError) -> None:
        if self._streams.life(error.stream_id) is Life.IDLE:  # RST_STREAM must not be sent on an idle stream
            raise Http2ConnectionError(error.code, error.reason) from None
        self._allowance.spend(IDLE_FRAME, "stream errors")
        self._sender.reset(error.stream_id, error.code)

    def _fail(self, error: Http2ConnectionError) -> None:
        self._control.fail(error)
        self._tail = b""
        self._block = None

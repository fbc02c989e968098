"""The ordinary exchange, as Envoy sends thousands a second: a request head seen before, its one message right behind.

It is answered without a Stream; all that is kept until the client ends it are two numbers. Whatever is out of the
ordinary is left to the connection, which reads it as if nobody had looked at it before.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from extproc.transport import frames, messages
from extproc.transport.frames import DATA, END_HEADERS, END_STREAM, HEAD_BYTES, HEADERS, RST_STREAM
from extproc.transport.heads import ORDINARY
from extproc.transport.messages import PREFIX_BYTES
from extproc.transport.states import Life
from extproc.transport.streams import REMEMBERED, Stream

if TYPE_CHECKING:
    from extproc.transport.calls import Answer
    from extproc.transport.heads import HeadReader
    from extproc.transport.limits import Limits
    from extproc.transport.sender import Sender
    from extproc.transport.streams import Streams

_MESSAGE: Final = Struct(">BHBBIBI")
"""Head of a DATA frame (length high and low, type, flags, stream), prefix of a message (compressed, length)."""
_REPLY: Final = len(messages.REPLY_BLOCK).to_bytes(3, "big") + bytes((HEADERS, END_HEADERS))
_END: Final = len(messages.OK_TRAILERS).to_bytes(3, "big") + bytes((HEADERS, END_HEADERS | END_STREAM))
_RESET_BYTES: Final = 4


class Exchanges:
    """Answers ordinary exchanges. `run` does so for as long as nothing else comes."""

    __slots__ = ("_answer", "_behind", "_heads", "_largest_bytes", "_most_streams", "_sender", "_streams")

    def __init__(self, answer: Answer, heads: HeadReader, streams: Streams, sender: Sender, limits: Limits) -> None:
        self._answer = answer
        self._heads = heads
        self._streams = streams
        self._sender = sender
        self._most_streams = limits.max_concurrent_streams
        self._largest_bytes = min(limits.max_message_bytes, frames.DEFAULT_FRAME_BYTES - PREFIX_BYTES)
        self._behind: dict[int, tuple[bytes, bytes]] = {}
        """By the size of a reply: what stands between the two stream numbers, and behind the second."""

    def run(self, data: bytes, place: int, credit: int) -> tuple[int, int, int]:  # noqa: C901, PLR0912, PLR0915  the hot loop
        """Answers from `place` on; of the connection's window `credit` bytes may be used.

        Returns the place of the first frame that was not dealt with, the credit used, and the number of answers.
        """
        streams, sender = self._streams, self._sender
        brief, closed = streams.brief, streams.closed
        head, answer, parts = self._heads.known.get, self._answer, sender.parts
        most = self._most_streams - len(streams.open)
        last_id, spare, answers, end = streams.last_id, credit, 0, len(data)
        unpack_head, unpack_message = frames.FRAME_HEAD.unpack_from, _MESSAGE.unpack_from
        while end - place >= HEAD_BYTES:
            high, low, kind, flags, stream_id = unpack_head(data, place)
            begin = place + HEAD_BYTES
            if kind == HEADERS:
                stop = begin + low
                if end - stop < _MESSAGE.size or high or flags != END_HEADERS or head(data[begin:stop]) is not ORDINARY:
                    break
                high, low, kind, flags, number, compressed, size = unpack_message(data, stop)
                begin = stop + _MESSAGE.size
                stop = begin + size
                if (
                    (kind | high | flags | compressed)
                    or not last_id < stream_id == number <= frames.LARGEST_STREAM_ID
                    or low != size + PREFIX_BYTES
                    or size > self._largest_bytes
                    or stop > end
                    or low > spare
                    or len(brief) >= most
                    or not stream_id & 1
                ):
                    break
                try:
                    reply = answer(data[begin:stop])
                except Exception:  # noqa: BLE001  the connection asks again, and says what went wrong
                    break
                last_id = stream_id
                spare -= low
                answers += 1
                sent = len(reply) + PREFIX_BYTES
                if sent > sender.window or sent > sender.initial_window or sent > sender.max_frame:
                    streams.last_id = last_id
                    most -= 1
                    self._reply_slowly(stream_id, low, reply)
                else:
                    sender.window -= sent
                    between, behind = self._behind.get(sent) or self._shape(sent)
                    number = data[begin - PREFIX_BYTES - 4 : begin - PREFIX_BYTES]
                    parts += (_REPLY, number, between, number, behind, reply)
                    brief[stream_id] = low, sent
                place = stop
            elif stream_id not in brief:
                break
            else:
                if kind == DATA and flags == END_STREAM and not (low or high):
                    life = Life.ENDED
                    parts += (_END, data[place + 5 : begin], messages.OK_TRAILERS)
                elif kind == RST_STREAM and low == _RESET_BYTES <= end - begin and not high:
                    life = Life.RESET_BY_CLIENT
                else:
                    break
                del brief[stream_id]
                if len(closed) >= REMEMBERED:
                    closed = streams.forget()
                closed[stream_id] = life
                place = begin + low
        streams.last_id = last_id
        return place, credit - spare, answers

    def unfold(self, stream_id: int) -> None:
        """Makes a Stream of an exchange that turns out not to be ordinary."""
        received, sent = self._streams.brief.pop(stream_id)
        self._open(stream_id, received, sent).answered = True

    def _reply_slowly(self, stream_id: int, received: int, reply: bytes) -> None:
        """A reply that some window does not allow yet."""
        self._sender.reply(self._open(stream_id, received, 0), reply)

    def _open(self, stream_id: int, received: int, sent: int) -> Stream:
        stream = Stream(stream_id, ORDINARY, self._sender.initial_window - sent, frames.DEFAULT_WINDOW - received)
        stream.received = received
        stream.messages = 1
        self._streams.open[stream_id] = stream
        return stream

    def _shape(self, sent: int) -> tuple[bytes, bytes]:
        """For a reply of that many bytes, prefix included."""
        shape = (
            messages.REPLY_BLOCK + sent.to_bytes(3, "big") + bytes((DATA, 0)),
            b"\x00" + (sent - PREFIX_BYTES).to_bytes(4, "big"),
        )
        self._behind[sent] = shape
        return shape

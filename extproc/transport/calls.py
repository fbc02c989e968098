"""What each call is answered: ext_proc Process, health Check and Watch, and everything this server does not know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from extproc.transport import messages
from extproc.transport.heads import Call
from extproc.transport.messages import PREFIX_BYTES, Serving

if TYPE_CHECKING:
    from extproc.transport.limits import Limits
    from extproc.transport.sender import Sender
    from extproc.transport.streams import Stream, Streams

Answer = Callable[[bytes], bytes]
"""One serialized ProcessingRequest -> one serialized ProcessingResponse."""

log = logging.getLogger(__name__)


class Calls:
    """Turns the messages of streams into replies. Knows gRPC, not HTTP/2."""

    __slots__ = ("_answer", "_limits", "_sender", "_serving", "_streams", "answered")

    def __init__(
        self, answer: Answer, serving: Callable[[], bool], streams: Streams, sender: Sender, limits: Limits
    ) -> None:
        self._answer = answer
        self._serving = serving
        self._sender = sender
        self._limits = limits
        self._streams = streams
        self.answered = 0
        """Messages answered since the connection last took the count."""

    def begin(self, stream: Stream) -> None:
        """A new request; gRPC calls nobody serves are answered at once, other requests when they are complete."""
        if stream.call is Call.UNKNOWN_METHOD:
            self._sender.finish(stream, messages.UNKNOWN_METHOD)

    def process(self, stream: Stream, message: bytes) -> None:
        """One whole message of a Process stream."""
        stream.messages += 1
        self.answered += 1
        try:
            reply = self._answer(message)
        except Exception:  # `answer` promises not to raise; a broken promise must cost one stream, not the connection
            log.exception("the answer to an ext_proc message failed")
            self._sender.finish(stream, messages.ANSWER_FAILED)
            return
        self._sender.reply(stream, reply)

    def body(self, stream: Stream, data: bytes) -> None:
        """A piece of a request body, of any length, in any call."""
        if stream.call in (Call.NOT_GRPC, Call.NOT_POST) or stream.end_block is not None:
            return
        if stream.partial is None:
            stream.partial = bytearray()
        partial = stream.partial
        partial += data
        self._streams.partial_bytes += len(data)
        place = 0
        while stream.end_block is None and len(partial) - place >= PREFIX_BYTES:
            size = int.from_bytes(partial[place + 1 : place + PREFIX_BYTES], "big")
            if fault := self._prefix_fault(partial[place], size):
                self._streams.drop_partial(stream)
                self._sender.finish(stream, fault)
                return
            begin, place_after = place + PREFIX_BYTES, place + PREFIX_BYTES + size
            if place_after > len(partial):
                break
            place = place_after
            self._message(stream, bytes(partial[begin:place]))
        self._keep(stream, partial, place)

    def client_done(self, stream: Stream) -> None:
        """The request is complete."""
        if stream.end_block is not None:
            return
        if stream.call is Call.PROCESS and stream.partial is None:
            self._sender.finish(stream, messages.OK_TRAILERS)
            return
        cut_short = bool(stream.partial)
        self._streams.drop_partial(stream)
        match stream.call:
            case Call.NOT_GRPC:
                self._sender.http_answer(stream, 415)
            case Call.NOT_POST:
                self._sender.http_answer(stream, 405)
            case _ if cut_short:
                self._sender.finish(stream, messages.CUT_SHORT)
            case Call.CHECK | Call.WATCH if stream.messages != 1:
                self._sender.finish(stream, messages.NOT_ONE_MESSAGE)
            case Call.CHECK:
                self._sender.finish(stream, messages.OK_TRAILERS)

    def tell_watchers(self) -> None:
        """Sends every watcher whose status changed the new one."""
        status = Serving.SERVING if self._serving() else Serving.NOT_SERVING
        for stream in list(self._streams.watchers.values()):
            if stream.status not in (status, Serving.SERVICE_UNKNOWN):
                stream.status = status
                self._sender.reply(stream, messages.health_reply(status))

    def end_watchers(self) -> None:
        """Tells every watcher that the server is going, and ends its call."""
        for stream in list(self._streams.watchers.values()):
            self._sender.reply(stream, messages.health_reply(Serving.NOT_SERVING))
            self._sender.finish(stream, messages.SHUTTING_DOWN)

    def _prefix_fault(self, flag: int, size: int) -> bytes:
        if flag:
            return messages.COMPRESSED if flag == 1 else messages.BAD_FLAG
        return messages.TOO_LARGE if size > self._limits.max_message_bytes else b""

    def _keep(self, stream: Stream, partial: bytearray, consumed: int) -> None:
        if stream.partial is not partial:  # the stream ended while its messages were read
            return
        del partial[:consumed]
        self._streams.partial_bytes -= consumed
        if not partial or stream.end_block is not None:
            self._streams.drop_partial(stream)
        elif self._streams.partial_bytes > self._limits.partial_bytes:
            self._streams.drop_partial(stream)
            self._sender.finish(stream, messages.TOO_MUCH)

    def _message(self, stream: Stream, message: bytes) -> None:
        if stream.call is Call.PROCESS:
            self.process(stream, message)
            return
        stream.messages += 1
        self.answered += 1
        service = messages.health_service(message)
        if service is None:
            self._sender.finish(stream, messages.BAD_REQUEST)
        elif stream.messages > 1:
            self._sender.finish(stream, messages.NOT_ONE_MESSAGE)
        elif stream.call is Call.WATCH:
            self._watch(stream, known=service in messages.HEALTH_SERVICES)
        elif service in messages.HEALTH_SERVICES:
            stream.status = Serving.SERVING if self._serving() else Serving.NOT_SERVING
            self._sender.reply(stream, messages.health_reply(Serving(stream.status)))
        else:
            self._sender.finish(stream, messages.UNKNOWN_SERVICE)

    def _watch(self, stream: Stream, *, known: bool) -> None:
        status = Serving.SERVING if self._serving() else Serving.NOT_SERVING
        stream.status = status if known else Serving.SERVICE_UNKNOWN
        self._streams.watchers[stream.id] = stream
        self._sender.reply(stream, messages.health_reply(Serving(stream.status)))

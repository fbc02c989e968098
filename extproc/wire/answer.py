"""bytes -> bytes: one serialized ProcessingRequest in, one serialized ProcessingResponse out, whatever it holds."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from extproc.core.decision import decide
from extproc.core.request import Request
from extproc.core.ruleset import Ruleset
from extproc.wire.ext_proc_pb2 import ProcessingRequest

_pack_hash = struct.Struct("<d").pack


@dataclass(frozen=True, slots=True)
class Published:
    """What answers requests: a ruleset, the reply to each of its choices, and how often each was given.

    `replies[choice.index]` and `counts[choice.index]`; `other_phases` holds replies by the name of the phase.
    The counts are the only thing that changes, from the one loop that answers.
    """

    ruleset: Ruleset
    replies: Sequence[bytes]
    other_phases: Mapping[str, bytes]
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Starts the counts at zero."""
        self.counts.extend([0] * (len(self.replies) - len(self.counts)))


def read_request(message: ProcessingRequest) -> Request:
    """The headers of a ProcessingRequest in its request_headers phase."""
    headers: dict[bytes, bytes] = {}
    repeated: dict[bytes, list[bytes]] | None = None
    for header in message.request_headers.headers.headers:
        name = header.key
        value = header.raw_value or header.value
        if name in headers:
            repeated = {} if repeated is None else repeated
            repeated.setdefault(name, [headers[name]]).append(value)
        else:
            headers[name] = value
    return Request(headers) if repeated is None else Request(headers, repeated)


class Answerer:
    """Answers with what was published last. Publishing is the assignment of `published`; no lock, no wait."""

    def __init__(self, published: Published) -> None:
        self.published = published

    def __call__(self, message: bytes) -> bytes:
        """The reply to one serialized ProcessingRequest. Never raises: what is unreadable gets stable, ERROR."""
        published = self.published
        try:
            request = ProcessingRequest.FromString(message)
        except DecodeError:
            return self._error(published)
        phase = request.WhichOneof("phase")
        if phase != "request_headers":
            other = published.other_phases.get(phase or "")
            return self._error(published) if other is None else other
        choice, unit_hash = decide(published.ruleset, read_request(request))
        published.counts[choice.index] += 1
        reply = published.replies[choice.index]
        return reply if unit_hash is None else reply + _pack_hash(unit_hash)

    @staticmethod
    def _error(published: Published) -> bytes:
        index = published.ruleset.error.index
        published.counts[index] += 1
        return published.replies[index]

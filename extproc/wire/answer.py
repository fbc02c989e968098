"""bytes -> bytes: one serialized ProcessingRequest in, one serialized ProcessingResponse out, whatever it holds."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from extproc.core.decision import decide, unit_bytes
from extproc.core.request import NOTHING, Request
from extproc.core.ruleset import Ruleset
from extproc.wire.ext_proc_pb2 import HeaderValue, ProcessingRequest

_pack_hash = struct.Struct("<d").pack


@dataclass(frozen=True, slots=True)
class Published:
    """What answers requests: a ruleset, the reply to each of its choices, and what is said to other phases.

    `replies[choice.index]` is the reply to a choice; `other_phases` holds replies by the name of the phase.
    """

    ruleset: Ruleset
    replies: Sequence[bytes]
    other_phases: Mapping[str, bytes]


def read_headers(entries: Iterable[bytes]) -> Request:
    """The request of these serialized HeaderValues. Raises DecodeError.

    Nearly all are `key` and `raw_value` with a length of one byte each, and are cut here; the rest is parsed.
    """
    headers: dict[bytes, bytes] = {}
    repeated: dict[bytes, list[bytes]] | None = None
    for entry in entries:
        try:
            stop = entry[1] + 2
            if stop < _LONG and entry[0] == _KEY and entry[stop] == _RAW and entry[stop + 1] == len(entry) - stop - 2:
                name, value = entry[2:stop], entry[stop + 2 :]
            else:
                name, value = _parse_header(entry)
        except IndexError:
            name, value = _parse_header(entry)
        if name in headers:
            repeated = {} if repeated is None else repeated
            repeated.setdefault(name, [headers[name]]).append(value)
        else:
            headers[name] = value
    return Request(headers, NOTHING if repeated is None else repeated)


_KEY, _RAW, _LONG = 1 << 3 | 2, 3 << 3 | 2, 0x80 + 2
"""Tags of `key` and `raw_value`; what ends here has a length of more than one byte."""


def _parse_header(entry: bytes) -> tuple[bytes, bytes]:
    header = HeaderValue.FromString(entry)
    return header.key, header.raw_value or header.value


_parse = ProcessingRequest.FromString


class Answerer:
    """Answers with what was published last. Publishing is the assignment of `published`; no lock, no wait.

    `counts` says how often each choice was given, by its index; `seen` has an entry per hashed unit, the choice's index
    above the 32 bits of the hash. Whoever reads them puts new ones in their place, and does so before publishing.
    Units whose hash is in `named` are kept in `names` as they came.
    """

    def __init__(self, published: Published) -> None:
        self.published = published
        self.counts: dict[int, int] = {}
        self.seen: list[int] = []
        self.named: frozenset[int] = frozenset()
        self.names: dict[int, bytes] = {}

    def __call__(self, message: bytes) -> bytes:
        """The reply to one serialized ProcessingRequest. Never raises: what is unreadable gets stable, ERROR."""
        published = self.published
        try:
            request = _parse(message)
            entries = request.request_headers.headers.headers[:]
            if not entries and (phase := request.WhichOneof("phase")) != "request_headers":
                return published.other_phases.get(phase or "") or self._error(published)
            headers = read_headers(entries)
        except DecodeError:
            return self._error(published)
        choice, unit_hash = decide(published.ruleset, headers)
        index = choice.index
        self.counts[index] = self.counts.get(index, 0) + 1
        if unit_hash is None:
            return published.replies[index]
        self.seen.append(index << 32 | unit_hash)
        if unit_hash in self.named and unit_hash not in self.names:
            self.names[unit_hash] = unit_bytes(published.ruleset, headers)
        return published.replies[index] + _pack_hash(unit_hash)

    def _error(self, published: Published) -> bytes:
        index = published.ruleset.error.index
        self.counts[index] = self.counts.get(index, 0) + 1
        return published.replies[index]

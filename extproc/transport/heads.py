"""Header blocks in, request heads out: HPACK (RFC 7541) and the rules for header fields (RFC 9113 section 8).

A block is first decoded, whatever becomes of its stream, because decoding changes the table that later blocks refer to.
Only what cannot be decoded is a connection error; what decodes and breaks a rule is a fault of its stream.

Once a gRPC peer has acknowledged SETTINGS_HEADER_TABLE_SIZE 0 and shrunk its table, a block means the same each time,
so one seen before is looked up instead of decoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from hpack import Decoder, HPACKError, OversizedHeaderListError

from extproc.transport.errors import ErrorCode, Http2ConnectionError

CACHED_BLOCKS: Final = 256
CACHED_BLOCK_BYTES: Final = 1024


class Call(Enum):
    """What a request asks for."""

    PROCESS = auto()
    CHECK = auto()
    WATCH = auto()
    UNKNOWN_METHOD = auto()
    NOT_GRPC = auto()
    """Wrong content-type: HTTP 415."""
    NOT_POST = auto()
    """gRPC content-type with another method than POST: HTTP 405."""


_CALLS: Final = {
    b"/envoy.service.ext_proc.v3.ExternalProcessor/Process": Call.PROCESS,
    b"/grpc.health.v1.Health/Check": Call.CHECK,
    b"/grpc.health.v1.Health/Watch": Call.WATCH,
}


@dataclass(frozen=True, slots=True)
class Head:
    """A request's header fields as far as anything depends on them."""

    call: Call
    content_length: int = -1
    """Bytes that the body must have, -1 if not said."""
    without_body: bool = False
    """A HEAD request: its answer has no body."""
    fault: str = ""
    """Why the request is malformed (RFC 9113 8.1.1), "" if it is not."""


ORDINARY: Final = Head(Call.PROCESS)
"""The one head that nearly all requests have; compare with `is`."""

# RFC 9113 8.2.1; a colon is only allowed as the first character, of pseudo-header fields.
_BAD_NAME: Final = re.compile(rb"[\x00-\x20A-Z\x7f-\xff:]")
_BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]$")
_CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_GRPC_TYPE: Final = re.compile(rb"application/grpc(\+proto)?\s*(;|$)", re.IGNORECASE)


class HeadReader:
    """Decodes the header blocks of one connection."""

    __slots__ = ("_decoder", "_stateless", "known")

    def __init__(self, max_header_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=max_header_bytes)
        self.known: dict[bytes, Head] = {}
        """Heads by blocks that mean the same each time."""
        self._stateless = False

    def table_size_zero_acknowledged(self) -> None:
        """From now on a block must begin by giving up the dynamic table, unless that was done (RFC 9113 4.3.1)."""
        self._decoder.max_allowed_table_size = 0

    def request(self, block: bytes) -> Head:
        """The head of a new request. Raises Http2ConnectionError(COMPRESSION_ERROR or ENHANCE_YOUR_CALM)."""
        head = self.known.get(block)  # empty until the peer's table is gone
        if head is not None:
            return head
        head = _head(self._decode(block))
        if self._stateless and len(block) <= CACHED_BLOCK_BYTES:
            if len(self.known) >= CACHED_BLOCKS:
                self.known.clear()  # a peer whose blocks differ each time gains nothing from any order of eviction
            self.known[block] = head
        return head

    def trailers(self, block: bytes) -> str:
        """What is wrong with request trailers, "" if nothing. Raises as `request`."""
        for name, value in self._decode(block):
            if name.startswith(b":"):
                return "pseudo-header field in trailers"
            if fault := _field_fault(name, value):
                return fault
        return ""

    def _decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        try:
            fields = [(bytes(field[0]), bytes(field[1])) for field in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError:
            raise Http2ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, "header list too large") from None
        except (HPACKError, IndexError, ValueError) as error:
            raise Http2ConnectionError(ErrorCode.COMPRESSION_ERROR, f"header block: {type(error).__name__}") from None
        self._stateless = self._decoder.max_allowed_table_size == 0 == self._decoder.header_table_size
        return fields


def _head(fields: list[tuple[bytes, bytes]]) -> Head:
    pseudo: dict[bytes, bytes] = {}
    regular: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if name not in _PSEUDO or name in pseudo or regular:
                return Head(Call.NOT_GRPC, fault="pseudo-header field unknown, repeated, or after a header field")
            pseudo[name] = value
            name = name[1:]  # noqa: PLW2901  the rest of the name obeys the rules of every name
        elif name == b"content-length" and regular.get(name, value) != value:
            return Head(Call.NOT_GRPC, fault="two content-lengths that differ")
        else:
            regular[name] = value
        if fault := _field_fault(name, value):
            return Head(Call.NOT_GRPC, fault=fault)
    return _classify(pseudo, regular)


def _classify(pseudo: dict[bytes, bytes], regular: dict[bytes, bytes]) -> Head:
    method = pseudo.get(b":method", b"")
    length = regular.get(b"content-length", b"")
    if fault := _pseudo_fault(pseudo, method):
        return Head(Call.NOT_GRPC, fault=fault)
    if length and not (length.isdigit() and len(length) < 19):
        return Head(Call.NOT_GRPC, fault="content-length is not a number")
    call = _CALLS.get(pseudo.get(b":path", b""), Call.UNKNOWN_METHOD)
    if not _GRPC_TYPE.match(regular.get(b"content-type", b"")):
        call = Call.NOT_GRPC
    elif method != b"POST":
        call = Call.NOT_POST
    if call is Call.PROCESS and not length:
        return ORDINARY
    return Head(call, content_length=int(length) if length else -1, without_body=method == b"HEAD")


def _pseudo_fault(pseudo: dict[bytes, bytes], method: bytes) -> str:
    if method == b"CONNECT":  # RFC 9113 8.5
        return "" if pseudo.keys() == {b":method", b":authority"} else "CONNECT takes :method and :authority"
    if not (method and pseudo.get(b":scheme") and pseudo.get(b":path")):
        return ":method, :scheme and :path must be there and not empty"
    return ""


def _field_fault(name: bytes, value: bytes) -> str:
    if not name or _BAD_NAME.search(name):
        return "a character that header names must not have"
    if _BAD_VALUE.search(value):
        return "a character that header values must not have"
    if name in _CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
        return "a connection-specific header field"
    return ""

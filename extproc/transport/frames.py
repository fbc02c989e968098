"""The layout of HTTP/2 frames (RFC 9113 sections 4 and 6): numbers, builders of bytes, and the parts frames share.

Plain ints instead of enums: these are compared for every frame of every request.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from extproc.transport.errors import ErrorCode, Http2ConnectionError

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

ACK: Final = 0x1  # SETTINGS, PING
END_STREAM: Final = 0x1  # DATA, HEADERS
END_HEADERS: Final = 0x4  # HEADERS, CONTINUATION
PADDED: Final = 0x8  # DATA, HEADERS
PRIORITIZED: Final = 0x20  # HEADERS

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

HEAD_BYTES: Final = 9
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384  # also the largest frame we accept: we never announce another
LARGEST_FRAME_BYTES: Final = 16_777_215
LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_STREAM_ID: Final = 2**31 - 1

FRAME_HEAD: Final = Struct(">BHBBI")  # length (high 8, low 16), type, flags, stream identifier
SETTING: Final = Struct(">HI")
UINT32: Final = Struct(">I")
TWO_UINT32: Final = Struct(">II")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame. `payload` must not be longer than the peer accepts."""
    size = len(payload)
    return FRAME_HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    """A SETTINGS frame of (identifier, value) pairs."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(name, value) for name, value in values))


def window_update(stream_id: int, increment_bytes: int) -> bytes:
    """A WINDOW_UPDATE for a stream, or for the connection (stream 0)."""
    return frame(WINDOW_UPDATE, 0, stream_id, UINT32.pack(increment_bytes))


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    """The end of one stream by force."""
    return frame(RST_STREAM, 0, stream_id, UINT32.pack(code))


def goaway(last_stream_id: int, code: ErrorCode, reason: str = "") -> bytes:
    """The announcement that streams above `last_stream_id` are not served; `reason` is for whoever debugs the peer."""
    return frame(GOAWAY, 0, 0, TWO_UINT32.pack(last_stream_id, code) + reason.encode("ascii", "replace"))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def unpadded(data: bytes, begin: int, stop: int) -> tuple[int, int]:
    """Where the content of a padded frame begins and stops (RFC 9113 6.1)."""
    if begin == stop:
        raise Http2ConnectionError(ErrorCode.FRAME_SIZE_ERROR, "padded frame without a length of padding")
    if data[begin] >= stop - begin:
        raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, "more padding than frame")
    return begin + 1, stop - data[begin]


def dependency(payload: bytes, begin: int) -> int:
    """The stream that priority fields name."""
    number: int = UINT32.unpack_from(payload, begin)[0]
    return number & 0x7FFFFFFF

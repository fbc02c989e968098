"""gRPC over HTTP/2 as constant bytes: header blocks of our answers, message framing, and the health messages.

No block uses the dynamic table, so each one is right whatever the peer's table holds. Plain strings instead of Huffman
codes: a few bytes more, but the peer need not decode them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

PREFIX_BYTES: Final = 5  # compressed flag (1), length (4, big endian)


class GrpcStatus(IntEnum):
    """The status codes this server sends."""

    OK = 0
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Serving(IntEnum):
    """grpc.health.v1.HealthCheckResponse.ServingStatus."""

    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


HEALTH_SERVICES: Final = frozenset({b"", b"envoy.service.ext_proc.v3.ExternalProcessor", b"perch"})


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing, new name (RFC 7541 6.2.2); both strings shorter than 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


_STATUS_200: Final = b"\x88"  # indexed field 8 of the static table
_CONTENT_TYPE: Final = b"\x0f\x10"  # literal without indexing, name 31 of the static table
_GRPC: Final = b"\x10application/grpc"

REPLY_BLOCK: Final = _STATUS_200 + _CONTENT_TYPE + _GRPC


def trailers(status: GrpcStatus, message: str = "") -> bytes:
    """The header block that ends a gRPC answer. `message` is plain ASCII without `%`."""
    block = _literal(b"grpc-status", str(int(status)).encode())
    return block + _literal(b"grpc-message", message.encode()) if message else block


OK_TRAILERS: Final = trailers(GrpcStatus.OK)
COMPRESSED: Final = _literal(b"grpc-accept-encoding", b"identity") + trailers(
    GrpcStatus.UNIMPLEMENTED, "compressed messages are not supported"
)
TOO_LARGE: Final = trailers(GrpcStatus.RESOURCE_EXHAUSTED, "the message is larger than this server accepts")
TOO_MUCH: Final = trailers(GrpcStatus.RESOURCE_EXHAUSTED, "too many unfinished messages on this connection")
UNKNOWN_METHOD: Final = trailers(GrpcStatus.UNIMPLEMENTED, "this server knows ext_proc Process and health only")
UNKNOWN_SERVICE: Final = trailers(GrpcStatus.NOT_FOUND, "unknown service")
CUT_SHORT: Final = trailers(GrpcStatus.INTERNAL, "the request ended within a message")
NOT_ONE_MESSAGE: Final = trailers(GrpcStatus.INTERNAL, "this method takes exactly one message")
BAD_FLAG: Final = trailers(GrpcStatus.INTERNAL, "the message has an unknown compression flag")
BAD_REQUEST: Final = trailers(GrpcStatus.INTERNAL, "the health request cannot be decoded")
ANSWER_FAILED: Final = trailers(GrpcStatus.INTERNAL, "the answer failed; see the server's log")
SHUTTING_DOWN: Final = trailers(GrpcStatus.UNAVAILABLE, "the server is shutting down")

NOT_GRPC_BODY: Final = b"perch speaks gRPC only: POST with content-type application/grpc\n"


def http_block(status: int) -> bytes:
    """The header block of an answer to a request that is not gRPC; the body is NOT_GRPC_BODY."""
    return (
        b"\x08\x03" + str(status).encode()  # literal without indexing, name 8 of the static table
        + _CONTENT_TYPE + b"\x0atext/plain"
        + b"\x0f\x0d" + bytes((len(str(len(NOT_GRPC_BODY))),)) + str(len(NOT_GRPC_BODY)).encode()  # content-length
    )  # fmt: skip


def message(payload: bytes) -> bytes:
    """An uncompressed gRPC message with its prefix."""
    return b"\x00" + len(payload).to_bytes(4, "big") + payload


def health_reply(status: Serving) -> bytes:
    """grpc.health.v1.HealthCheckResponse {status}: field 1, varint."""
    return b"\x08" + bytes((status,))


def health_service(request: bytes) -> bytes | None:
    """`service` (field 1) of a grpc.health.v1.HealthCheckRequest, b"" when unset, None when it cannot be decoded."""
    service, place = b"", 0
    while place < len(request):
        key, place = _varint(request, place)
        field, wire_type = key >> 3, key & 7
        match wire_type:
            case 0:
                _, place = _varint(request, place)
                size = 0
            case 1:
                size = 8
            case 2:
                size, place = _varint(request, place)
            case 5:
                size = 4
            case _:
                return None
        if field == 0 or place < 0 or place + size > len(request):
            return None
        if (field, wire_type) == (1, 2):
            service = request[place : place + size]
        place += size
    return service


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(value, place after it); the place is negative when the number is cut short or too long."""
    value = 0
    for shift in range(0, 70, 7):
        if not 0 <= place < len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    return 0, -(2**40)

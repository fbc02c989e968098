"""bytes -> request: one serialized ProcessingRequest of Envoy in, its headers out."""

from collections.abc import Iterable

from extproc.core.request import NOTHING, Request
from extproc.wire.ext_proc_pb2 import HeaderValue, ProcessingRequest

_KEY, _RAW = 1 << 3 | 2, 3 << 3 | 2
"""The tags of `key` and `raw_value` in a HeaderValue."""
_LONG = 0x80
"""A length from here on takes more than one byte."""
_parse = ProcessingRequest.FromString


def read_request(message: bytes) -> Request | str:
    """The headers of a message in its request_headers phase, else the name of its phase, "" for none.

    Raises google.protobuf.message.DecodeError.
    """
    parsed = _parse(message)
    entries = parsed.request_headers.headers.headers[:]
    if not entries and (phase := parsed.WhichOneof("phase")) != "request_headers":
        return phase or ""
    return read_headers(entries)


def read_headers(entries: Iterable[bytes]) -> Request:
    """The request of these serialized HeaderValues. Raises DecodeError.

    Nearly all are `key` and `raw_value` with a length of one byte each, and are cut here; the rest is parsed.
    """
    headers: dict[bytes, bytes] = {}
    repeated: dict[bytes, list[bytes]] | None = None
    for entry in entries:
        try:
            size = entry[1]
            stop = size + 2
            if size < _LONG and entry[0] == _KEY and entry[stop] == _RAW and entry[stop + 1] == len(entry) - stop - 2:
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


def _parse_header(entry: bytes) -> tuple[bytes, bytes]:
    header = HeaderValue.FromString(entry)
    return header.key, header.raw_value or header.value


def value_tag(header: bytes) -> bytes:
    """What stands before the length and the bytes of this header's value in a message. The name is below 128 bytes."""
    return bytes((_KEY, len(header))) + header + bytes((_RAW,))

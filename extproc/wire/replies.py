"""Decision to bytes: the reply to each choice, serialized when a ruleset is made and not when a request comes.

The messages are envoy-data-plane's. A reply is two halves: how the headers change (two messages in all, one per cohort)
and the metadata, whose entries are serialized one by one and joined: in protobuf, joined bytes are merged messages. So
a ruleset of 10,000 flags is ready in a second, where building each reply whole would take a quarter of a minute.
"""

import functools
import struct
from collections.abc import Iterable

from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption, HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ProcessingResponse,
    TrailersResponse,
)
from envoy_data_plane.google.protobuf import Struct, Value

from extproc.core.flags import Arm
from extproc.core.ruleset import Choice, Reason

NAMESPACE = "perch"
COHORT_HEADER = "x-model-cohort"
HASHED = (Reason.SPLIT, Reason.RULE_SPLIT)
"""Reasons whose replies end in a slot for the unit's hash."""

_SLOT = struct.pack("<d", 1.0)

OTHER_PHASES = {
    "response_headers": bytes(ProcessingResponse(response_headers=HeadersResponse())),
    "request_body": bytes(ProcessingResponse(request_body=BodyResponse())),
    "response_body": bytes(ProcessingResponse(response_body=BodyResponse())),
    "request_trailers": bytes(ProcessingResponse(request_trailers=TrailersResponse())),
    "response_trailers": bytes(ProcessingResponse(response_trailers=TrailersResponse())),
}
"""Replies that change nothing, for the phases that perch's own Envoy configuration never sends."""


def reply(choice: Choice, version: str) -> bytes:
    """The serialized ProcessingResponse for a choice.

    For a choice with a hash (reason in HASHED) the last 8 bytes are missing: the caller appends the hash as a
    little-endian double. Everything else is complete.
    """
    hashed = choice.reason in HASHED
    metadata = (
        _text_entries(flag=choice.flag, model=choice.model)
        + _text_entries(cohort=choice.cohort.value, reason=choice.reason.value, rule=choice.rule)
        + _text_entries(version=version)
        + (_hash_entry() if hashed else b"")
    )
    whole = _header_change(choice.cohort) + _dynamic_metadata(metadata)
    return whole[: -len(_SLOT)] if hashed else whole


def replies(choices: Iterable[Choice], version: str) -> list[bytes]:
    """One reply per choice, in their order."""
    return [reply(choice, version) for choice in choices]


@functools.cache
def _header_change(cohort: Arm) -> bytes:
    """Sets the routing header and has Envoy pick the route again.

    `raw_value`, because Envoy ignores `value` here and would set an empty header.
    """
    option = HeaderValueOption(
        header=HeaderValue(key=COHORT_HEADER, raw_value=cohort.value.encode()),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    change = CommonResponse(header_mutation=HeaderMutation(set_headers=[option]), clear_route_cache=True)
    return bytes(ProcessingResponse(request_headers=HeadersResponse(response=change)))


@functools.lru_cache(maxsize=65536)
def _text_entries(**texts: str) -> bytes:
    """Metadata entries of those texts that are not empty."""
    return bytes(Struct(fields={key: Value(string_value=text) for key, text in texts.items() if text}))


@functools.cache
def _hash_entry() -> bytes:
    """`hash` with a number in its slot: the last 8 bytes, which a test holds true for the serializer in use."""
    return bytes(Struct(fields={"hash": Value(number_value=struct.unpack("<d", _SLOT)[0])}))


def _dynamic_metadata(entries: bytes) -> bytes:
    """The field `dynamic_metadata` = {perch: {entries}}, its three levels wrapped around serialized entries."""
    value = _field(5, entries)  # Value.struct_value
    entry = _field(1, NAMESPACE.encode()) + _field(2, value)  # the key and value of a map entry
    return _field(8, _field(1, entry))  # ProcessingResponse.dynamic_metadata, Struct.fields


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field. Source: protobuf.dev/programming-guides/encoding."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


_SHORT = [bytes([number]) for number in range(0x80)]


def _varint(number: int) -> bytes:
    if number < len(_SHORT):
        return _SHORT[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)

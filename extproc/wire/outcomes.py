"""bytes -> outcomes: one serialized StreamAccessLogsMessage of Envoy in, what became of its requests out.

Little of an entry differs from one request to the next, so most parts are looked up by their bytes and parsed once: the
lookups are bounded, and what is not found is parsed as the proto says, in whatever order its fields come.
"""

import functools
import struct
from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf.message import DecodeError

from extproc.core.outcomes import Arm, Assignment, Outcome
from extproc.wire.accesslog_pb2 import (
    HTTPAccessLogEntry,
    Metadata,
    ResponseFlags,
    Status,
    StreamAccessLogsMessage,
    Text,
    Value,
)

_ENDED = (0, 6)
"""AccessLogType of an entry written at a request's end: NotSet (older Envoys) and DownstreamEnd."""

_HASH = b"\n\x04hash\x12\t\x11"
"""In metadata: the key `hash`, its value's 9 bytes, a double. The 8 bytes of the double follow."""
_BLANK = bytes(8)
_SOME = struct.pack("<d", 1.0)
_unpack_hash = struct.Struct("<d").unpack_from

_FAILED_OPEN = b"failed_open\x12\x02 \x01"


class UnreadableLogError(ValueError):
    """A message that is no StreamAccessLogsMessage."""


class Batch(NamedTuple):
    """What one message, or a part of it, says.

    `node` is the Envoy's node id and `log_name` the log's name: a stream's first message has them, in others they are
    None and "". `unreadable` is the number of entries that are broken, or tell of no request's end.
    """

    node: str | None
    log_name: str
    outcomes: list[Outcome]
    unreadable: int


def read_outcomes(message: bytes) -> Batch:
    """The whole message at once. Raises UnreadableLogError."""
    return next(read_slices(message, len(message) + 1))


def read_slices(message: bytes, at_most: int) -> Iterator[Batch]:
    """The message in batches of up to `at_most` entries, at least one batch; `node` and `log_name` are in each.

    For a caller that has other things to do in between. Raises UnreadableLogError, before the first batch.
    """
    try:
        parsed = StreamAccessLogsMessage.FromString(message)
    except DecodeError as error:
        raise UnreadableLogError(str(error)) from None
    node, log_name = None, ""
    if parsed.HasField("identifier"):
        node, log_name = _str(parsed.identifier.node.id), _str(parsed.identifier.log_name)
    entries = parsed.http_logs.log_entry
    for start in range(0, max(len(entries), 1), at_most):
        outcomes: list[Outcome] = []
        unreadable = 0
        for entry in entries[start : start + at_most]:
            try:
                outcomes.append(_outcome(entry))
            except (DecodeError, ValueError):
                unreadable += 1
        yield Batch(node, log_name, outcomes, unreadable)


def _outcome(entry: HTTPAccessLogEntry) -> Outcome:
    """One entry's outcome. Raises DecodeError for broken bytes, ValueError for what cannot be."""
    common = entry.common_properties
    response = entry.response
    if common.access_log_type not in _ENDED:
        raise ValueError("not the end of a request")
    start, duration = common.start_time, common.duration
    total_s = duration.seconds + duration.nanos * 1e-9
    start_s = start.seconds
    if start_s <= 0 or total_s < 0:
        raise ValueError("a time that cannot be")
    assignment, unit_hash, model_version = _assigned(common.metadata)
    model, arm, inference = _route(common.route_name)
    served = ""
    for one in common.custom_tags:
        key, value = _text(one)
        if key == "served":
            served = value
        elif key == "model_version":
            model_version = value
    failed_open = False
    for one in common.filter_state_objects:
        failed_open = failed_open or _FAILED_OPEN in one
    predictions, count = "", None
    for one in response.response_headers:
        key, value = _text(one)
        if key == "x-model-prediction":
            predictions = value
        elif key == "x-model-prediction-count":
            count = _count(value)
        elif key == "x-model-version":
            model_version = value
    deadline, idle, aborted = _flags(common.response_flags)
    upstream_ms = None
    if common.time_to_first_upstream_rx_byte:
        sent, received = common.time_to_last_upstream_tx_byte, common.time_to_last_upstream_rx_byte
        upstream_ms = (received.seconds - sent.seconds) * 1e3 + (received.nanos - sent.nanos) * 1e-6
    else:
        served = ""
    return Outcome(
        assignment, unit_hash, model, arm, served, inference, failed_open, _status(response.response_code),
        common.upstream_request_attempt_count, deadline or idle, aborted, upstream_ms, total_s * 1e3, model_version,
        predictions, count, _str(entry.request.request_id), start_s + start.nanos * 1e-9 + total_s,
    )  # fmt: skip


def _assigned(metadata: bytes) -> tuple[Assignment | None, int | None, str]:
    """What perch said, the unit's hash, and the model version of a hidden header ("" for none).

    Metadata of the same decision differs in the hash alone, so what is looked up has it blanked out.
    """
    at = metadata.find(_HASH) + len(_HASH)
    end = at + len(_BLANK)
    if at < len(_HASH) or end > len(metadata):
        return _parse_known(metadata)
    assignment, _, model_version = known = _parse_blank(metadata[:at] + _BLANK + metadata[end:])
    if known[1] is None:
        return _parse(metadata)
    return assignment, _whole(_unpack_hash(metadata, at)[0]), model_version


def _parse(metadata: bytes) -> tuple[Assignment | None, int | None, str]:
    """The same, by the proto."""
    texts: dict[bytes, str] = {}
    unit_hash: int | None = None
    version = ""
    said = False
    for entry in Metadata.FromString(metadata).filter_metadata:
        if entry.key not in (b"perch", b"perch.response"):
            continue
        for one in entry.value.fields:
            field = Value.Entry.FromString(one)
            if entry.key == b"perch.response":
                version = _str(field.value.string_value) if field.key == b"model_version" else version
                continue
            said = True
            if field.key == b"hash":
                unit_hash = _whole(field.value.number_value)
            else:
                texts[field.key] = _str(field.value.string_value)
    if not said:
        return None, None, version
    return Assignment(*(texts.get(name.encode(), "") for name in Assignment._fields)), unit_hash, version


_parse_known = functools.lru_cache(maxsize=4096)(_parse)


@functools.lru_cache(maxsize=32768)
def _parse_blank(blank: bytes) -> tuple[Assignment | None, int | None, str]:
    """Metadata with a blank where the hash seems to be. Its hash is 0 if it is there, and None if it is not."""
    at = blank.find(_HASH) + len(_HASH)
    parsed = _parse(blank)
    other = _parse(blank[:at] + _SOME + blank[at + len(_BLANK) :])
    return parsed if (parsed[1], other[1]) == (0, 1) else (None, None, "")


def _whole(number: float) -> int:
    """A hash as the 32 bits that it is. Raises ValueError."""
    if not 0 <= number <= 0xFFFFFFFF or number != int(number):
        raise ValueError(f"{number} is no hash")
    return int(number)


@functools.lru_cache(maxsize=4096)
def _route(name: bytes) -> tuple[str, str, bool]:
    """The model, the arm and whether it is inference, from a route's name."""
    model, _, kind = _str(name).rpartition(".")
    if kind in (Arm.STABLE, Arm.CANARY):
        return model, Arm(kind), True
    return (model, "", False) if kind == "health" and model != "server" else ("", "", False)


@functools.lru_cache(maxsize=8192)
def _text(entry: bytes) -> tuple[str, str]:
    """An entry of a map of texts."""
    parsed = Text.FromString(entry)
    return _str(parsed.key), _str(parsed.value)


@functools.lru_cache(maxsize=1024)
def _status(code: bytes) -> int:
    return int(Status.FromString(code).value)


@functools.lru_cache(maxsize=1024)
def _flags(flags: bytes) -> tuple[bool, bool, bool]:
    """Whether a deadline ended it, whether silence did, and whether the client went away."""
    parsed = ResponseFlags.FromString(flags)
    return (
        parsed.upstream_request_timeout or parsed.upstream_max_stream_duration_reached or parsed.duration_timeout,
        parsed.stream_idle_timeout,
        parsed.downstream_connection_termination or parsed.downstream_remote_reset,
    )


@functools.lru_cache(maxsize=1024)
def _count(text: str) -> int | None:
    """The number in x-model-prediction-count; None for anything but one to nine digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _str(text: bytes) -> str:
    return text.decode(errors="replace")

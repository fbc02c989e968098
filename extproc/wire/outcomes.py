"""bytes -> outcomes: one serialized StreamAccessLogsMessage of Envoy in, what became of its requests out.

Entries are read many at once, as columns. Little of an entry differs from one request to the next, so most parts are
parsed once and then looked up by their bytes. The lookups are bounded; what is not found there is parsed as the proto
says, in whatever order its fields come.
"""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from extproc.core.outcomes import Arm, Assignment, Outcome
from extproc.wire.accesslog_pb2 import Metadata, ResponseFlags, Status, StreamAccessLogsMessage, Text, Value
from extproc.wire.columns import ColumnReader, Columns

_ENDED = 6
"""AccessLogType.DownstreamEnd: the entry was written at the request's end."""

_HASH = b"\n\x04hash\x12\t\x11"
"""In metadata: the key `hash` and the beginning of its value, whose 8 bytes of a double follow."""
_NO_HASH = 0.5
"""What stands for any hash: no hash has a fraction."""
_BLANK = struct.pack("<d", _NO_HASH)
_unpack_hash = struct.Struct("<d").unpack_from

_new = tuple.__new__  # half the time of calling the class of a named tuple

_LONG_BYTES = 512
"""Of a key that is not kept: whatever names and headers come, the lookups take tens of MB at most."""
_NAME_BYTES = 256
"""What is kept of a node's id and a log's name."""
_K = TypeVar("_K", bound=bytes | tuple[bytes | str, ...])
_V = TypeVar("_V")


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
        node, log_name = (_str(text[:_NAME_BYTES]) for text in (parsed.identifier.node.id, parsed.identifier.log_name))
    entries = parsed.http_logs.log_entry[:]
    for start in range(0, len(entries) or 1, at_most):
        yield Batch(node, log_name, *_read(entries[start : start + at_most]) if entries else ([], 0))


def _read(entries: list[bytes]) -> tuple[list[Outcome], int]:
    """Outcomes, and how many entries have none. Entries are read together, and in halves where one is broken."""
    try:
        return _outcomes(_READER.read(entries))
    except (DecodeError, ValueError):
        if len(entries) == 1:
            return [], 1
    middle = len(entries) // 2
    (first, broken), (second, more) = _read(entries[:middle]), _read(entries[middle:])
    return first + second, broken + more


def _outcomes(columns: Columns) -> tuple[list[Outcome], int]:
    """The outcome of each entry, in one loop: a call for each would take longer than what it does.

    Entries with broken parts, with a time that cannot be, or not of a request's end have none; the second result is how
    many.
    """
    outcomes: list[Outcome] = []
    unreadable = 0
    for (
        began_s, began_ns, lasted_s, lasted_ns, first_s, first_ns, sent_s, sent_ns, received_s, received_ns,
        answered, flags, metadata, route, attempts, request_id, type_, code, tags, headers,
    ) in zip(*columns, strict=True):  # fmt: skip
        total_s = lasted_s + lasted_ns * 1e-9
        if began_s <= 0 or total_s < 0 or type_ != _ENDED:
            unreadable += 1
            continue
        try:
            assignment, unit_hash = _assigned(metadata)
            model, arm, inference = _ROUTES[route]
            served, failed_open, tagged_version = _TAGS[tags]
            predictions, count, model_version = _ANSWERS[headers]
            deadline, stalled, aborted = _FLAGS[flags]
            status = _STATUSES[code]
        except (DecodeError, ValueError):
            unreadable += 1
            continue
        whole = sent_s or sent_ns
        upstream_ms = None
        if received_s or received_ns:
            # From the request's last byte, or from its first where not all of it was sent by then.
            if whole:
                upstream_ms = (received_s - sent_s) * 1e3 + (received_ns - sent_ns) * 1e-6
            else:
                upstream_ms = (received_s - first_s) * 1e3 + (received_ns - first_ns) * 1e-6
            if not upstream_ms > 0:
                upstream_ms = 0.0
        elif not answered:
            served = ""  # the host that was tried last did not answer
        elif status < 500 and not (deadline or aborted):
            status = 0  # an answer that broke off is none
        if stalled and whole:
            deadline = True  # without all of the request the model could not have answered: a stalled upload
        fields = (
            assignment, unit_hash, model, arm, served, inference, failed_open, status, attempts, deadline, aborted,
            upstream_ms, total_s * 1e3, model_version or tagged_version, predictions, count, _str(request_id),
            began_s + began_ns * 1e-9 + total_s,
        )  # fmt: skip
        outcomes.append(_new(Outcome, fields))
    return outcomes, unreadable


class _Known(dict[_K, _V]):
    """What `read` made of a key, kept for up to `most` keys; then it begins anew. A long key is read each time."""

    def __init__(self, read: Callable[[_K], _V], most: int) -> None:
        self._read = read
        self._most = most

    def __missing__(self, key: _K) -> _V:
        value = self._read(key)
        size = len(key)
        if not isinstance(key, bytes):
            size += sum(map(len, key))
        if size <= _LONG_BYTES:
            if len(self) >= self._most:
                self.clear()
            self[key] = value
        return value


def _assigned(metadata: bytes) -> tuple[Assignment | None, int | None]:
    """What perch said, and the unit's hash. Raises DecodeError, ValueError.

    Metadata of the same decision differs in the 8 bytes of the hash, which are cut out of what is looked up; and in the
    order of its 5 to 7 fields, which Envoy's maps draw anew for each request.
    """
    before, _, after = metadata.partition(_HASH)
    if len(after) < 8:
        assignment, number = _WITHOUT_HASH[metadata]
    else:
        assignment, number = _WITH_HASH[before, after[8:]]
        if number == _NO_HASH:
            (number,) = _unpack_hash(after)
        else:  # what looked like the hash is something else
            assignment, number = _parse_metadata(metadata)
    if number is None:
        return assignment, None
    if not (0.0 <= number <= 4294967295.0 and number.is_integer()):
        raise ValueError(f"{number} is no hash")
    return assignment, int(number)


def _parse_around(parts: tuple[bytes, bytes]) -> tuple[Assignment | None, float | None]:
    """Metadata with _NO_HASH where the hash seems to be: if that is the number found, it is there."""
    before, after = parts
    return _parse_metadata(before + _HASH + _BLANK + after)


def _parse_metadata(metadata: bytes) -> tuple[Assignment | None, float | None]:
    """What perch said, and the number in `hash`, if any. Raises DecodeError."""
    said: dict[str, str] = {}
    number: float | None = None
    for entry in Metadata.FromString(metadata).filter_metadata[:]:
        if entry.key == b"perch":
            for one in entry.value.fields[:]:
                name, text, value = _FIELDS[one]
                if name == "hash":
                    number = value
                else:
                    said[name] = text
    if not said and number is None:
        return None, None
    return _ASSIGNMENTS[tuple(said.get(name, "") for name in Assignment._fields)], number


def _parse_field(field: bytes) -> tuple[str, str, float]:
    """An entry of a Struct: its key, its value as a text, its value as a number."""
    parsed = Value.Entry.FromString(field)
    return _str(parsed.key), _str(parsed.value.string_value), parsed.value.number_value


def _parse_route(name: bytes) -> tuple[str, str, bool]:
    """The model, the arm and whether it is inference, from a route's name as envoy/routes.yaml makes it."""
    model, _, kind = _str(name).rpartition(".")
    if kind in (Arm.STABLE, Arm.CANARY):
        return model, Arm(kind).value, True
    return (model if kind == "health" and model != "server" else ""), "", False


def _parse_tags(entries: tuple[bytes, ...]) -> tuple[str, bool, str]:
    """The arm of the host, whether ext_proc failed open, and the model version where clients must not see it."""
    tags = dict(_TEXTS[entry] for entry in entries)
    return tags.get("served", ""), tags.get("failed_open") == "1", tags.get("model_version", "")


def _parse_answer(entries: tuple[bytes, ...]) -> tuple[str, int | None, str]:
    """Predictions, their count and the model version, from the answer's headers.

    A count is one to nine digits; anything else is as if it were not there.
    """
    headers = dict(_TEXTS[entry] for entry in entries)
    count = headers.get("x-model-prediction-count", "")
    plain = count.isascii() and count.isdigit() and len(count) < 10
    return headers.get("x-model-prediction", ""), int(count) if plain else None, headers.get("x-model-version", "")


def _parse_text(entry: bytes) -> tuple[str, str]:
    parsed = Text.FromString(entry)
    return _str(parsed.key), _str(parsed.value)


def _parse_status(code: bytes) -> int:
    return int(Status.FromString(code).value)


def _parse_flags(flags: bytes) -> tuple[bool, bool, bool]:
    """Whether a deadline ended it, whether silence did, and whether the client went away."""
    parsed = ResponseFlags.FromString(flags)
    return (
        parsed.upstream_request_timeout or parsed.upstream_max_stream_duration_reached or parsed.duration_timeout,
        parsed.stream_idle_timeout,
        parsed.downstream_connection_termination or parsed.downstream_remote_reset,
    )


def _str(text: bytes) -> str:
    return text.decode(errors="replace")


_READER = ColumnReader()
_WITH_HASH = _Known(_parse_around, 32_768)  # an assignment comes in up to 7! orders
_WITHOUT_HASH = _Known(_parse_metadata, 4096)
_FIELDS = _Known(_parse_field, 4096)
_ASSIGNMENTS: _Known[tuple[str, ...], Assignment] = _Known(Assignment._make, 4096)  # so that equal ones are one
_ROUTES = _Known(_parse_route, 4096)
_TAGS = _Known(_parse_tags, 4096)
_ANSWERS = _Known(_parse_answer, 4096)
_TEXTS = _Known(_parse_text, 4096)
_STATUSES = _Known(_parse_status, 1024)
_FLAGS = _Known(_parse_flags, 1024)

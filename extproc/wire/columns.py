"""entries -> columns: many entries of Envoy's access log are read as one, which takes half of one after the other.

Serialized messages that follow each other are one message to protobuf, and its repeated fields have the values of all
of them. In the projection proto every field is repeated, so that a field of all entries is one list, got by one call.

A list as long as there are entries has a value of each: no serializer writes a field twice. Which values are whose in
any other is told by marks: the entries are read with one before each, that has a value in every such list.
"""

import secrets
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final, NamedTuple

from extproc.wire.accesslog_pb2 import HTTPAccessLogEntry


class Columns(NamedTuple):
    """A list per field, with a value per entry in their order; of what an entry does not say it is 0 or empty."""

    began_s: list[int]
    began_ns: list[int]
    lasted_s: list[int]
    lasted_ns: list[int]
    first_sent_s: list[int]
    first_sent_ns: list[int]
    sent_s: list[int]
    sent_ns: list[int]
    received_s: list[int]
    received_ns: list[int]
    answered: list[bytes]
    flags: list[bytes]
    metadata: list[bytes]
    route: list[bytes]
    attempts: list[int]
    request_id: list[bytes]
    type: list[int]
    status: list[bytes]
    tags: list[tuple[bytes, ...]]
    headers: list[tuple[bytes, ...]]


class _Field(NamedTuple):
    """Where a field is, what marks its values, an entry with nothing but this mark, what stands for no value."""

    get: Callable[[HTTPAccessLogEntry], Any]
    mark: Any
    entry: bytes
    absent: Any


def _field(path: str, mark: Any) -> _Field:
    entry = HTTPAccessLogEntry()
    *within, name = path.split(".")
    getattr(reduce(getattr, within, entry), name).append(mark)
    return _Field(attrgetter(path), mark, entry.SerializeToString(), type(mark)())


# What no entry says: nobody who sends requests knows it, and times and counts are not that long.
_TEXT: Final = secrets.token_bytes(8)
_NUMBER: Final = 1 << 30 | secrets.randbits(30)
_SECONDS: Final = _NUMBER << 32
_ONCE: Final = (
    _field("common_properties.start_time.seconds", _SECONDS),
    _field("common_properties.start_time.nanos", _NUMBER),
    _field("common_properties.duration.seconds", _SECONDS),
    _field("common_properties.duration.nanos", _NUMBER),
    _field("common_properties.time_to_first_upstream_tx_byte.seconds", _SECONDS),
    _field("common_properties.time_to_first_upstream_tx_byte.nanos", _NUMBER),
    _field("common_properties.time_to_last_upstream_tx_byte.seconds", _SECONDS),
    _field("common_properties.time_to_last_upstream_tx_byte.nanos", _NUMBER),
    _field("common_properties.time_to_last_upstream_rx_byte.seconds", _SECONDS),
    _field("common_properties.time_to_last_upstream_rx_byte.nanos", _NUMBER),
    _field("common_properties.time_to_first_upstream_rx_byte", _TEXT),
    _field("common_properties.response_flags", _TEXT),
    _field("common_properties.metadata", _TEXT),
    _field("common_properties.route_name", _TEXT),
    _field("common_properties.upstream_request_attempt_count", _NUMBER),
    _field("common_properties.stream_id", _TEXT),
    _field("common_properties.access_log_type", _NUMBER),
    _field("response.response_code", _TEXT),
)
_OFTEN: Final = (
    _field("common_properties.custom_tags", _TEXT),
    _field("response.response_headers", _TEXT),
)
_FORGOTTEN_AFTER: Final = 100


class ColumnReader:
    """Reads entries. Remembers for a while which fields some lack, to mark them at once and not after a first try."""

    def __init__(self) -> None:
        self._marked: set[int] = set()
        self._left = _FORGOTTEN_AFTER

    def read(self, entries: Sequence[bytes]) -> Columns:
        """Columns of serialized HTTPAccessLogEntries, one at least. DecodeError or ValueError if one is broken."""
        self._left -= 1
        if not self._left:
            self._marked, self._left = set(), _FORGOTTEN_AFTER
        count = len(entries)
        read = self._joined(entries)
        ragged = {at for at, field in enumerate(_ONCE) if len(field.get(read)) not in {0, count}} - self._marked
        if ragged:
            self._marked |= ragged
            read = self._joined(entries)
        columns = [
            _marked_values(field, read, count) if at in self._marked else field.get(read)[:] or [field.absent] * count
            for at, field in enumerate(_ONCE)
        ]
        return Columns(*columns, *(_lists(field.get(read)[:], count) for field in _OFTEN))

    def _joined(self, entries: Sequence[bytes]) -> HTTPAccessLogEntry:
        """All entries in one, with a mark before each."""
        mark = b"".join(field.entry for field in (*_OFTEN, *(_ONCE[at] for at in self._marked)))
        return HTTPAccessLogEntry.FromString(mark + mark.join(entries))


def _marked_values(field: _Field, read: HTTPAccessLogEntry, count: int) -> list[Any]:
    """A value of each entry; as everywhere in protobuf, the last one counts."""
    column: list[Any] = field.get(read)[:]
    mark, absent = field.mark, field.absent
    if len(column) == count:
        return [absent] * count
    if len(column) == 2 * count and column[::2] == [mark] * count:
        return column[1::2]
    following = [*column[1:], mark]
    return [absent if value == mark else value for value, after in zip(column, following, strict=True) if after == mark]


def _lists(column: list[bytes], count: int) -> list[tuple[bytes, ...]]:
    """All values of each entry. Raises ValueError if marks are missing, which a broken entry took for its own."""
    if column.count(_TEXT) != count:
        raise ValueError("an entry that ends within the next one")
    width = len(column) // count
    if width > 1 and column[::width] == [_TEXT] * count:
        return list(zip(*(column[at::width] for at in range(1, width)), strict=True))
    begins = [at for at, value in enumerate(column) if value == _TEXT]
    return [tuple(column[begin + 1 : end]) for begin, end in pairwise([*begins, len(column)])]

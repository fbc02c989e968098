"""The request headers as perch sees them: bytes, as Envoy sent them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

NOTHING: Mapping[bytes, Sequence[bytes]] = MappingProxyType({})


@dataclass(slots=True)
class Request:
    """Lower-case names, values as raw bytes.

    `headers` has the first value of each header; `repeated` has all values, in order, of those that came twice or more.
    Not frozen, because freezing costs as much as the decision itself; nobody changes one.
    """

    headers: Mapping[bytes, bytes]
    repeated: Mapping[bytes, Sequence[bytes]] = field(default_factory=lambda: NOTHING)


def cookie_values(request: Request, name: bytes) -> list[bytes]:
    """The values of one cookie over all cookie headers. Only the syntax's white space is taken off."""
    first = request.headers.get(b"cookie")
    if first is None:
        return []
    found = []
    for line in request.repeated.get(b"cookie", (first,)):
        if name not in line:
            continue
        for pair in line.split(b";"):
            key, equals, value = pair.strip(b" \t").partition(b"=")
            if equals and key == name:
                found.append(value)
    return found

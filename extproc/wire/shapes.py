"""What requests are decided as that differ in nothing but the value of their unit: a look-up instead of a decision.

Envoy shows perch only what the flags read, and little of that differs from one request to the next. A shape is all of
a message but the value of one header of which nothing is read but the unit. It is learned from two messages: the one
that came, and one with other bytes in the value's place. Where both are divided at the same split by just these bytes,
or both get the same choice, that holds for any bytes of this number.
"""

from google.protobuf.message import DecodeError

from extproc.core.decision import Hashed, outcome_of
from extproc.core.request import Request
from extproc.core.ruleset import Choice, Ruleset, Split
from extproc.wire.requests import read_request, value_tag

MOST_TAGS = 4
"""Unit headers that are looked for in a message."""
MOST_SHAPES = 4096
LONGEST_BYTES = 1024
"""Of a message that is learned from: with MOST_SHAPES a bound on what shapes can take."""

Shape = tuple[bytes, bytes, int, bytes]
"""What stands before the value's tag, the tag, the value's length, and what follows it; a message without any of the
unit headers is its own shape, with nothing behind."""


class Shapes:
    """The shapes of one ruleset: `tags` has the unit headers by their tags, `known` what each shape is decided as."""

    __slots__ = ("_ruleset", "known", "tags")

    def __init__(self, ruleset: Ruleset) -> None:
        self._ruleset = ruleset
        self.tags = {value_tag(header): header for header in ruleset.unit_headers[:MOST_TAGS] if len(header) < 128}
        self.known: dict[Shape, Choice | Split] = {}

    def learn(self, shape: Shape, unit: bytes, request: Request, outcome: Choice | Hashed) -> None:
        """Remembers what a message of this shape, with `unit` in it, was read and decided as; if that can be told."""
        before, tag, size, after = shape
        if len(before) + len(after) + size > LONGEST_BYTES:
            return
        lasting: Choice | Split | None = outcome if isinstance(outcome, Choice) else None
        if tag:
            lasting = self._lasting(shape, unit, request, outcome)
        if lasting is not None:
            if len(self.known) >= MOST_SHAPES:
                self.known.clear()
            self.known[shape] = lasting

    def _lasting(self, shape: Shape, unit: bytes, request: Request, outcome: Choice | Hashed) -> Choice | Split | None:
        before, tag, size, after = shape
        name = self.tags[tag]
        other = bytes(255 - byte for byte in unit)
        try:
            twin = read_request(b"".join((before, tag, bytes((size,)), other, after)))
        except DecodeError:  # what looked like the value is something else
            return None
        if not isinstance(twin, Request) or (request.headers.get(name), twin.headers.get(name)) != (unit, other):
            return None
        found = outcome_of(self._ruleset, twin)
        if isinstance(outcome, Choice):
            return outcome if found is outcome else None
        if isinstance(found, Hashed) and found.split is outcome.split and (outcome.unit, found.unit) == (unit, other):
            return outcome.split
        return None

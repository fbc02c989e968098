"""bytes -> bytes: one serialized ProcessingRequest in, one serialized ProcessingResponse out, whatever it holds."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from extproc.core.decision import draw, outcome_of
from extproc.core.ruleset import Choice, Ruleset, Split
from extproc.wire.requests import read_request
from extproc.wire.shapes import Shape, Shapes

LESSONS = 1000
"""Shapes that may be learned before somebody allows more: requests of which no two are alike cost little more."""

_pack_hash = struct.Struct("<d").pack


@dataclass(frozen=True, slots=True)
class Published:
    """What answers requests: a ruleset, the reply to each of its choices, and what is said to other phases.

    `replies[choice.index]` is the reply to a choice; `other_phases` holds replies by the name of the phase.
    """

    ruleset: Ruleset
    replies: Sequence[bytes]
    other_phases: Mapping[str, bytes]
    shapes: Shapes = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", Shapes(self.ruleset))


class Answerer:
    """Answers with what was published last. Publishing is the assignment of `published`; no lock, no wait.

    `counts` says how often each choice was given, by its index; `seen` has an entry per hashed unit, the choice's index
    above the 32 bits of the hash. Whoever reads them puts new ones in their place, and does so before publishing.
    Units whose hash is in `named` are kept in `names` as they came. `lessons` is the number of shapes that may still be
    learned.
    """

    def __init__(self, published: Published) -> None:
        self.published = published
        self.counts: dict[int, int] = {}
        self.seen: list[int] = []
        self.named: frozenset[int] = frozenset()
        self.names: dict[int, bytes] = {}
        self.lessons = LESSONS

    def __call__(self, message: bytes) -> bytes:
        """The reply to one serialized ProcessingRequest. Never raises: what is unreadable gets stable, ERROR."""
        published = self.published
        shape: Shape = (message, b"", 0, b"")
        unit = b""
        for tag in published.shapes.tags:
            before, found, after = message.partition(tag)
            if found and after:
                size = after[0]
                unit = after[1 : size + 1]
                if len(unit) == size:
                    shape = (before, tag, size, after[size + 1 :])
                break
        outcome: Choice | Split | bytes | None = published.shapes.known.get(shape)
        if outcome is None:
            outcome, unit = self._decide(published, message, shape, unit)
        unit_hash = None
        if isinstance(outcome, Split):
            outcome, unit_hash = draw(outcome, unit)
        elif isinstance(outcome, bytes):
            return outcome
        index = outcome.index
        self.counts[index] = self.counts.get(index, 0) + 1
        if unit_hash is None:
            return published.replies[index]
        self.seen.append(index << 32 | unit_hash)
        if unit_hash in self.named:
            self.names.setdefault(unit_hash, unit)
        return published.replies[index] + _pack_hash(unit_hash)

    def _decide(
        self, published: Published, message: bytes, shape: Shape, unit: bytes
    ) -> tuple[Choice | Split | bytes, bytes]:
        """For a shape that is not known: the choice, the split with the unit, or the reply to another phase."""
        ruleset = published.ruleset
        try:
            request = read_request(message)
        except DecodeError:
            return ruleset.error, b""
        if isinstance(request, str):
            return published.other_phases.get(request, ruleset.error), b""
        outcome = outcome_of(ruleset, request)
        if self.lessons > 0:
            self.lessons -= 1
            published.shapes.learn(shape, unit, request, outcome)
        return (outcome, b"") if isinstance(outcome, Choice) else outcome

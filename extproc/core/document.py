"""A configuration document as plain values, with the place of everything in it, and the problems found in it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text file, both from 1 as editors count."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Marks:
    """Where a node begins, and where its parts do: a mapping's values and keys by key, a sequence's items in order."""

    place: Place
    values: "Mapping[str, Marks] | Sequence[Marks]" = ()
    keys: Mapping[str, Place] | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, at which key, and what to write instead."""

    place: Place
    path: str
    message: str

    @property
    def what(self) -> str:
        """The problem without its place: at which key, and the message."""
        return f"{self.path}: {self.message}" if self.path else self.message

    def __str__(self) -> str:
        return f"{self.place.line}:{self.place.column}: {self.what}"


class FlagFileError(Exception):
    """A flag file that must not be served, with every problem that was found in it, in the order of their lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.place.line, p.place.column)))
        super().__init__("; ".join(map(str, self.problems[:20])))

    def __reduce__(self) -> tuple[type["FlagFileError"], tuple[tuple[Problem, ...]]]:
        return FlagFileError, (self.problems,)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data (dict, list, str, int, Decimal, bool, None), the place of each part, and what was wrong with the text.

    A document with problems is read on so that all of them can be told at once; it must not be served.
    """

    data: Any
    marks: Marks
    problems: tuple[Problem, ...] = ()

    def place_of(self, path: Path, *, of_key: bool = False) -> Place:
        """The place of the value at `path`, or of its key; where the path leaves the document, of its last part."""
        marks, key = self.marks, None
        for step in path:
            inner = _inside(marks, step)
            if inner is None:
                return _key_place(marks, step) or marks.place
            marks, key = inner, _key_place(marks, step)
        return key if of_key and key is not None else marks.place

    def problem(self, path: Path, message: str, *, of_key: bool = False) -> Problem:
        """A problem at this path of the document."""
        return Problem(self.place_of(path, of_key=of_key), dotted(path), printable(message))


def _inside(marks: Marks, step: str | int) -> Marks | None:
    values = marks.values
    if isinstance(values, Mapping):
        return values.get(str(step))
    return values[step] if isinstance(step, int) and step < len(values) else None


def _key_place(marks: Marks, step: str | int) -> Place | None:
    return marks.keys.get(step) if marks.keys is not None and isinstance(step, str) else None


def dotted(path: Path) -> str:
    """`flags.digits.rollout.steps[2].soak`: a path as people write it."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{printable(step)}" for step in path)
    return "".join(parts).removeprefix(".")


def printable(text: str) -> str:
    """The text with whatever would break a line or drive a terminal written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

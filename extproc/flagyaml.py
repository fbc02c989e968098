"""Reads YAML bytes into a Document. Strict: what YAML readers silently accept and people do not mean is a problem.

Works on the parser's events, with a depth and a size limit, so that no document can exhaust the stack or the memory.
Scalars follow the YAML 1.2 core schema: `yes`, `on`, `010`, `1_000` and `12:30` are text, as they look.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import yaml

from extproc.core.document import Document, FlagFileError, Marks, Place, Problem, printable

MAX_BYTES = 16 * 1024 * 1024
"""10,000 flags are about 2 MiB."""

MAX_DEPTH = 32
MAX_NODES = 2_000_000
"""Counted with every alias expanded, as the readers after us would walk them."""

MAX_PROBLEMS = 200

_LOADER = getattr(yaml, "CLoader", yaml.Loader)  # the C parser: eight times faster, the same events
_INT = re.compile(r"0|-?[1-9][0-9]{0,30}")
"""`+49` and `-0` stay text: as a number they would not be what a header says."""
_FLOAT = re.compile(
    r"(?=.*[.eE])[-+]?(?:(?:0|[1-9][0-9]{0,30})(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_CORE_TAGS = ("tag:yaml.org,2002:str", "!")


@dataclass(slots=True)
class _Node:
    """A value, its marks, and how many nodes it stands for with every alias expanded."""

    value: Any
    marks: Marks
    size: int = 1


def read_document(content: bytes) -> Document:
    """The one YAML document in `content`. Raises FlagFileError with every problem of the YAML, and nothing else."""
    document = scan_document(content)
    if document.problems:
        raise FlagFileError(document.problems)
    return document


def scan_document(content: bytes) -> Document:
    """The same, but what can be read past is left to the caller, as the document's `problems`."""
    if len(content) > MAX_BYTES:
        raise _error(Place(1, 1), f"the file is larger than {MAX_BYTES:,} bytes, and no more is read; split it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise _error(Place(line, column), "this is not UTF-8 text; save the file as UTF-8") from None
    if not text.strip():
        raise _error(Place(1, 1), "the file is empty; a flag file begins with `version: 1` and `flags:`")
    try:
        return _Builder(text).document()
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(error, text) from None
    except yaml.reader.ReaderError as error:
        at = len(text.encode()[: error.position].decode(errors="ignore"))  # the C parser counts bytes
        line = text.count("\n", 0, at) + 1
        column = at - text.rfind("\n", 0, at)
        character: Any = error.character  # a number, whatever the type says
        message = (
            f"the character {chr(character)!r} is not allowed in YAML" if isinstance(character, int) else str(error)
        )
        raise _error(Place(line, column), message) from None


def _error(place: Place, message: str) -> FlagFileError:
    return FlagFileError([Problem(place, "", printable(message))])


def _yaml_error(error: yaml.MarkedYAMLError, text: str) -> FlagFileError:
    """What the YAML parser says, at its place, in plainer words where it is about a tab."""
    mark: Any = error.problem_mark or error.context_mark
    place = Place(1, 1) if mark is None else Place(mark.line + 1, mark.column + 1)
    lines = text.splitlines()
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return _error(Place(place.line, line.index("\t") + 1), "a tab cannot indent YAML; use spaces")
    context = f" {error.context}" if error.context else ""
    if error.context and error.context_mark is not None:
        context += f" that begins on line {error.context_mark.line + 1}"
    return _error(place, f"this is not valid YAML: {error.problem}{context}")


def _place(event: Any) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1)


class _Builder:
    """Turns parser events into one node. Collects the problems that do not stop it, raises for those that do."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, _Node] = {}
        self._problems: list[Problem] = []
        self._nodes = 0

    def document(self) -> Document:
        event = next(self._events)
        while not isinstance(event, yaml.DocumentStartEvent):
            if isinstance(event, yaml.StreamEndEvent):
                raise _error(
                    Place(1, 1), "the file has only comments; a flag file begins with `version: 1` and `flags:`"
                )
            event = next(self._events)
        root = self._node(next(self._events), 0)
        next(self._events)
        after = next(self._events)
        if isinstance(after, yaml.DocumentStartEvent):
            self._problem(_place(after), "a second YAML document begins here; one file holds one")
        return Document(root.value, root.marks, tuple(self._problems))

    def _problem(self, place: Place, message: str) -> None:
        self._problems.append(Problem(place, "", printable(message)))
        if len(self._problems) >= MAX_PROBLEMS:
            raise FlagFileError(self._problems)

    def _count(self, event: yaml.Event, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise _error(_place(event), f"with its aliases expanded the file has more than {MAX_NODES:,} values")

    def _node(self, event: Any, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise _error(_place(event), f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(event, 1)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _CORE_TAGS:
            self._problem(_place(event), f"the tag {tag} is not supported; write the plain value")
        match event:
            case yaml.ScalarEvent():
                node = _Node(self._scalar(event), Marks(_place(event)))
            case yaml.SequenceStartEvent():
                node = self._sequence(event, depth)
            case _:
                node = self._mapping(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: Any) -> _Node:
        node = self._anchors.get(event.anchor)
        if node is None:
            raise _error(_place(event), f"the alias *{event.anchor} names no anchor above it")
        self._count(event, node.size)
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text)
        if _NOT_FINITE.fullmatch(text):
            self._problem(_place(event), f"{text} is not a number that can be used here")
            return None
        return Decimal(text) if _FLOAT.fullmatch(text) else text

    def _sequence(self, start: yaml.Event, depth: int) -> _Node:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        marks = Marks(_place(start), tuple(item.marks for item in items))
        return _Node([item.value for item in items], marks, 1 + sum(item.size for item in items))

    def _mapping(self, start: yaml.Event, depth: int) -> _Node:
        entries: dict[str, _Node] = {}
        keys: dict[str, Place] = {}
        merges: list[tuple[yaml.Event, _Node]] = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1).value
            node = self._node(next(self._events), depth + 1)
            if key == "<<" and not getattr(event, "style", None):
                merges.append((event, node))
            elif not isinstance(key, str):
                self._problem(_place(event), "a key must be text; put it in quotes")
            elif key in keys:
                first = keys[key]
                self._problem(_place(event), f"the key {key!r} stands here again; it is already on line {first.line}")
            else:
                entries[key], keys[key] = node, _place(event)
        for merge_event, node in merges:
            self._merge(merge_event, node, entries, keys)
        return _Node(
            {key: node.value for key, node in entries.items()},
            Marks(_place(start), {key: node.marks for key, node in entries.items()}, keys),
            # A merged mapping counts whole, once more than its overridden keys need: the limit errs on the small side.
            1 + sum(1 + node.size for node in entries.values()) + sum(node.size for _, node in merges),
        )

    def _merge(self, event: yaml.Event, node: _Node, entries: dict[str, _Node], keys: dict[str, Place]) -> None:
        """`<<: *common`: the keys of another mapping, where this one does not have them itself."""
        values = node.value if isinstance(node.value, list) else [node.value]
        marks = node.marks.values if isinstance(node.value, list) else [node.marks]
        for value, mark in zip(values, marks, strict=True):
            if not isinstance(value, dict) or not isinstance(mark, Marks):
                self._problem(_place(event), "`<<` takes a mapping, or a list of mappings")
                continue
            for key, inner in value.items():
                if key not in entries:
                    entries[key] = _Node(inner, mark.values[key])
                    keys[key] = (mark.keys or {})[key]

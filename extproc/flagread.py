"""From a flag file to its flags: the one way that serves, and that every command takes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from extproc.core.document import Document, FlagFileError, Place, Problem
from extproc.core.flags import Flag
from extproc.core.schema import ParsedFlags, parse
from extproc.flagyaml import MAX_BYTES, scan_document
from extproc.statefiles import read_or_none


@dataclass(frozen=True, slots=True)
class FlagFileRead:
    """A good flag file: its bytes, its document with the places, and its flags."""

    content: bytes
    document: Document
    flags: tuple[Flag, ...]


def flags_in(content: bytes, models: Collection[str] | None) -> ParsedFlags:
    """The flags in a file's bytes. `models` are the names that Envoy serves; None leaves that unchecked.

    Raises FlagFileError with every problem, those of the YAML and those of what it says together, and nothing else.
    """
    return parse(scan_document(content), models)


def read_flag_file(path: Path, models: Mapping[str, str] | None) -> FlagFileRead:
    """The same for a file. Raises FlagFileError, also for a file that is not there or not readable."""
    content = read_bytes(path)
    document = scan_document(content)
    return FlagFileRead(content, document, parse(document, models).flags)


def read_bytes(path: Path) -> bytes:
    """A file's bytes, one more than may be read if it is too large. Raises FlagFileError."""
    try:
        content = read_or_none(path, MAX_BYTES)
    except OSError as error:
        raise FlagFileError([Problem(Place(1, 1), "", f"cannot be read: {error.strerror}")]) from None
    if content is None:
        raise FlagFileError([Problem(Place(1, 1), "", "there is no such file")])
    return content

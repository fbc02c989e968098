"""Files that must be whole or not there: written beside their place, synced, renamed."""

import contextlib
import errno
import os
import stat
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

MAX_WAITING = 1_000
"""Lines that a journal keeps while they cannot be written."""


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Puts `content` at `path` so that a reader sees the old file or the new one, also after a power cut.

    Makes the folder if it is missing. Raises OSError that names `path`, and leaves the old file and no temporary one.
    """
    try:
        _write_beside(path, content, mode)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write_beside(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable; some file systems refuse, and then have no need of it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def read_or_none(path: Path, limit_bytes: int) -> bytes | None:
    """The file's first `limit_bytes` + 1 bytes, or None if there is no such file. Other OSErrors are raised.

    A pipe is refused: to open one is to wait for somebody to write to it.

    One byte more than the limit, so that a caller can tell a file that is too large from one that just fits.
    """
    try:
        if stat.S_ISFIFO(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, not a file", str(path))
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None


def append_line(path: Path, line: str) -> None:
    """Adds one line to a file that only grows. One write, so that two writers never mix their lines.

    Raises OSError; of a line for which there is too little room nothing stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = line.encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, whole)
        if written < len(whole):
            end = os.lseek(handle, 0, os.SEEK_CUR)
            if os.fstat(handle).st_size == end:  # nobody has written behind it
                os.ftruncate(handle, end - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(handle)


@dataclass(slots=True)
class Journal:
    """A file of lines that only grows. What cannot be written waits, and `problem` says why; `lost` waited too long."""

    path: Path
    problem: str = field(default="", init=False)
    lost: int = field(default=0, init=False)
    _waiting: deque[str] = field(default_factory=deque, init=False)

    @property
    def waiting(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._waiting)

    def add(self, line: str) -> None:
        """Adds a line, or keeps it until it can be written. Raises nothing."""
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(line)
        self.write()

    def write(self) -> None:
        """Writes what waits, as far as that goes. Raises nothing."""
        try:
            while self._waiting:
                append_line(self.path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror or error}"
        else:
            self.problem = ""

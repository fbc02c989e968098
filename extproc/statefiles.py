"""Files that must be whole or not there: written beside their place, synced, renamed."""

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Puts `content` at `path` so that a reader sees the old file or the new one, also after a power cut.

    Makes the folder if it is missing. Raises OSError and leaves the old file and no temporary one.
    """
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
    """Adds one line to a file that only grows. One write, so that two writers never mix their lines. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode() + b"\n")
    finally:
        os.close(handle)

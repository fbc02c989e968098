"""Where a transport listens: "unix:PATH" or "HOST:PORT". Opens the listening socket; owns the socket file's rights."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from extproc.transport.errors import ListenError

BACKLOG: Final = 1024
_LONGEST_PATH_BYTES: Final = 107  # sun_path of Linux without its final NUL


@dataclass(frozen=True, slots=True)
class Listener:
    """An open listening socket."""

    socket: socket.socket
    address: str
    """The real address, in the form it is given in: a port 0 has become the port."""
    path: Path | None
    """The socket file, if it has one."""
    inode: int
    """Of the socket file as we made it, so that nobody else's is removed."""

    def remove_file(self) -> None:
        """Removes the socket file if it is still ours."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                if self.path.lstat().st_ino == self.inode:
                    self.path.unlink()


def open_listener(listen: str) -> Listener:
    """Opens the socket for an address. Raises ListenError with one line that says what to do."""
    if listen.startswith("unix:"):
        return _open_unix(Path(listen.removeprefix("unix:")))
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ListenError(f"cannot listen on {listen!r}: write unix:PATH or HOST:PORT")
    return _open_tcp(host.strip("[]"), int(port))


def _open_tcp(host: str, port: int) -> Listener:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --listen") from None
    opened.setblocking(False)
    real_host, real_port = opened.getsockname()[:2]
    shown = f"[{real_host}]" if ":" in real_host else real_host
    return Listener(opened, f"{shown}:{real_port}", path=None, inode=0)


def _open_unix(path: Path) -> Listener:
    if not path.name or len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
        raise ListenError(f"cannot listen on unix:{path}: the path must be 1 to {_LONGEST_PATH_BYTES} bytes long")
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        mask = os.umask(0o077)  # the file is born with mode 0700: no moment in which others could connect
        try:
            opened.bind(os.fspath(path))
        finally:
            os.umask(mask)
        opened.listen(BACKLOG)
        inode = path.lstat().st_ino
    except ListenError:
        opened.close()
        raise
    except OSError as error:
        opened.close()
        raise ListenError(f"cannot listen on unix:{path}: {error.strerror}") from None
    opened.setblocking(False)
    return Listener(opened, f"unix:{path}", path=path, inode=inode)


def _remove_stale(path: Path) -> None:
    """Removes a socket file that nobody serves any more. Raises ListenError if somebody does, or if it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"cannot listen on unix:{path}: a file that is not a socket is there; choose another path")
    if not is_abandoned(path):
        raise ListenError(
            f"cannot listen on unix:{path}: another process serves there; stop it or choose another --listen"
        )
    path.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Whether nobody serves at this socket file, or it has gone meanwhile. Raises OSError if it cannot be tried."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except TimeoutError:
            pass  # a full backlog: somebody listens, if slowly
    return False

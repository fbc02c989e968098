"""`unix:PATH` or `HOST:PORT` to a bound socket. A stale unix socket is replaced, a live one is left alone."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

BACKLOG = 4096  # connections the kernel keeps for us while the loop is busy; Envoy opens many at once


class CannotListen(Exception):  # noqa: N818  it reads as the sentence it is
    """The address cannot be bound; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket and, for a unix one, its file."""

    socket: socket.socket
    address: str
    file: Path | None = None
    inode: int = 0

    def remove_file(self) -> None:
        """Removes the socket file, unless another process has put its own there since."""
        if self.file is not None and self.file.exists() and self.file.stat().st_ino == self.inode:
            self.file.unlink()


def listen(address: str) -> Listener:
    """Binds. Raises CannotListen; an address that is malformed raises ValueError."""
    if address.startswith("unix:"):
        return _listen_unix(Path(address.removeprefix("unix:")))
    host, port = host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # strerror itself repeats the address
        raise CannotListen(f"cannot listen on {address}: {reason}; stop what uses it or choose another") from None
    shown = f"[{host}]" if ":" in host else host
    return Listener(bound, f"{shown}:{bound.getsockname()[1]}")


def host_and_port(address: str) -> tuple[str, int]:
    """Splits HOST:PORT or [IPV6]:PORT. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is neither unix:PATH nor HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listen_unix(path: Path) -> Listener:
    try:
        if path.is_socket():
            _remove_stale(path)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mask makes the file private from its first moment; a chmod afterwards would leave a gap.
        mask = os.umask(0o177)
        try:
            bound.bind(str(path))
        finally:
            os.umask(mask)
        bound.listen(BACKLOG)
    except OSError as error:
        raise CannotListen(f"cannot listen on unix:{path}: {error.strerror or error}") from None
    return Listener(bound, f"unix:{path}", path, path.stat().st_ino)


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise CannotListen(f"cannot listen on unix:{path}: another process serves there; stop it or choose another path")

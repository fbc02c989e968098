"""What an operator should know, a line per event: to the log, and to `perch up` where it runs the process."""

import contextlib
import json
import logging
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("perch")


def start_log(role: str, level: str) -> None:
    """Log lines on stderr: time, level, role, message. Call once, first thing in a process."""
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s {role}: %(message)s",
        force=True,
    )


@dataclass(slots=True)
class Events:
    """Tells events. `told_to` is the datagram socket of `perch up`; None or a dead one costs nothing."""

    role: str
    told_to: Path | None = None
    _socket: socket.socket | None = field(default=None, init=False)

    def tell(self, kind: str, text: str, *, level: int = logging.INFO) -> None:
        """One event: `kind` is a word for programs, `text` a sentence for people. Never blocks, never raises."""
        log.log(level, "%s: %s", kind, text)
        if self.told_to is None:
            return
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        message = json.dumps({"role": self.role, "kind": kind, "text": text}).encode()
        with contextlib.suppress(OSError):
            self._socket.sendto(message, str(self.told_to))

    def warn(self, kind: str, text: str) -> None:
        """An event that somebody should look into."""
        self.tell(kind, text, level=logging.WARNING)

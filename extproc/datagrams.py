"""A datagram socket to one place, by IP, by name or by unix path, that never makes its caller wait.

Names are looked up in a thread, again and again, so that the other side may appear, vanish and move. What the socket
does not take is counted, in lines, for `metrics` to report. It knows packets, not what is in them.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

PACKET_BYTES: Final = 1432  # a packet stays below: 1500 of Ethernet less IPv6, UDP and a tunnel's header
_LOOK_UP_AGAIN_S: Final = 30.0  # follows a name that moved to another address
_LOOK_UP_RETRY_S: Final = 5.0  # a name that did not resolve


@dataclass(frozen=True, slots=True)
class Peer:
    """What a datagram socket connects to."""

    family: int
    address: Any


def read_address(address: str) -> Peer | tuple[str, int]:
    """A peer to connect to at once, or a host name and port still to be looked up. ValueError for any other form."""
    if address.startswith("unix:") and len(address) > len("unix:"):
        return Peer(socket.AF_UNIX, address.removeprefix("unix:"))
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"StatsD address {address!r}: write host:port or unix:/path")
    return _look_up(host, int(port), socket.AI_NUMERICHOST) or (host, int(port))


def _look_up(host: str, port: int, flags: int = 0) -> Peer | None:
    """The host's address, IPv4 first, as the statsd package has it; None when it has none. Blocks for a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=flags)
    except (OSError, UnicodeError):  # UnicodeError: a label too long or empty
        return None
    peers = [Peer(family, address) for family, _, _, _, address in found]
    return min(peers, key=lambda peer: peer.family != socket.AF_INET, default=None)


class Outlet:
    """A datagram socket as the statsd package's client uses one, that never waits and counts the lines it loses."""

    def __init__(self, where: Peer | tuple[str, int], dropped: Counter[str]) -> None:
        self._name = None if isinstance(where, Peer) else where
        self._peer = where if isinstance(where, Peer) else None
        self._connected_to: Peer | None = None
        self._socket: socket.socket | None = None
        self._looking = False
        self._looked = False
        self._look_up_at_s = -math.inf
        self._dropped = dropped
        self._sent_last: Counter[str] = Counter()
        self.at_stake: Counter[str] | None = None  # what the next packet's loss costs, when not its number of lines

    def knows_where(self) -> bool:
        """False until the first look-up of a name has ended: what gathers is kept for it."""
        if self._name is not None and not self._looking and time.monotonic() >= self._look_up_at_s:
            self._looking = True
            try:
                threading.Thread(target=self._look, args=self._name, name="statsd-look-up", daemon=True).start()
            except RuntimeError:  # no thread left
                self._look_ended(None)
        return self._peer is not None or self._looked

    def _look(self, host: str, port: int) -> None:
        self._look_ended(_look_up(host, port))

    def _look_ended(self, peer: Peer | None) -> None:
        self._look_up_at_s = time.monotonic() + (_LOOK_UP_RETRY_S if peer is None else _LOOK_UP_AGAIN_S)
        self._peer = peer or self._peer  # a name server that is down does not unlearn an address
        self._looked = True
        self._looking = False

    def open(self) -> bool:
        """Whether there is a socket to send with; connects it if there is an address and none yet, or another one."""
        if self._peer is None:
            return False
        if self._socket is None or self._connected_to != self._peer:
            self._connect(self._peer)
        return self._socket is not None

    def _connect(self, peer: Peer) -> None:
        """Datagram sockets connect without a word to the other side, so this does not wait."""
        self.close()
        try:
            made = socket.socket(peer.family, socket.SOCK_DGRAM)
        except OSError:  # no descriptor left
            return
        try:
            made.setblocking(False)
            made.connect(peer.address)
        except (OSError, ValueError):  # no such path or no route now; ValueError: a path with a NUL
            made.close()
            return
        self._socket, self._connected_to = made, peer

    def sendto(self, packet: bytes, _address: Any) -> None:
        """Send a packet or count its lines as dropped."""
        lost = self.at_stake or Counter(send=packet.count(b"\n") + 1)
        try:
            sent = self._send(packet)
        except OSError:  # full, no route, forbidden
            sent = False
        if not sent:
            self._dropped.update(lost)
        self._sent_last = lost if sent else Counter()

    def _send(self, packet: bytes) -> bool:
        if self._socket is None or self._peer is None or len(packet) >= PACKET_BYTES:
            return False
        try:
            self._socket.send(packet)
        except ConnectionRefusedError:
            if self._peer.family == socket.AF_UNIX:  # this packet, to a listener that has gone: look for a new one
                self._connect(self._peer)
            else:  # UDP tells of the packet before this one, and does so once
                self._dropped.update(self._sent_last)
            if self._socket is None:
                return False
            self._socket.send(packet)
        return True

    def close(self) -> None:
        """Close the socket; `open` makes a new one."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

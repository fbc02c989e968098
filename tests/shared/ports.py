"""Ports for the servers that tests start."""

import contextlib
import random
import socket


def free_ports(count: int, at: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody uses, outside the range from which those of clients, and of port 0, are drawn."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(10_240, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((at, port))
            found.add(port)
    return [*found]

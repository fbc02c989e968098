"""Addresses as perch writes them: `HOST:PORT`, `[IPv6]:PORT`, `unix:PATH`. Parsing only; nothing is resolved."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNIX_PATH_MAX_BYTES = 107
"""Linux's sun_path holds 108 bytes, the closing zero included."""

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")
_LOOKS_LIKE_IPV4 = re.compile(r"[0-9.]+")


class AddressError(ValueError):
    """The text is no address; the message says what is wrong and what to write."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket. A relative path belongs to the run folder."""

    path: Path

    def joined(self, run_dir: Path) -> "UnixAddress":
        """The socket inside `run_dir` if the path is relative; raises AddressError when that is too long for Linux."""
        path = run_dir / self.path
        length = len(str(path).encode())
        if length > UNIX_PATH_MAX_BYTES:
            raise AddressError(
                f"the socket path {path} has {length} bytes, Linux allows {UNIX_PATH_MAX_BYTES}; "
                "use a shorter run folder"
            )
        return UnixAddress(path)

    def envoy(self) -> dict[str, Any]:
        """The address as Envoy's configuration writes it."""
        return {"pipe": {"path": str(self.path)}}


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP (or UDP) endpoint; `is_name` where the host has to be asked of DNS."""

    host: str
    port: int
    is_name: bool

    def envoy(self, protocol: str = "TCP") -> dict[str, Any]:
        """The address as Envoy's configuration writes it."""
        return {"socket_address": {"protocol": protocol, "address": self.host, "port_value": self.port}}


Address = UnixAddress | TcpAddress


def parse_address(text: str, *, port_zero: bool = False) -> Address:
    """`text` as an address; raises AddressError. `port_zero` allows port 0, which lets the kernel choose."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
        if not closed or rest == port_text:
            raise AddressError(f"{text!r} is not [IPv6]:PORT; write for example [::1]:8000")
        return TcpAddress(_ipv6(host), _port(port_text, text, port_zero=port_zero), is_name=False)
    host, _, port_text = text.rpartition(":")
    if not host:
        raise AddressError(f"{text!r} has no port; write HOST:PORT, [IPv6]:PORT or unix:PATH")
    if ":" in host:
        raise AddressError(f"{text!r}: an IPv6 address needs brackets; write [{host}]:{port_text}")
    return TcpAddress(host, _port(port_text, text, port_zero=port_zero), is_name=_is_name(host))


def _parse_unix(text: str) -> UnixAddress:
    path = text.removeprefix("unix:")
    if not path or path.endswith("/") or "\0" in path:
        raise AddressError(f"{text!r} names no socket; write unix:/absolute/path.sock or unix:name.sock")
    if ".." in Path(path).parts:
        raise AddressError(f"{text!r} leaves its folder with '..'; write the path without it")
    if len(path.encode()) > UNIX_PATH_MAX_BYTES:
        raise AddressError(
            f"{text!r} has {len(path.encode())} bytes, Linux allows {UNIX_PATH_MAX_BYTES}; use a shorter path"
        )
    return UnixAddress(Path(path))


def _port(text: str, whole: str, *, port_zero: bool) -> int:
    lowest = 0 if port_zero else 1
    if not (text.isascii() and text.isdigit()) or not lowest <= int(text[:6]) <= 65535:
        raise AddressError(f"{whole!r}: {text!r} is no port; write a number from {lowest} to 65535")
    return int(text)


def _ipv6(host: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError:
        raise AddressError(f"{host!r} is no IPv6 address") from None


def _is_name(host: str) -> bool:
    if _LOOKS_LIKE_IPV4.fullmatch(host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise AddressError(f"{host!r} is no IPv4 address") from None
        return False
    if not _HOST.fullmatch(host):
        raise AddressError(f"{host!r} is no host name")
    return True

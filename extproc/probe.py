"""Asks one server whether it is ready: exit 0 if it is. For health checks of containers, so imports nothing slow.

`python -m extproc.probe http HOST:PORT /PATH` wants a 200; `python -m extproc.probe grpc unix:PATH` wants SERVING from
the gRPC health service, which answers on the loop that answers Envoy.
"""

import socket
import sys
from collections.abc import Iterator

TIMEOUT_S = 3.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
_EMPTY_MESSAGE = bytes(5)  # not compressed, no bytes: HealthCheckRequest{service: ""}, the server as a whole
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}. Source: grpc/health/v1/health.proto
_CHECK = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/grpc.health.v1.Health/Check",
    ":authority": "perch",
    "te": "trailers",
    "content-type": "application/grpc",
}


def main(arguments: list[str]) -> int:
    """The exit code: 0 ready, 1 not ready with one line why, 2 for usage."""
    try:
        match arguments:
            case ["http", address, path]:
                answer = ask_http(address, path)
            case ["grpc", address]:
                answer = ask_grpc(address)
            case _:
                sys.stderr.write("usage: python -m extproc.probe http HOST:PORT /PATH | grpc HOST:PORT|unix:PATH\n")
                return 2
    except (OSError, ValueError) as error:
        answer = str(error)
    if answer == "ready":
        return 0
    sys.stderr.write(f"{arguments[1]}: {answer}\n")
    return 1


def ask_http(address: str, path: str) -> str:
    """`ready` for a 200, else what was answered. Raises OSError."""
    with _connected(address) as peer:
        # Not HTTP/1.0, which Envoy refuses.
        peer.sendall(f"GET {path} HTTP/1.1\r\nhost: perch\r\nconnection: close\r\n\r\n".encode())
        with peer.makefile("rb") as answer:
            status, text = answer.readline(1000), answer.read(10_000).rpartition(b"\r\n\r\n")[2]
    return "ready" if status.split()[1:2] == [b"200"] else (text or status).decode(errors="replace").strip()


def ask_grpc(address: str) -> str:
    """`ready` for SERVING, else what was answered. Raises OSError."""
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in _CHECK.items())
    with _connected(address) as peer:
        peer.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, b"", stream=0)
            + _frame(_HEADERS, _END_HEADERS, block)
            + _frame(_DATA, _END_STREAM, _EMPTY_MESSAGE)
        )
        for kind, payload in _frames(peer):
            if kind == _DATA:
                return "ready" if payload[5:] == _SERVING else "not serving"
            if kind in (_RST_STREAM, _GOAWAY):
                return "refused to answer"
    return "closed the connection"


def _connected(address: str) -> socket.socket:
    if address.startswith("unix:"):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(TIMEOUT_S)
        peer.connect(address.removeprefix("unix:"))
        return peer
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)


def _text(text: str) -> bytes:
    """A string of HPACK, shorter than 127 bytes, without Huffman."""
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, payload: bytes, *, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _frames(peer: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of what comes, until the connection closes."""
    with peer.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A model server that tells what it was asked: `python standin.py SOCKET ARM`. SIGUSR1 makes it unready, SIGUSR2 ready.

Run as a program by the tests. It forges the headers that only Envoy may set, and repeats those that it received.
"""

import json
import signal
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from typing import Any

READY = [True]


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread per connection."""

    daemon_threads = True
    request_queue_size = 1024


class Ask(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = False  # a unix socket has none

    def do_POST(self) -> None:
        """Says who it is, and repeats the request's headers with their values as received."""
        self.read_body()
        self.send({"arm": sys.argv[2], "path": self.path, "headers": self.headers.items()})

    def read_body(self) -> None:
        """Reads it whole, also in chunks as Envoy sends an HTTP/2 client's: what is left would be the next request."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            self.rfile.read(int(self.headers.get("content-length", "0")))
            return
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            self.rfile.read(size + 2)
        while self.rfile.readline().strip():
            pass

    def do_GET(self) -> None:
        """The same; a health check gets only a yes or a no."""
        if self.headers.get("user-agent", "").startswith("Envoy/HC"):
            self.send({}, 200 if READY[0] else 503)
        else:
            self.do_POST()

    def send(self, content: Any, status: int = 200) -> None:
        """One JSON answer."""
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-model-version": f"standin-{sys.argv[2]}",
            "x-model-cohort": "forged",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """No log."""


def main() -> None:
    """Serves until killed."""
    signal.signal(signal.SIGUSR1, lambda *_: READY.__setitem__(0, False))
    signal.signal(signal.SIGUSR2, lambda *_: READY.__setitem__(0, True))
    with Server(sys.argv[1], Ask) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()

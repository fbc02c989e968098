"""Takes StatsD lines on UDP 9125 and counts them for Prometheus on TCP 9102, as far as these tests look at them."""

import re
import socketserver
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = re.compile(rb"[a-z0-9_.]+(?=:)")
lines: Counter[str] = Counter()


class Lines(socketserver.BaseRequestHandler):
    """One packet."""

    def handle(self) -> None:
        """Counts its lines by their metric's name."""
        for line in self.request[0].splitlines():
            name = NAME.match(line)
            lines[name[0].decode() if name else "unreadable"] += 1


class Metrics(BaseHTTPRequestHandler):
    """One scrape."""

    def do_GET(self) -> None:
        """Writes the counts."""
        text = "".join(f'statsd_lines_total{{metric="{name}"}} {count}\n' for name, count in lines.copy().items())
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    threading.Thread(target=socketserver.UDPServer(("0.0.0.0", 9125), Lines).serve_forever, daemon=True).start()
    ThreadingHTTPServer(("0.0.0.0", 9102), Metrics).serve_forever()

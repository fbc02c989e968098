"""An existing HTTP model server as perch may find it: the standard library's http.server and no header of perch's.

    python plain_server.py PORT ANSWER [--headers]

Answers every POST with {"answer": ANSWER}; GET /ready with 200. With --headers it also sends the two headers that let
perch see versions and predictions.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = sys.argv[2]


class Model(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Readiness."""
        self._reply(200 if self.path == "/ready" else 404, b"")

    def do_POST(self):
        """An inference."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._reply(200, json.dumps({"answer": ANSWER}).encode())

    def _reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if "--headers" in sys.argv and body:
            self.send_header("x-model-version", ANSWER)
            self.send_header("x-model-prediction", "7")
            self.send_header("x-model-prediction-count", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Says nothing: a test reads the output."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Model)
    print(server.server_address[1], flush=True)  # noqa: T201  the test wants to know the port
    server.serve_forever()

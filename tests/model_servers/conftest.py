"""Real server processes on unix sockets, a plain HTTP client for them, and small models to serve."""

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from model_servers.manifest import Manifest, write_artifact
from model_servers.tensors import TensorSpec

ARTIFACTS = Path(__file__).parents[2] / "model_servers" / "artifacts"
DEADLINE_S = 30


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("model", timeout=DEADLINE_S)
        self._path = str(path)

    def connect(self):
        """Connects to the unix socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(self._path)


class Reply:
    """One response."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        """The body, read as JSON."""
        return json.loads(self.body)


class ServerProcess:
    """One `python -m model_servers`, its output read line by line."""

    def __init__(self, directory, listen, *options, env=None):
        self.socket = Path(listen.removeprefix("unix:"))
        command = [sys.executable, "-m", "model_servers", str(directory), "--listen", listen, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=env)
        self._seen = b""

    def wait_for(self, word):
        """The first output line with `word` that has not been asked for yet."""
        deadline = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                while b"\n" in self._seen:
                    line, self._seen = self._seen.split(b"\n", 1)
                    if word in line.decode():
                        return line.decode()
                if selector.select(0.5):
                    part = os.read(self.process.stdout.fileno(), 65536)
                    if not part:
                        break
                    self._seen += part
        ended = self.process.poll()
        pytest.fail(f"no line with {word!r}; exit {ended}: {self.process.stderr.read() if ended else 'it runs'}")

    def connect(self):
        """A connection of its own."""
        return _UnixConnection(self.socket)

    def request(self, method, path, body=None, headers=None):
        """One request on a connection of its own."""
        connection = self.connect()
        try:
            return self.exchange(connection, method, path, body, headers)
        finally:
            connection.close()

    def exchange(self, connection, method, path, body=None, headers=None):
        """One request on a connection that stays open."""
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def infer(self, document, name="digits", headers=None):
        """One inference; `document` as JSON, or a body as it is."""
        body = document if isinstance(document, bytes | str) else json.dumps(document)
        return self.request(
            "POST", f"/v2/models/{name}/infer", body, {"Content-Type": "application/json", **(headers or {})}
        )

    def stop(self, number=signal.SIGTERM):
        """Sends the signal and waits for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def end(self):
        """Ends the process, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="session")
def artifacts():
    return ARTIFACTS


@pytest.fixture(scope="session")
def start_server():
    """Starts servers: `start_server(directory, *options)`; waits for the ready line unless `ready=False`."""
    with tempfile.TemporaryDirectory(prefix="perch-ms-") as folder, contextlib.ExitStack() as stack:
        count = 0

        def start(directory, *options, ready=True, path=None, env=None, tcp=False):
            nonlocal count
            count += 1
            listen = "127.0.0.1:0" if tcp else f"unix:{path or Path(folder) / f'{count}.sock'}"
            server = ServerProcess(directory, listen, *options, env=env)
            stack.callback(server.end)
            if ready:
                server.ready_line = server.wait_for("ready")
                server.address = server.ready_line.partition(" on ")[2].partition(",")[0]
            return server

        yield start


@pytest.fixture(scope="session")
def without_orjson(tmp_path_factory):
    """An environment in which orjson cannot be imported."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "orjson.py").write_text("raise ImportError('hidden')")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="session", params=["fast json", "standard json"])
def digits_server(request, start_server, artifacts, without_orjson):
    """The shipped perceptron, with and without orjson."""
    options = ("--arm", "canary", "--largest-body", "1000000")
    env = without_orjson if request.param == "standard json" else None
    return start_server(artifacts / "digits" / "2", *options, env=env)


@pytest.fixture(scope="session")
def python_model():
    """Writes a version directory of the Python backend: `python_model(directory, code, inputs, outputs, ...)`."""

    def write(directory, code, inputs, outputs, *, version="1", options=None, examples=None, prediction=None):
        manifest = Manifest(
            name="own",
            version=version,
            backend="python",
            inputs=tuple(TensorSpec(*spec) for spec in inputs),
            outputs=tuple(TensorSpec(*spec) for spec in outputs),
            prediction=prediction or outputs[0][0],
            options={"entry": "model.py:load", **(options or {})},
            examples=examples or {},
        )
        write_artifact(directory, manifest, {"model.py": code.encode()})
        return directory

    return write


@pytest.fixture
def pixels():
    """`pixels(n)`: a V2 document with n digits, and the tensor alone with `tensor=...` to bend it."""

    def document(n=1, **changes):
        data = [float((7 * i) % 17) for i in range(64 * n)]
        return {"inputs": [{"name": "pixels", "shape": [n, 64], "datatype": "FP32", "data": data, **changes}]}

    return document

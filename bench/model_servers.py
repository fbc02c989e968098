"""The model server beside MLServer and a bare aiohttp handler: same digits model, protocol, client; one process each.

    .venv/bin/python bench/model_servers.py [--rounds 5] [--seconds 2] [--flat 200000] [--mlserver PYTHON]

Rounds run the servers one after the other, 16 connections of wrk each; ratios are taken within a round, because a
machine's speed changes between rounds. CPU is the server's own, from /proc. Needs Linux and wrk. MLServer is never
installed by perch: make an environment of its own and name its Python (default: PERCH_BENCH_MLSERVER, else
/tmp/perch-mlserver/bin/python):

    python3 -m venv /tmp/perch-mlserver && /tmp/perch-mlserver/bin/pip install mlserver==1.7.1
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

# Run as a script, this file's folder comes first on the path, and its own name hides the package it measures.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from model_servers import jsontext  # noqa: E402  only found rightly after the line above

ARTIFACT = Path(__file__).parents[1] / "model_servers" / "artifacts" / "digits" / "2"
CONNECTIONS = 16
INFER = "/v2/models/digits/infer"
START_S = 60

# The same model as a runtime of MLServer, written as its documentation shows.
MLSERVER_RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Digits(MLModel):
    async def load(self):
        self.arrays = dict(np.load(self.settings.parameters.uri))
        return True

    async def predict(self, payload):
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        hidden = np.maximum(pixels @ self.arrays["weight_0"] + self.arrays["bias_0"], 0)
        scores = hidden @ self.arrays["weight_1"] + self.arrays["bias_1"]
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        outputs = [NumpyCodec.encode_output("label", scores.argmax(axis=1)),
                   NumpyCodec.encode_output("probabilities", shares)]
        return InferenceResponse(model_name=self.name, model_version="2", outputs=outputs)
"""


@dataclass(frozen=True, slots=True)
class Running:
    """One server process and the port it listens on."""

    name: str
    pid: int
    port: int
    start_s: float  # from the start of the process to its first answer of "ready"

    def rss_mib(self) -> float:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw of one server in one round."""

    per_s: float
    p99_ms: float
    cpu_us: float  # of the server, per request


@dataclass(frozen=True, slots=True)
class Body:
    """One request as wrk sends it, again and again."""

    rows: int
    blob: bytes
    headers: dict[str, str]

    def script(self, folder: Path) -> Path:
        """A wrk script for it."""
        blob, script = folder / f"{id(self)}.bin", folder / f"{id(self)}.lua"
        blob.write_bytes(self.blob)
        headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in self.headers.items())
        read = f'local f = io.open("{blob}", "rb")\nwrk.body = f:read("*a")\nf:close()\n'
        script.write_text(f'wrk.method = "POST"\n{headers}{read}')
        return script


def json_body(rows: int) -> Body:
    """`rows` digits in JSON, pixels as floats, flat."""
    data = [float(i * 7 % 17) for i in range(64 * rows)]
    document = {"inputs": [{"name": "pixels", "shape": [rows, 64], "datatype": "FP32", "data": data}]}
    return Body(rows, json.dumps(document).encode(), {"Content-Type": "application/json"})


def raw_body(rows: int) -> Body:
    """The same digits as raw bytes, answered as raw bytes."""
    blob = (np.arange(64 * rows) * 7 % 17).astype("<f4").tobytes()
    tensor = {"name": "pixels", "shape": [rows, 64], "datatype": "FP32", "parameters": {"binary_data_size": len(blob)}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    return Body(rows, text + blob, headers)


@contextlib.contextmanager
def running(name: str, port: int, command: list[str], cwd: Path | None = None) -> Iterator[Running]:
    """Starts a server and waits until it says that it is ready."""
    start_s = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _is_ready(port):
                if process.poll() is not None or time.perf_counter() - start_s > START_S:
                    raise SystemExit(f"{name} did not start: {' '.join(command)}")
                time.sleep(0.01)
            yield Running(name, process.pid, port, time.perf_counter() - start_s)
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wrk(server: Running, script: Path, seconds: float) -> Load:
    """One round of wrk; raises SystemExit when an answer was not a 200."""
    url = f"http://127.0.0.1:{server.port}{INFER}"
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--latency", "-s", str(script), url]
    before_s = server.cpu_s()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used_s = server.cpu_s() - before_s
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"{server.name} did not answer everything:\n{said}")
    requests = int(_found(r"(\d+) requests in", said))
    return Load(float(_found(r"Requests/sec:\s+([\d.]+)", said)), _milliseconds(said), used_s / requests * 1e6)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk said nothing like {pattern}:\n{text}")
    return match[1]


def _milliseconds(said: str) -> float:
    match = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    return 0.0 if match is None else float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match[2]]


def rounds(servers: list[Running], body: Body, count: int, seconds: float) -> dict[str, list[Load]]:
    """`count` interleaved rounds of every server."""
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    with tempfile.TemporaryDirectory() as folder:
        script = body.script(Path(folder))
        for _ in range(count):
            for server in servers:
                loads[server.name].append(wrk(server, script, seconds))
    return loads


def ratio(loads: dict[str, list[Load]], ours: str, other: str) -> float:
    """The median over rounds of requests per second, ours to the other's."""
    pairs = zip(loads[ours], loads[other], strict=True)
    return statistics.median(mine.per_s / theirs.per_s for mine, theirs in pairs)


def show(loads: dict[str, list[Load]], rows: int) -> None:
    """One line per server."""
    for name, seen in loads.items():
        per_s = statistics.median(load.per_s for load in seen)
        p99_ms = statistics.median(load.p99_ms for load in seen)
        cpu_us = statistics.median(load.cpu_us for load in seen)
        items = f" = {per_s * rows:9,.0f} items/s" if rows > 1 else ""
        print(f"  {name:28} {per_s:9,.0f} requests/s{items}  p99 {p99_ms:6.2f} ms  server CPU {cpu_us:6.0f} us")


def ours(stack: contextlib.ExitStack, name: str, *options: str) -> Running:
    """Our server on the shipped perceptron."""
    port = free_port()
    command = [sys.executable, "-m", "model_servers", str(ARTIFACT), "--listen", f"127.0.0.1:{port}", "--drain", "0"]
    return stack.enter_context(running(name, port, [*command, *options]))


def bare(stack: contextlib.ExitStack) -> Running:
    """An aiohttp handler that reads the body and answers a constant."""
    port = free_port()
    command = [sys.executable, __file__, "--serve-bare", str(port)]
    return stack.enter_context(running("bare aiohttp handler", port, command))


def mlserver(stack: contextlib.ExitStack, python: Path) -> Running | None:
    """MLServer with the same model, without its worker processes; None, with a line, when it is not there."""
    if not python.exists():
        print(f"  MLServer is not measured: {python} does not exist; {__doc__.strip().splitlines()[-1].strip()}")
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    port = free_port()
    settings = {"parallel_workers": 0, "http_port": port, "grpc_port": free_port(), "host": "127.0.0.1"}
    model = {"name": "digits", "implementation": "runtime.Digits", "parameters": {"uri": str(ARTIFACT / "model.npz")}}
    (folder / "settings.json").write_text(json.dumps({**settings, "debug": False, "metrics_endpoint": None}))
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "runtime.py").write_text(MLSERVER_RUNTIME)
    command = [str(python), "-c", "from mlserver.cli import main; main()", "start", "."]
    return stack.enter_context(running("MLServer", port, command, folder))


def compare(given: Any) -> None:
    """Single requests side by side, then our own batches."""
    with contextlib.ExitStack() as stack:
        mine = ours(stack, "perch model server")
        alone = ours(stack, "the same, --max-batch 1", "--max-batch", "1")
        theirs = mlserver(stack, given.mlserver)
        servers = [mine, alone, bare(stack), *([theirs] if theirs else [])]
        print(f"one digit per request, JSON ({'orjson' if jsontext.ORJSON else 'standard json'}):")
        loads = rounds(servers, json_body(1), given.rounds, given.seconds)
        show(loads, 1)
        print(f"  against a bare handler {ratio(loads, mine.name, 'bare aiohttp handler'):.2f}x", end="")
        print(f", merging against none {ratio(loads, mine.name, alone.name):.2f}x", end="")
        print(f", against MLServer {ratio(loads, mine.name, 'MLServer'):.1f}x" if theirs else "")
        for server in servers:
            print(f"  {server.name:28} start to ready {server.start_s:5.2f} s, {server.rss_mib():4.0f} MiB")
        batches(mine, given)
        flat(mine, given.flat)


def batches(server: Running, given: Any) -> None:
    """100 digits per request against one, in both encodings."""
    for name, make in (("JSON", json_body), ("raw bytes", raw_body)):
        one: list[Load] = []
        hundred: list[Load] = []
        for _ in range(given.rounds):
            one += rounds([server], make(1), 1, given.seconds)[server.name]
            hundred += rounds([server], make(100), 1, given.seconds)[server.name]
        print(f"{name}, one digit and 100 per request:")
        show({server.name: one}, 1)
        show({server.name: hundred}, 100)
        ratios = [100 * many.per_s / single.per_s for many, single in zip(hundred, one, strict=True)]
        print(f"  items/s {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})")


def batching(given: Any) -> None:
    """What the two limits of a batch do: one digit per request, over the largest batch and the longest wait."""
    limits = [("--max-batch", rows, "--max-wait", "2") for rows in ("1", "4", "16", "128")]
    limits += [("--max-batch", "128", "--max-wait", wait) for wait in ("0", "10")]
    with contextlib.ExitStack() as stack:
        servers = [ours(stack, f"batch {each[1]}, wait {each[3]} ms", *each) for each in limits]
        print("one digit per request, JSON, by largest batch and longest wait:")
        show(rounds(servers, json_body(1), given.rounds, given.seconds), 1)


def flat(server: Running, requests: int) -> None:
    """Memory over many requests."""
    first_mib = server.rss_mib()
    done = 0.0
    with tempfile.TemporaryDirectory() as folder:
        script = json_body(1).script(Path(folder))
        while done < requests:
            done += wrk(server, script, 10).per_s * 10
    print(f"memory over {done:,.0f} more requests: {first_mib:.1f} > {server.rss_mib():.1f} MiB")


async def _answer_bare(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=b'{"ok":1}', content_type="application/json")


async def serve_bare(port: int) -> None:
    """The bare handler's process."""
    app = web.Application()
    app.router.add_post(INFER, _answer_bare)
    app.router.add_get("/v2/health/ready", _answer_bare)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    default = os.environ.get("PERCH_BENCH_MLSERVER", "/tmp/perch-mlserver/bin/python")  # noqa: S108  see the docstring
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--flat", type=int, default=50_000, help="requests of the memory run")
    parser.add_argument("--mlserver", type=Path, default=Path(default), help="a Python that has mlserver")
    parser.add_argument("--serve-bare", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments or [])
    if given.serve_bare:
        import uvloop  # noqa: PLC0415  both servers run on the same loop

        uvloop.run(serve_bare(given.serve_bare))
    elif shutil.which("wrk") is None:
        print("  not measured: wrk is not installed (apt-get install wrk)")
    else:
        compare(given)
        batching(given)


if __name__ == "__main__":
    main(sys.argv[1:])

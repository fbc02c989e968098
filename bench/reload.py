"""What a flag edit costs: the time until the first answer under it, and the delay it causes to other requests.

Starts a real `perch serve`, asks it over its socket as fast as it answers, and edits the flag file meanwhile.
"""

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.decision import message
from extproc.flagcompiler import NICE

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
EDITS = 12
MANY = 1_000
TRANSPORTS = ("grpcio", "fast")


def write_flags(path: Path, count: int, percent: int) -> None:
    """A flag file of `count` flags, put in place by a rename."""
    flags = "".join(f"  m{i}: {{canary: {percent}}}\n" for i in range(count))
    new = path.with_name("new.yaml")
    new.write_text(f"version: 1\nflags:\n{flags}")
    new.replace(path)


def write_models(path: Path, count: int) -> None:
    """A models file to go with it."""
    path.write_text("".join(f"m{i}: {{prefix: /v2/models/m{i}/, stable: [127.0.0.1:1]}}\n" for i in range(count)))


class Client:
    """Asks one question at a time and reads the version and the time of each answer."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._ask = self._channel.stream_stream(METHOD)
        self._message = message()
        grpc.channel_ready_future(self._channel).result(timeout=20)

    def ask(self) -> tuple[bytes, float]:
        """The reply and how long it took, in milliseconds."""
        began = time.perf_counter()
        reply = next(iter(self._ask(iter([self._message]))))
        return reply, (time.perf_counter() - began) * 1e3

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()


@contextlib.contextmanager
def served(folder: Path, count: int, transport: str) -> Iterator[tuple[Client, int]]:
    """A running serve with `count` flags: a client of it and its pid."""
    flags, models, socket = folder / "flags.yaml", folder / "models.yaml", folder / "s.sock"
    write_flags(flags, count, 1)
    write_models(models, count)
    env = {**os.environ, "PERCH_LOG_LEVEL": "error", "PERCH_TRANSPORT": transport}
    command = [sys.executable, "-m", "extproc", "serve", "--listen", f"unix:{socket}", "--flags", str(flags)]
    process = subprocess.Popen([*command, "--models", str(models), "--state", str(folder / "state")], env=env)
    try:
        wait_for(socket.exists)
        client = Client(socket)
        wait_for(lambda: b"SPLIT" in client.ask()[0])
        yield client, process.pid
        client.close()
    finally:
        process.terminate()
        process.wait()


def wait_for(condition: object) -> None:
    """Waits up to 30 s for something to become true."""
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit("perch serve did not get ready")
        time.sleep(0.02)


def edit(client: Client, flags: Path, count: int, percent: int) -> tuple[float, list[float]]:
    """Edits the file: ms until the first answer under the new rules, and the ms of every answer meanwhile."""
    before = version_of(client.ask()[0])
    write_flags(flags, count, percent)
    began = time.perf_counter()
    latencies = []
    while True:
        reply, took_ms = client.ask()
        latencies.append(took_ms)
        if version_of(reply) != before:
            return (time.perf_counter() - began) * 1e3, latencies


def version_of(reply: bytes) -> bytes:
    """The ruleset's version, as it stands in the reply's metadata."""
    at = reply.index(b"version") + len(b"version")
    return reply[at : at + 24]


def rss_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmRSS")


def main(transport: str = "fast") -> None:
    """Prints the figures for one flag and for many, beside the same client's figures without an edit."""
    for count in (1, MANY):
        with tempfile.TemporaryDirectory() as name, served(Path(name), count, transport) as (client, pid):
            quiet = [client.ask()[1] for _ in range(3000)]
            with busy_elsewhere():
                busy = [client.ask()[1] for _ in range(3000)]
            percents = itertools.cycle((2, 3))
            edits = [edit(client, Path(name) / "flags.yaml", count, next(percents)) for _ in range(EDITS)]
            took = [ms for ms, _ in edits]
            during = sorted(ms for _, latencies in edits for ms in latencies)
            print(f"{count} flag(s), transport {transport}")
            print(f"  edit to first answer under it  {statistics.median(took):7.1f} ms  (max {max(took):.1f})")
            print(f"  one answer, no edit            {spread(sorted(quiet))}")
            print(f"  one answer, a core busy        {spread(sorted(busy))}")
            print(f"  one answer, while reloading    {spread(during)}")
            print(f"  memory of serve                {rss_mib(pid):7.1f} MiB")


@contextlib.contextmanager
def busy_elsewhere() -> Iterator[None]:
    """Another process that computes, at the flag compiler's priority: what reloading costs without perch's part."""
    command = [sys.executable, "-c", f"import os\nos.nice({NICE})\nwhile True: pass"]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def spread(ordered: list[float]) -> str:
    """p50, p99 and max of sorted milliseconds."""
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return f"p50 {statistics.median(ordered):.2f} ms, p99 {p99:.2f} ms, max {ordered[-1]:.2f} ms"


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How many CPU instructions Envoy executes per request on each path of `perch bench`: a figure no neighbour changes.

Everything runs as `perch bench` runs it, but Envoy under valgrind's callgrind, which counts what it executes, all its
threads together. A third path, "smallest", is the fast lane's server behind the smallest ext_proc filter that Envoy
takes: one header forwarded, and of the optional settings none. That server, told no path, answers with the cohort that
a request without a flag gets: it sets one header, and has the route chosen anew. So this is what Envoy's ext_proc costs
whatever perch's configuration asks of it.

Limits of time are raised on every path, as Envoy is some fifty times slower under valgrind; so the times of this run
mean nothing, and are not told. In the figures are Envoy's chores as well, some 0.4 million instructions a second, 1 or
2% of them. Two runs differ by up to 3%: who else is busy changes how many requests Envoy takes up at once.

Valgrind has no restartable sequences (rseq), without which Envoy's allocator (tcmalloc) takes its slow path; so the
count without the allocator is told as well. Envoy links its allocator into ELF sections of their own (google_malloc,
malloc_hook), and valgrind ties only .text to a file: what callgrind finds in no file, `[???]`, is the allocator.
"""

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from extproc.bench.load import BenchError, Tools, throughput
from extproc.bench.programs import Plan, Ports, last_words, processes, statsd_sink
from extproc.bench.samples import FAST, GRPCIO, OFF
from extproc.envoyadmin import EnvoyUnreachable
from extproc.envoyfile import EnvoyFileError
from extproc.supervisor import Event, EventKind, Process, StartFailed, Supervisor

SMALLEST = "smallest"
PATHS = {OFF: "filter off", SMALLEST: "smallest filter", FAST: "fast lane"}
PROGRAMS = ("valgrind", "callgrind_control", "callgrind_annotate", "wrk")
MISSING = "bench instructions needs valgrind and wrk on PATH (Debian, Ubuntu: apt-get install valgrind wrk)"
WARM_UP_S = 3
READY_WITHIN_S = 180.0
COMMAND_WITHIN_S = 120.0
PATIENCE_S = 30
PATIENCE = f"{PATIENCE_S}s"
"""Instead of each limit of time that Envoy, made slow, would not keep."""
_FUNCTION = re.compile(r"\s*([\d,]+) \(\s*[\d.]+%\)\s+(.+)")

Tree = Any


@dataclass(frozen=True, slots=True)
class Count:
    """What Envoy executed for so many requests of one path; `allocator` is the allocator's part of it."""

    requests: int
    instructions: int
    allocator: int

    @property
    def per_request(self) -> float:
        """Instructions per request."""
        return self.instructions / self.requests

    @property
    def without_allocator(self) -> float:
        """Instructions per request, of all but the allocator."""
        return (self.instructions - self.allocator) / self.requests


def bootstrap(tree: Tree) -> Tree:
    """The bench's configuration with the paths of this one, and with PATIENCE."""
    tree = deepcopy(tree)
    static = tree["static_resources"]
    listeners = {one["name"]: one for one in static["listeners"]}
    clusters = {one["name"]: one for one in static["clusters"] if one["name"] != GRPCIO}
    _ext_proc(listeners[FAST])["message_timeout"] = PATIENCE
    listeners[SMALLEST] = smallest_listener(listeners[FAST])
    for cluster in clusters.values():
        _make_patient(cluster)
    clusters[SMALLEST] = smallest_cluster(clusters[FAST])
    static["listeners"] = [listeners[name] for name in PATHS]
    static["clusters"] = list(clusters.values())
    return tree


def smallest_listener(fast: Tree) -> Tree:
    """As the fast lane's, but with no more of the filter than Envoy needs to ask about the request's headers."""
    listener = deepcopy(fast)
    listener["name"] = SMALLEST
    manager = _manager(listener)
    manager["stat_prefix"] = SMALLEST
    ext_proc, router = manager["http_filters"][0], manager["http_filters"][-1]
    manager["http_filters"] = [ext_proc, router]
    ext_proc["typed_config"] = {
        "@type": ext_proc["typed_config"]["@type"],
        "grpc_service": {"envoy_grpc": {"cluster_name": SMALLEST}},
        "message_timeout": PATIENCE,
        "processing_mode": {"response_header_mode": "SKIP"},
        "forward_rules": {"allowed_headers": {"patterns": [{"exact": "x-user-id"}]}},
    }
    return listener


def smallest_cluster(fast: Tree) -> Tree:
    """The fast lane's server again: HTTP/2 at its socket, nothing else."""
    options = deepcopy(fast["typed_extension_protocol_options"])
    for one in options.values():
        one["explicit_http_config"] = {"http2_protocol_options": {}}
    return {
        "name": SMALLEST,
        "type": fast["type"],
        "connect_timeout": PATIENCE,
        "typed_extension_protocol_options": options,
        "load_assignment": {**fast["load_assignment"], "cluster_name": SMALLEST},
    }


def _make_patient(cluster: Tree) -> None:
    cluster["connect_timeout"] = PATIENCE
    for check in cluster.get("health_checks", ()):
        check["timeout"] = PATIENCE
    for options in cluster["typed_extension_protocol_options"].values():
        http2 = options["explicit_http_config"]["http2_protocol_options"]
        if "connection_keepalive" in http2:
            http2["connection_keepalive"]["timeout"] = PATIENCE


def _manager(listener: Tree) -> Tree:
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def _ext_proc(listener: Tree) -> Tree:
    return _manager(listener)["http_filters"][0]["typed_config"]


def programs(folder: Path, statsd: str, ports: Ports) -> list[Process]:
    """What `perch bench` runs, without grpc.aio, and Envoy under callgrind. Raises EnvoyFileError without an Envoy."""
    found = [one for one in processes(Plan(rounds=1, seconds=1), folder, statsd, ports) if one.name != GRPCIO]
    config = folder / "envoy.yaml"
    tree = bootstrap(yaml.load(config.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    config.write_text(yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8")
    callgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts")
    # A supervisor's probe may take five seconds, and Envoy's first answer more: `_start` asks for it.
    return [replace(one, argv=(*callgrind, *one.argv), ready=None) if one.name == "envoy" else one for one in found]


async def measure(seconds: int) -> dict[str, Count]:
    """Starts everything, counts on each path for so many seconds, stops everything. Raises BenchError and others."""
    with tempfile.TemporaryDirectory(prefix="perch-bench-", ignore_cleanup_errors=True) as name, statsd_sink() as sink:
        folder = Path(name)
        ports = Ports(folder, PATIENCE_S)
        died: list[str] = []
        counts: dict[str, Count] = {}
        supervisor = Supervisor(programs(folder, sink, ports), partial(_note, died))
        try:
            await _start(supervisor, folder, ports, died)
            callgrind = Callgrind(supervisor.pids()["envoy"], folder)
            for path in PATHS:
                load = partial(_load, await ports.url(path), folder)
                counts[path] = await _count(path, callgrind, load, seconds)
            await _check(died, ports)
        finally:
            await ports.close()
            await supervisor.stop()
    return counts


async def _start(supervisor: Supervisor, folder: Path, ports: Ports, died: Sequence[str]) -> None:
    """Raises BenchError when something ends before it is ready, or is not ready in time."""
    print("starting Envoy under valgrind, which takes up to a minute", flush=True)
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            await supervisor.start()
            await _until_answering(ports, died)
    except StartFailed as error:
        raise BenchError(f"{error}: {last_words(folder, str(error).partition(':')[0])}") from None
    except TimeoutError:
        words = last_words(folder, "envoy") or "its log is empty"
        raise BenchError(f"not everything was ready after {READY_WITHIN_S:g} s; Envoy: {words}") from None
    if died:
        raise BenchError(died[0])


async def _until_answering(ports: Ports, died: Sequence[str]) -> None:
    while not died:
        with suppress(EnvoyUnreachable, OSError):  # of what is not up yet
            if await ports.answering((FAST, SMALLEST)):
                return
        await asyncio.sleep(0.5)


def _note(died: list[str], event: Event) -> None:
    if event.kind is EventKind.DIED:
        died.append(f"{event.process} died: {event.detail}")


async def _check(died: Sequence[str], ports: Ports) -> None:
    """Raises BenchError when what was counted is not what was meant."""
    if died:
        raise BenchError(died[0])
    if unanswered := await ports.unanswered():
        raise BenchError(f"Envoy let {unanswered} requests through without an answer: the figures mean nothing")


class Callgrind:
    """Switches the counting of one program on and off. Its counts are written in `folder`."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid = str(pid)
        self._folder = folder

    async def begin(self) -> None:
        """Counts. Valgrind translates all code anew for that, so the first requests from here on take seconds."""
        await self._order("-i", "on")

    async def zero(self) -> None:
        """Counts from zero."""
        await self._order("-z")

    async def end(self) -> tuple[int, int]:
        """Stops; instructions since `zero`, and the allocator's part of them."""
        before = set(self._folder.glob("counts.*"))
        await self._order("-d")
        await self._order("-i", "off")
        written = set(self._folder.glob("counts.*")) - before
        if len(written) != 1:
            raise BenchError(f"callgrind wrote {len(written)} files of counts where it should write one")
        return read_counts(await _said("callgrind_annotate", "--threshold=100", str(written.pop())))

    async def _order(self, *order: str) -> None:
        await _said("callgrind_control", *order, self._pid)


def read_counts(annotated: str) -> tuple[int, int]:
    """Of callgrind_annotate's text: all instructions, and those of functions that are in no file.

    A line is `1,234 (5.67%)  SOURCE:FUNCTION [FILE]`, and one of them the total.
    """
    total, allocator = 0, 0
    for line in annotated.splitlines():
        if match := _FUNCTION.match(line):
            own = int(match[1].replace(",", ""))
            if match[2].strip() == "PROGRAM TOTALS":
                total = own
            elif match[2].rstrip().endswith("[???]"):
                allocator += own
    if not total:
        raise BenchError("callgrind counted nothing")
    return total, allocator


async def _said(*command: str) -> str:
    """What a command printed. Raises BenchError when it fails or takes too long."""
    run = partial(subprocess.run, command, capture_output=True, text=True, timeout=COMMAND_WITHIN_S, check=False)
    try:
        done = await asyncio.to_thread(run)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]} did not end within {COMMAND_WITHIN_S:g} s") from None
    if done.returncode:
        raise BenchError(f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}")
    return str(done.stdout)


async def _count(path: str, callgrind: Callgrind, load: Callable[[int], Awaitable[int]], seconds: int) -> Count:
    print(f"{PATHS[path]}: warming up, {WARM_UP_S} s", flush=True)
    await callgrind.begin()
    await load(WARM_UP_S)
    await callgrind.zero()
    print(f"{PATHS[path]}: counting, {seconds} s", flush=True)
    requests = await load(seconds)
    if not requests:
        raise BenchError(f"{PATHS[path]}: no request was answered in {seconds} s")
    return Count(requests, *await callgrind.end())


async def _load(url: str, folder: Path, seconds: int) -> int:
    """How many requests wrk got answered. Raises BenchError if one failed."""
    return (await throughput(Tools(shutil.which("wrk"), None), url, seconds, folder, PATIENCE_S)).requests


def show(counts: dict[str, Count]) -> None:
    """Prints the table; the ratios are to the path without a filter."""
    off = counts[OFF]
    print("Instructions of Envoy per request, in thousands")
    print(f"{'':<17}{'requests':>9}{'all':>9}{'/ off':>8}{'without allocator':>20}{'/ off':>8}")
    for path, count in counts.items():
        every, without = count.per_request, count.without_allocator
        print(
            f"{PATHS[path]:<17}{count.requests:>9,}{every / 1e3:>9.1f}{every / off.per_request:>7.2f}x"
            f"{without / 1e3:>20.1f}{without / off.without_allocator:>7.2f}x"
        )


def main() -> None:
    """Prints a table of all paths. Exits with 2 where valgrind or wrk is missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=12, help="of load on each path while counting")
    wanted = options.parse_args()
    if wanted.seconds < 1:
        options.error("--seconds must be at least 1")
    if any(shutil.which(program) is None for program in PROGRAMS):
        print(MISSING, file=sys.stderr)
        raise SystemExit(2)
    try:
        show(asyncio.run(measure(wanted.seconds)))
    except (BenchError, EnvoyFileError, EnvoyUnreachable, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

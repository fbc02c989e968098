"""What ext_proc costs: interleaved rounds of filter off, fast lane and grpcio, through one real Envoy, in one run.

    .venv/bin/python bench/transport.py [--rounds 5] [--seconds 3] [--json FILE] [--bare]

One Envoy with one worker has a listener for each path, all with the same direct response behind, so a round differs
from the next in nothing but the filter. Each round runs the paths one after the other; ratios are taken within a round,
because a machine's speed changes between rounds. CPU is read from /proc, so it is the server's and Envoy's own.

The answer is perch's own, with three flags; `--bare` answers with one constant instead, which leaves
the transport alone. Needs Linux, and wrk; with h2load also the latency at a fixed rate of 1,000 requests a second.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import uvloop

from extproc.core.flags import Exposures
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.transport.fastlane import FastLane
from extproc.transport.grpcio import GrpcioTransport
from extproc.wire.answer import Answerer, Published
from extproc.wire.replies import OTHER_PHASES, replies

TRANSPORTS = ("fastlane", "grpcio")
PATHS = ("off", *TRANSPORTS)
CONNECTIONS = 32
RATE_PER_S = 1_000
HEADERS = ("x-user-id: user-4711", "x-session-id: s-1", "x-tenant: acme", "x-region: eu-west", "accept: */*")
FORWARDED = (":path", "x-user-id", "x-session-id", "x-tenant", "x-region", "x-request-id")
FLAGS = """
version: 1
flags:
  digits:
    unit: [x-user-id, x-session-id]
    salt: bench
    canary: 50
  letters: {model: letters, salt: bench2, canary: 5}
  faces: {model: faces, salt: bench3, canary: 1}
"""
MODELS = {name: f"/v2/models/{name}/" for name in ("digits", "letters", "faces")}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    """One path in one round. Latencies are at RATE_PER_S and None without h2load; CPU is per request."""

    path: str
    round: int
    requests_per_s: float
    server_us: float | None
    envoy_us: float
    p50_us: float | None
    p99_us: float | None


# The servers under test, each in a process of its own: `transport.py serve NAME LISTEN [--bare]`.


def make_answer(*, bare: bool) -> Callable[[bytes], bytes]:
    """What perch answers over FLAGS, or a constant."""
    content = FLAGS.encode()
    ruleset = compile_ruleset(
        parse(read_document(content), MODELS).flags, Exposures(), MODELS, version="0123456789ab.1"
    )
    answer = Answerer(Published(ruleset, replies(ruleset.choices, "0123456789ab.1"), OTHER_PHASES))
    if not bare:
        return answer
    constant = replies(ruleset.choices[:1], "0123456789ab.1")[0]
    return lambda _message: constant


async def serve(name: str, listen: str, *, bare: bool) -> None:
    """Serves until SIGTERM."""
    answer = make_answer(bare=bare)
    transport = FastLane(answer, lambda: True) if name == "fastlane" else GrpcioTransport(answer, lambda: True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await transport.start(listen)
    print("ready", flush=True)
    await ended.wait()
    await transport.stop(0.5)


def run_server(name: str, listen: str, *, bare: bool) -> None:
    """The fast lane on uvloop, as perch runs it; grpc.aio has its own poller."""
    run = uvloop.run if name == "fastlane" else asyncio.run
    run(serve(name, listen, bare=bare))


# Envoy.

FILTER = """
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {{envoy_grpc: {{cluster_name: {name}, skip_envoy_headers: true}}}}
              failure_mode_allow: true
              message_timeout: 1s
              stat_prefix: {name}
              processing_mode: {{response_header_mode: SKIP}}
              forward_rules: {{allowed_headers: {{patterns: [{forwarded}]}}}}
              mutation_rules: {{disallow_all: true, allow_expression: {{regex: x-model-cohort}}}}
              metadata_options: {{receiving_namespaces: {{untyped: [perch]}}}}"""
LISTENER = """
  - name: "{name}"
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: "{name}"
          http_filters:{filter}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: v
              domains: ["*"]
              routes:
              - match: {{prefix: "/", headers: [{{name: x-model-cohort, string_match: {{exact: canary}}}}]}}
                direct_response: {{status: 200, body: {{inline_string: canary}}}}
              - {{match: {{prefix: "/"}}, direct_response: {{status: 200, body: {{inline_string: stable}}}}}}"""
CLUSTER = """
  - name: {name}
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: {name}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{pipe: {{path: {folder}/{name}.sock}}}}}}}}]}}]"""


def envoy_config(folder: Path) -> str:
    """A bootstrap with one listener for each path."""
    forwarded = ", ".join(f'{{exact: "{name}"}}' for name in FORWARDED)
    filters = {"off": ""} | {name: FILTER.format(name=name, forwarded=forwarded) for name in TRANSPORTS}
    return "".join(
        (
            "node: {id: bench, cluster: bench}\n",
            "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n",
            "layered_runtime: {layers: [{name: static, static_layer: ",
            "{envoy.reloadable_features.ext_proc_graceful_grpc_close: true}}]}\n",
            "static_resources:\n  listeners:",
            *(LISTENER.format(name=name, filter=filters[name]) for name in PATHS),
            "\n  clusters:",
            *(CLUSTER.format(name=name, folder=folder) for name in TRANSPORTS),
        )
    )


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(10)


def says_ready(log: Path) -> bool:
    """Whether a server has printed that it listens."""
    return "ready" in log.read_text()


def fetch(url: str) -> bytes:
    """The body of a GET."""
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310  our own Envoy
        body: bytes = response.read()
        return body


def wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    """Polls for 15 seconds."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.05)
    sys.exit(f"bench: {what} did not start; its last words:\n{log.read_text()[-2000:]}")


# Measuring.


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process, from /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def latencies_us(url: str, seconds: float, log: Path) -> tuple[float | None, float | None]:
    """(p50, p99) at RATE_PER_S over ten connections; (None, None) without h2load."""
    if shutil.which("h2load") is None:
        return None, None
    headers = [part for header in HEADERS for part in ("-H", header)]
    command = ["h2load", "--h1", "-c10", "-t1", f"--rps={RATE_PER_S // 10}", f"-D{max(1, round(seconds))}"]
    log.unlink(missing_ok=True)
    subprocess.run([*command, f"--log-file={log}", *headers, url], check=True, capture_output=True)
    times = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    return float(times[len(times) // 2]), float(times[len(times) * 99 // 100])


def found(pattern: str, report: str) -> str:
    """What the pattern's group matches in a report of wrk."""
    match = re.search(pattern, report)
    if match is None:
        sys.exit(f"bench: wrk printed nothing like {pattern!r}:\n{report}")
    return match[1]


def measure(path: str, number: int, url: str, pids: dict[str, int], arguments: argparse.Namespace) -> Sample:
    """One path in one round."""
    headers = [part for header in HEADERS for part in ("-H", header)]
    server = pids.get(path)
    before_envoy, before_server = cpu_s(pids["envoy"]), cpu_s(server) if server else 0.0
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{arguments.seconds}s", *headers, url]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    envoy_s, server_s = cpu_s(pids["envoy"]) - before_envoy, (cpu_s(server) if server else 0.0) - before_server
    requests = int(found(r"(\d+) requests in", report))
    if "Non-2xx" in report or "Socket errors" in report:
        sys.exit(f"bench: {path} failed requests:\n{report}")
    rate = float(found(r"Requests/sec:\s+([\d.]+)", report))
    p50_us, p99_us = latencies_us(url, arguments.seconds, Path(arguments.folder) / "h2load.log")
    server_us = server_s / requests * 1e6 if server else None
    return Sample(path, number, rate, server_us, envoy_s / requests * 1e6, p50_us, p99_us)


def failed_open(admin: str) -> int:
    """Requests that Envoy let through without an answer; a bench with any of those measured nothing."""
    stats = json.loads(fetch(f"http://{admin}/stats?format=json&filter=failure_mode_allowed|streams_failed"))["stats"]
    return sum(stat.get("value", 0) for stat in stats)


def run(arguments: argparse.Namespace) -> list[Sample]:
    """Starts everything, warms up, and runs the rounds."""
    folder = Path(arguments.folder)
    script, config, admin_file = Path(__file__).resolve(), folder / "envoy.yaml", folder / "admin.txt"
    config.write_text(envoy_config(folder))
    pids: dict[str, int] = {}

    def admin() -> str:
        return admin_file.read_text().strip()

    with contextlib.ExitStack() as stack:
        for name in TRANSPORTS:
            log = folder / f"{name}.log"
            command = [sys.executable, str(script), "serve", name, f"unix:{folder}/{name}.sock"]
            process = stack.enter_context(running([*command, *(["--bare"] if arguments.bare else [])], log))
            pids[name] = process.pid
            wait_for(partial(says_ready, log), name, log)
        envoy = str(Path(sys.executable).with_name("envoy"))
        command = [envoy, "-c", str(config), "--admin-address-path", str(admin_file), "--concurrency", "1"]
        log = folder / "envoy.log"
        options = ["--use-dynamic-base-id", "--log-level", "warning"]
        pids["envoy"] = stack.enter_context(running([*command, *options], log)).pid
        wait_for(lambda: ":" in admin_file.read_text() and b"LIVE" in fetch(f"http://{admin()}/ready"), "envoy", log)

        listeners = json.loads(fetch(f"http://{admin()}/listeners?format=json"))["listener_statuses"]
        ports = {one["name"]: one["local_address"]["socket_address"]["port_value"] for one in listeners}
        urls = {path: f"http://127.0.0.1:{ports[path]}/v2/models/digits/infer" for path in PATHS}
        samples = rounds(urls, pids, arguments)
        if failed := failed_open(admin()):
            sys.exit(f"bench: Envoy let {failed} requests through without an answer; the numbers mean nothing")
    return samples


def rounds(urls: dict[str, str], pids: dict[str, int], arguments: argparse.Namespace) -> list[Sample]:
    """All rounds, after one that is not counted. The order of the paths turns with each round."""
    samples = []
    for number in range(arguments.rounds + 1):
        turn = number % len(PATHS)
        for place, path in enumerate((*PATHS[turn:], *PATHS[:turn])):
            done = number * len(PATHS) + place
            if sys.stderr.isatty():
                print(f"\rround {number}/{arguments.rounds} {path:<9}{'#' * done}", end="", file=sys.stderr, flush=True)
            sample = measure(path, number, urls[path], pids, arguments)
            if number:
                samples.append(sample)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return samples


# Showing.


class Summary(TypedDict):
    """What a run found, as written by --json."""

    medians: dict[str, dict[str, float]]
    requests_ratio_min_median_max: dict[str, list[float]]
    samples: list[dict[str, object]]


def summary(samples: list[Sample]) -> Summary:
    """Medians for each path, and min, median, max of the ratios within a round."""
    by_path = {path: [sample for sample in samples if sample.path == path] for path in PATHS}
    names = ("requests_per_s", "server_us", "envoy_us", "p50_us", "p99_us")
    medians = {
        path: {
            name: statistics.median(values)
            for name in names
            if (values := [value for sample in group if (value := getattr(sample, name)) is not None])
        }
        for path, group in by_path.items()
    }
    ratios = {
        f"{path}/off": [a.requests_per_s / b.requests_per_s for a, b in zip(by_path[path], by_path["off"], strict=True)]
        for path in TRANSPORTS
    }
    spread = {name: [min(values), statistics.median(values), max(values)] for name, values in ratios.items()}
    return {"medians": medians, "requests_ratio_min_median_max": spread, "samples": [asdict(one) for one in samples]}


def show(result: Summary) -> None:
    """The table."""
    medians = result["medians"]
    print(f"{'':10}{'requests/s':>12}{'server us':>11}{'Envoy us':>10}{'p50 us':>9}{'p99 us':>9}")
    for path, row in medians.items():
        cells = [f"{row['requests_per_s']:12,.0f}"]
        for name, width in (("server_us", 11), ("envoy_us", 10), ("p50_us", 9), ("p99_us", 9)):
            cells.append(f"{row[name]:{width}.1f}" if name in row else f"{'-':>{width}}")
        print(f"{path:10}{''.join(cells)}")
    for name, (low, middle, high) in result["requests_ratio_min_median_max"].items():
        print(f"requests/s {name}: {low:.2f} {middle:.2f} {high:.2f} (min, median, max of rounds)")
    lane, aio, off = (medians[path] for path in ("fastlane", "grpcio", "off"))
    print(f"server CPU grpcio/fastlane: {aio['server_us'] / lane['server_us']:.1f}")
    if "p50_us" in off:
        added = {path: medians[path]["p50_us"] - off["p50_us"] for path in TRANSPORTS}
        print(f"p50 added at {RATE_PER_S}/s: fastlane {added['fastlane']:.0f} us, grpcio {added['grpcio']:.0f} us")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each path in each round")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--bare", action="store_true", help="a constant answer: the transport alone")
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command[:1] == ["serve"]:
        run_server(*arguments.command[1:], bare=arguments.bare)
        return
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is not on PATH; install it (Debian, Ubuntu: apt-get install wrk)")
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as folder:
        arguments.folder = folder
        result = summary(run(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    show(result)


if __name__ == "__main__":
    main()

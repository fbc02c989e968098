"""`python -m model_servers DIR --name digits --arm stable --listen unix:PATH`: one model server process.

DIR is a version directory (manifest.json and its files) or a folder of version directories, of which the newest is
served; a newer or changed version is loaded and warmed beside the old one and then takes over. SIGTERM: not ready at
once, answers for two health-check intervals more, finishes what is in flight, exits 0.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

# One thread within an inference, as for ONNX: small matrices lose by more, and several servers share a machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from extproc.metrics import Dialect, Metrics
from model_servers.app import Rules
from model_servers.batching import Limits
from model_servers.errors import ArtifactError, Refused
from model_servers.faults import parse_fault, read_faults
from model_servers.listen import CannotListen, host_and_port
from model_servers.manifest import read_manifest
from model_servers.server import Arm, Settings, serve
from model_servers.versions import newest

DRAIN_CHECKS = 2  # health checks that must see "not ready" before the listener closes


def main() -> None:
    """Exits 0 after a drain, 1 when it cannot start, 2 for usage."""
    try:
        settings = read_arguments(sys.argv[1:])
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings))
    except (ArtifactError, CannotListen) as error:
        sys.stderr.write(f"model_servers: {error}\n")
        sys.exit(1)


def read_arguments(arguments: list[str]) -> Settings:
    """The command line as Settings; usage errors exit 2. Raises ArtifactError when DIR has no version."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.fault and not given.allow_faults:
        parser.error("--fault needs --allow-faults")
    try:
        faults = read_faults(dict(map(parse_fault, given.fault))) if given.allow_faults else None
    except Refused as refusal:
        parser.error(f"--fault: {refusal}")
    try:
        Metrics(given.statsd).close()
    except ValueError as error:
        parser.error(f"--statsd: {error}")
    name = given.name or read_manifest(newest(given.directory)).name
    return Settings(
        rules=Rules(name, given.directory, given.largest_body, given.deadline),
        arm=given.arm,
        address=given.listen,
        drain_s=DRAIN_CHECKS * given.check_interval if given.drain is None else given.drain,
        reload_s=given.reload_interval,
        limits=Limits(given.max_batch, given.max_wait / 1000, given.max_queue),
        statsd=given.statsd,
        dialect=given.statsd_tags,
        faults=faults,
    )


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m model_servers", description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="version directory, or folder of version directories")
    add("--name", help="model name in the path (default: the manifest's)")
    add("--arm", type=Arm, choices=list(Arm), default=Arm.STABLE, help="for telemetry only (default: stable)")
    add("--listen", required=True, type=_address, metavar="unix:PATH|HOST:PORT")
    add("--check-interval", type=_seconds, default=1.0, metavar="S", help="of the health check in front (1)")
    add("--drain", type=_seconds, metavar="S", help="answer this long after SIGTERM (two check intervals)")
    add("--deadline", type=_seconds, default=15.0, metavar="S", help="longest time for one request (15)")
    add("--reload-interval", type=_seconds, default=1.0, metavar="S", help="looks for a new version; 0 = never (1)")
    add("--max-batch", type=_count, default=128, metavar="ROWS", help="rows of one model call (128)")
    add("--max-wait", type=_milliseconds, default=2.0, metavar="MS", help="for requests still arriving (2)")
    add("--max-queue", type=_count, default=1024, metavar="N", help="waiting requests; more get 503 (1024)")
    add("--largest-body", type=_count, default=8 << 20, metavar="BYTES", help="more gets 413 (8388608)")
    add("--statsd", metavar="HOST:PORT|unix:PATH", help="where metrics go (default: nowhere)")
    add("--statsd-tags", type=Dialect, choices=list(Dialect), default=Dialect.DOGSTATSD, help="how tags are written")
    add("--allow-faults", action="store_true", help="for rehearsals: faults may be set, here and at /perch/faults")
    add(
        "--fault", action="append", default=[], metavar="NAME=VALUE", help="a fault from the start, e.g. error_rate=0.1"
    )
    return parser


def _address(text: str) -> str:
    if not text.startswith("unix:"):
        try:
            host_and_port(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _seconds(text: str) -> float:
    return _between(text, 3600)


def _milliseconds(text: str) -> float:
    return _between(text, 1000)


def _between(text: str, most: float) -> float:
    number = float(text)
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {most:g}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if not 0 < number <= 1 << 31:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  absent on platforms it does not support
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    main()

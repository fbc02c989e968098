"""`python -m model_servers DIR --name digits --arm stable --listen unix:PATH`: one model server process."""

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from model_servers.errors import ArtifactError
from model_servers.listen import CannotListen, host_and_port
from model_servers.server import Arm, Settings, serve

DRAIN_CHECKS = 2  # health checks that must see "not ready" before the listener closes


def main() -> None:
    """Exits 0 after a drain, 1 when it cannot start, 2 for usage."""
    settings = read_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings))
    except (ArtifactError, CannotListen) as error:
        sys.stderr.write(f"model_servers: {error}\n")
        sys.exit(1)


def read_arguments(arguments: list[str]) -> Settings:
    """The command line as Settings; usage errors exit 2."""
    parser = argparse.ArgumentParser(prog="python -m model_servers", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="version directory: manifest.json and its files")
    parser.add_argument("--name", help="model name in the path (default: the manifest's)", default="digits")
    parser.add_argument("--arm", type=Arm, choices=list(Arm), default=Arm.STABLE, help="for telemetry only")
    parser.add_argument("--listen", required=True, type=_address, metavar="unix:PATH|HOST:PORT")
    parser.add_argument(
        "--check-interval", type=_seconds, default=1.0, metavar="S", help="of the health check in front"
    )
    parser.add_argument(
        "--drain", type=_seconds, metavar="S", help="answer this long after SIGTERM (default: 2 checks)"
    )
    given = parser.parse_args(arguments)
    drain_s = DRAIN_CHECKS * given.check_interval if given.drain is None else given.drain
    return Settings(given.directory, given.name, given.arm, given.listen, drain_s)


def _address(text: str) -> str:
    if not text.startswith("unix:"):
        try:
            host_and_port(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 3600 seconds")
    return seconds


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  absent on platforms it does not support
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    main()

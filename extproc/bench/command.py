"""`perch bench`: the options, and what is printed."""
# ruff: noqa: FBT002  a command's options are its interface, and this is how typer takes them
# ruff: noqa: PLC0415  a command imports what it needs: `perch --help` should not wait for all of it

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from extproc.options import Json, fail


def bench(
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often every path is measured.")] = 5,
    seconds: Annotated[
        int, typer.Option(min=1, max=600, help="Of load per path and round, and again for latency.")
    ] = 3,
    access_log: Annotated[bool, typer.Option("--access-log", help="Also with Envoy's access log on.")] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COMMAND", help="Another ext_proc server; SOCKET in it is where it must listen."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a file that ends in .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what ext_proc costs here: Envoy without it, with perch, and with perch on grpc.aio, in turns.

    One real Envoy with the shipped configuration answers all requests itself, so that a round differs from the next in
    nothing but the filter. wrk or h2load make the load; latencies at a fixed rate need h2load.
    """
    from extproc.bench.load import NO_LATENCY, BenchError, find_tools
    from extproc.bench.measuring import measure
    from extproc.bench.plot import svg
    from extproc.bench.programs import Plan
    from extproc.bench.samples import document
    from extproc.bench.showing import progress_bar, tables
    from extproc.envoyadmin import EnvoyUnreachable
    from extproc.envoyfile import EnvoyFileError

    if plot is not None and plot.suffix != ".svg":
        raise fail(f"--plot: {plot} must end in .svg", 2)
    plan = Plan(rounds=rounds, seconds=seconds, access_log=access_log, others=_others(also or []))
    try:
        tools = find_tools()
        if tools.h2load is None:
            typer.echo(f"perch: {NO_LATENCY}", err=True)
        with progress_bar() as step:
            samples = asyncio.run(measure(plan, tools, step))
        if plot is not None:
            plot.write_text(svg(samples), encoding="utf-8")
    except (BenchError, EnvoyFileError, EnvoyUnreachable, OSError) as error:
        raise fail(error) from None
    if as_json:
        about = {"cpus": os.cpu_count(), "load": tools.name, "rounds": rounds, "seconds": seconds}
        typer.echo(json.dumps(document(samples, about), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, width=max(100, shutil.get_terminal_size().columns))
    for table in tables(samples):
        console.print(table)
        console.print()


def _others(given: list[str]) -> dict[str, str]:
    """Name to command line. Exits with 2 for what is neither, or a name that is taken."""
    from extproc.bench.samples import FAST, GRPCIO, LOGGED, OFF

    others: dict[str, str] = {}
    for text in given:
        name, equals, command = text.partition("=")
        if not equals or not command.strip() or not name.replace("-", "").isalnum() or not name.isascii():
            raise fail(f"--also: {text!r} is not NAME=COMMAND, where NAME is letters, digits and hyphens", 2)
        if name in {OFF, FAST, GRPCIO, LOGGED, "envoy", "log", *others}:
            raise fail(f"--also: the name {name!r} is taken", 2)
        others[name] = command
    return others

"""`perch traffic`: the options, and what is printed."""
# ruff: noqa: FBT002  this is how typer takes a switch
# ruff: noqa: PLC0415  a command imports what it needs: `perch --help` should not wait for all of it
# ruff: noqa: PLR0913, PLR0917  a command's options are its interface

import asyncio
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extproc.options import Json, fail

if TYPE_CHECKING:
    from extproc.traffic.running import Plan

SECONDS = 60.0

USERS, ZIPF = 10_000, 0.75
"""The busiest tenth of these users sends half of the requests, and the busiest one 2.7 %; from 5 % on, perch asks
whether it is a person."""


def traffic(
    url: Annotated[str, typer.Option(help="Envoy's listener.")] = "http://127.0.0.1:10000",
    control: Annotated[str, typer.Option(help="The control API, to which labels go.")] = "http://127.0.0.1:8900",
    rate: Annotated[float, typer.Option(min=0.01, max=100_000, help="Requests per second, sent when due.")] = 50,
    seconds: Annotated[float | None, typer.Option(min=0.1, help=f"How long [default: {SECONDS:g}].")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many, at most.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=10_000, help="Requests under way at once, at most.")] = 64,
    users: Annotated[int, typer.Option(min=1, max=1_000_000, help="Different x-user-id.")] = USERS,
    zipf: Annotated[float, typer.Option(min=0, max=10, help="How much busier some users are; 0: all the same.")] = ZIPF,
    label_delay: Annotated[float, typer.Option(min=0, help="Seconds after which the truth is known.")] = 5,
    labels: Annotated[bool, typer.Option(help="Send labels back, as `accuracy`.")] = True,
    seed: Annotated[int | None, typer.Option(help="The same users and digits again.")] = None,
    model: Annotated[str, typer.Option(help="The model that is asked for digits.")] = "digits",
    token: Annotated[str | None, typer.Option(envvar="PERCH_TOKEN", help="Of the control API.")] = None,
    max_errors: Annotated[float, typer.Option(min=0, max=100, help="Percentage of errors that is no failure.")] = 50,
    as_json: Json = False,
) -> None:
    """Send realistic traffic: digits the models never saw, busy and quiet users, labels later. Ctrl-C sums up.

    User number k is 1 / k^ZIPF times as busy as the first; by default the busiest tenth sends half of the requests.

    Errors are answers of any status but 2xx and requests without an answer; what Ctrl-C stopped is none.

    Exit code 0: it ran to its end or to Ctrl-C, and of the requests at most --max-errors percent were errors.
    1: more were, or none was answered (the summary is printed all the same), or nobody listens. 2: a wrong option.
    """
    from extproc.traffic.arrivals import Crowd
    from extproc.traffic.digits import load_digits
    from extproc.traffic.running import Plan
    from extproc.traffic.sending import TrafficError
    from extproc.traffic.tally import NO_ANSWER

    for name, value in (
        ("rate", rate),
        ("seconds", seconds),
        ("zipf", zipf),
        ("label-delay", label_delay),
        ("max-errors", max_errors),
    ):
        if value is not None and not math.isfinite(value):
            raise fail(f"--{name}: {value} is no number to work with", 2)
    if seconds is None and requests is None:
        seconds = SECONDS
    digits = load_digits()
    plan = Plan(
        url=f"{url.rstrip('/')}/v2/models/{model}/infer",
        control=control.rstrip("/") if labels else None,
        token=token,
        crowd=Crowd(users=users, zipf=zipf, rate=rate, digits=len(digits), seed=seed),
        digits=digits,
        seconds=seconds,
        requests=requests,
        connections=connections,
        label_delay_s=label_delay,
    )
    try:
        document = asyncio.run(_run(plan))
    except TrafficError as error:
        raise fail(error) from None
    _print(document, as_json=as_json)
    if not document["answered"]:
        raise fail("no request was answered")
    errors, ended = document["errors"], document["answered"] + document["statuses"].get(NO_ANSWER, 0)
    if 100 * errors > max_errors * ended:
        raise fail(f"{errors:,} of {ended:,} requests were errors, more than {max_errors:g} %")


async def _run(plan: "Plan") -> dict[str, Any]:
    """Runs to the end or to Ctrl-C, with a progress bar."""
    from extproc.traffic.running import run, stop_at_signals
    from extproc.traffic.showing import line_of, progress_bar

    stop = asyncio.Event()
    with stop_at_signals(stop), progress_bar(plan.expected_s) as show:
        return await run(plan, stop, lambda seconds, tally, text: show(seconds, text or line_of(tally)))


def _print(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    from extproc.traffic.showing import print_summary

    print_summary(document, Console(highlight=False))

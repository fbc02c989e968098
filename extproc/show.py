"""What people see: the lines of `perch up`, what `perch status` asks control."""

import asyncio
import contextlib
import json
import sys
import time
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.live import Live

from extproc.address import UnixAddress, parse_address
from extproc.app import prefixes
from extproc.core.decision import Decision, decide
from extproc.core.flags import Arm, SourceKind, UnitSource
from extproc.explain import Loaded, load, request_for
from extproc.flagfile import Paths
from extproc.modelsfile import Model
from extproc.statustable import StatusView, plain
from extproc.up import Running

WATCH_EVERY_S = 1.0
ANSWER_WITHIN = aiohttp.ClientTimeout(total=5)


class StatusError(Exception):
    """The control API does not answer; the message says where it was sought."""


class Screen:
    """The terminal of `perch up`: one line per event, and once a table of what is where."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def say(self, who: str, what: str) -> None:
        """One event."""
        now = datetime.now().astimezone().strftime("%H:%M:%S")
        self._console.print(f"{now}  {who:<16} {what}", markup=False)

    def ready(self, running: Running) -> None:
        """Everything is warm: where it is, and a line to paste."""
        settings = running.settings
        rows = {
            "requests": f"http://{settings.envoy_listen}",
            "control API": f"http://{settings.control_listen}/v1/status",
            "Envoy admin": f"http://{settings.envoy_admin}",
            "flags": f"{settings.flags}  (edit and save: the share moves)",
            "logs": f"{running.logs}/",
        }
        self._console.print()
        for name, where in rows.items():
            self._console.print(f"  {name:<12} {where}", markup=False)
        for line in suggestion(running):
            self._console.print(line, markup=False)


def suggestion(running: Running) -> list[str]:
    """A request that can be pasted, by a user whom the model's flag sends to canary, if it sends anybody there."""
    model = next((model for model in running.models if _folder(running, model)), running.models[0])
    body, header, user = "{}", "", None
    with contextlib.suppress(Exception):  # a suggestion is not worth a failure
        body = example_body(_folder(running, model) or Path())
    with contextlib.suppress(Exception):
        settings = running.settings
        loaded = load(Paths(settings.flags, settings.state), prefixes(running.models), None)
        flag = next(flag for flag in loaded.flags.values() if flag.model == model.name)
        user = next((name for name in _USERS if arm_of(loaded, flag.key, name) is Arm.CANARY), None)
        header = _unit_header(flag.unit[0], user or _USERS[0])
    url = f"http://{running.settings.envoy_listen}{model.prefix}infer"
    return [
        "",
        f"  {user} is one of the users on canary now; other ids go to stable:" if user else "  Try:",
        "",
        f"curl -i {url} -H 'content-type: application/json'{header} -d '{body}'",
        "",
    ]


_USERS = [f"user-{i}" for i in range(10_000)]


def _folder(running: Running, model: Model) -> Path | None:
    """The artifacts that `perch up` serves as this model's stable: their example is one for the canary too."""
    folder = (model.artifacts or {}).get("stable")
    return running.options.stable or folder if folder else None


def _unit_header(source: UnitSource, user: str) -> str:
    """The option of curl that makes the request this user's; nothing where the unit is the request itself."""
    match source.kind:
        case SourceKind.COOKIE:
            return f" -H 'cookie: {source.name}={user}'"
        case SourceKind.HEADER:
            return f" -H '{source.name}: {user}'"
        case _:
            return ""


def arm_of(loaded: Loaded, key: str, user: str) -> Arm:
    """The arm of one user."""
    flag = loaded.flags[key]
    decision: Decision = decide(loaded.ruleset, request_for(flag, loaded.models[flag.model], user, ()))
    return decision.choice.cohort


def example_body(folder: Path) -> str:
    """An inference request with the first example of the artifacts' manifest. Raises OSError, KeyError."""
    path = next(path for path in (folder / "manifest.json", *sorted(folder.glob("*/manifest.json"))) if path.exists())
    manifest = json.loads(path.read_text())
    tensors = []
    for spec in manifest["inputs"]:
        row = manifest["examples"][spec["name"]][0]
        tensors.append({"name": spec["name"], "shape": [1, len(row)], "datatype": spec["datatype"], "data": row})
    return json.dumps({"inputs": tensors}, separators=(",", ":"))


async def show_status(control: str, *, watch: bool, as_json: bool) -> None:
    """Prints the status once, or again and again. Raises StatusError, when it watches for people only at the start."""
    console = Console(highlight=False)
    status = await fetch_status(control)
    if as_json:
        await _print_json(console, control, status, watch=watch)
    elif not watch:
        console.print(StatusView(status), soft_wrap=True)
    elif sys.stdout.isatty() and not console.is_dumb_terminal:
        await _keep_showing(console, control, status)
    else:
        await _keep_printing(console, control, status)


async def _print_json(console: Console, control: str, status: dict[str, Any], *, watch: bool) -> None:
    """Once, for people too; or a line per look, for a pipe."""
    if not watch:
        console.print_json(data=status)
        return
    while True:
        print(json.dumps(status), flush=True)  # noqa: T201  see above
        await asyncio.sleep(WATCH_EVERY_S)
        status = await fetch_status(control)


async def _keep_showing(console: Console, control: str, status: dict[str, Any]) -> None:
    """One screen. While control does not answer, the last status stays, with a line above it that says so."""
    heard_s, note = time.monotonic(), ""
    with Live(StatusView(status, fit=True), console=console, auto_refresh=False) as live:
        while True:
            live.update(StatusView(status, note, fit=True), refresh=True)
            await asyncio.sleep(WATCH_EVERY_S)
            try:
                status = await fetch_status(control)
                heard_s, note = time.monotonic(), ""
            except StatusError as error:
                note = f"{time.monotonic() - heard_s:.0f} s old: {error}"


async def _keep_printing(console: Console, control: str, status: dict[str, Any] | None) -> None:
    """For a pipe or a file: every look below the last one, with its time; of a control that is away, a line."""
    problem = ""
    while True:
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        if status is not None:
            console.print(now, StatusView(status), "", sep="\n", soft_wrap=True)
        elif problem:
            console.print(f"{now}\n{plain(problem)}\n", markup=False, soft_wrap=True)
        sys.stdout.flush()
        await asyncio.sleep(WATCH_EVERY_S)
        try:
            status, problem = await fetch_status(control), ""
        except StatusError as error:
            status, problem = None, str(error)


async def fetch_status(control: str) -> dict[str, Any]:
    """`GET /v1/status` of HOST:PORT or unix:PATH. Raises StatusError."""
    address = parse_address(control, port_zero=True)
    socket = str(address.path) if isinstance(address, UnixAddress) else None
    connector = aiohttp.TCPConnector() if socket is None else aiohttp.UnixConnector(socket)
    url = f"http://{control if socket is None else 'control'}/v1/status"
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=ANSWER_WITHIN) as session,
            session.get(url) as answer,
        ):
            code, status = answer.status, await answer.json()
    except TimeoutError:
        raise StatusError(f"control at {control} did not answer within {ANSWER_WITHIN.total:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise StatusError(f"control does not answer at {control} ({error}); is `perch up` running?") from None
    if code != HTTPStatus.OK or not isinstance(status, dict):
        raise StatusError(f"what answers at {control} (status {code}) is not perch's control")
    return status

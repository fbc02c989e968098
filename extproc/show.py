"""What people see: the lines of `perch up`, the table of `perch status`."""

import asyncio
import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.live import Live
from rich.table import Table

from extproc.app import prefixes
from extproc.core.decision import Decision, decide
from extproc.core.flags import Arm, SourceKind, UnitSource
from extproc.explain import Loaded, load, request_for
from extproc.flagfile import Paths
from extproc.modelsfile import Model
from extproc.up import Running

WATCH_EVERY_S = 1.0


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
    """Prints the status once, or again and again. Raises StatusError."""
    console = Console(highlight=False)
    if not watch:
        status = await fetch_status(control)
        console.print_json(data=status) if as_json else console.print(table_of(status))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = await fetch_status(control)
            if as_json:
                print(json.dumps(status), flush=True)  # noqa: T201  one line per look, for a pipe
            else:
                live.update(table_of(status), refresh=True)
            await asyncio.sleep(WATCH_EVERY_S)


async def fetch_status(control: str) -> dict[str, Any]:
    """`GET /v1/status`. Raises StatusError."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{control}/v1/status") as answer:
            status: dict[str, Any] = await answer.json()
            return status
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise StatusError(f"control does not answer at {control} ({error}); is `perch up` running?") from None


def table_of(status: dict[str, Any]) -> Table:
    """The status for people."""
    ready = "ready" if status["ready"] else f"not ready: {status['not_ready']}"
    envoy = status["envoy"]
    failed_open = f", {envoy.get('failure_mode_allowed', 0)} failed open" if envoy else ", Envoy does not answer"
    table = Table(title=f"{ready}{failed_open}", title_justify="left", box=None, pad_edge=False)
    for column in ("flag", "model", "canary", "wanted", "servers ready", "state", "version"):
        table.add_column(column)
    for key, flag in status["flags"].items():
        state = "off" if not flag["enabled"] else "held: canary not warm" if flag["held"] else "serving"
        servers = f"{flag['ready']['stable']} stable, {flag['ready']['canary']} canary"
        percent, wanted = f"{flag['effective_percent']:g} %", f"{flag['wanted_percent']:g} %"
        table.add_row(key, flag["model"], percent, wanted, servers, state, flag["version"])
    table.caption = "\n".join(alerts_of(status))
    return table


def alerts_of(status: dict[str, Any]) -> list[str]:
    """What somebody should look into, a line each."""
    alerts = [f"the last good flag file is served: {problem}" for problem in status["flag_file"]["problems"]]
    for key, flag in status["flags"].items():
        if "heavy_unit" in flag:
            unit = f" ({flag['heavy_unit']['unit']})" if "unit" in flag["heavy_unit"] else ""
            share = f"{flag['heavy_unit']['share']:.0%}"
            alerts.append(f"{key}: one unit{unit} makes up {share} of the traffic; is it a person?")
    return alerts

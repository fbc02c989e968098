"""`perch control`: watches what Envoy sees, keeps the warm gate and Envoy's forwarded headers, answers the API."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiohttp import web

from extproc.accesslog import AccessLogService, StreamInfo
from extproc.address import Address, TcpAddress, UnixAddress, parse_address
from extproc.api import Sources, make_api
from extproc.api import log as api_log
from extproc.apitoken import TokenError, read_token, writing_needs
from extproc.app import StartError, compile_with, envoy_settings, make_metrics, prefixes, until_stopped
from extproc.cohorts import cohorts_of
from extproc.controller import Controller, View
from extproc.core.decided import Decided, parse_report
from extproc.core.document import Problem
from extproc.core.exposure import ExposureError, parse_exposures, plain_exposures, with_caps
from extproc.core.flags import Exposures, Flag
from extproc.core.kpis import Reported, Result
from extproc.core.ruleset import headers_of
from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable
from extproc.envoyfile import EnvoyFileError, forwarded_headers, render, render_filter, write
from extproc.events import Events, start_log
from extproc.flagcompiler import Compiler
from extproc.flagfile import FlagFile, Paths, Published, read_exposures
from extproc.flagread import flags_in
from extproc.flagyaml import MAX_BYTES
from extproc.metrics import Metrics
from extproc.modelsfile import Model, load_models
from extproc.outcomesapi import outcome_routes
from extproc.receiver import Received, Receiver
from extproc.reconciling import Reconciler
from extproc.requestmetrics import RequestMetrics
from extproc.settings import Settings
from extproc.statefiles import Journal, read_or_none, write_atomically
from extproc.telemetry import Steps, Telemetry
from extproc.watch import signature
from extproc.wire.outcomes import Batch

LOOK_EVERY_S = 0.5
UNKEPT_LOOKS = 6
"""Serve reads a new flag file when control does, and keeps it in its own time: within three seconds."""

ENVOY_COUNTERS = (
    "^(http.edge.ext_proc.perch.(streams_started|failure_mode_allowed|message_timeouts|rejected_header_mutations"
    "|clear_route_cache_ignored)|cluster.perch.upstream_rq_total)$"
)


def start_exposures(paths: Paths, tell: Any) -> Exposures:
    """What was decided before. After an unreadable file a new one is begun, above every seq that was ever served."""
    try:
        return read_exposures(paths.exposure) or Exposures()
    except ExposureError as error:
        kept = (path.stem.rpartition(".")[2] for path in paths.rulesets.glob("*.*.json"))
        seqs = [int(seq) for seq in kept if seq.isdecimal()]
        tell("exposure_unreadable", f"{paths.exposure}: {error}; a new one is begun with every gate closed", True)
        return Exposures(max(seqs, default=0) + 1, closed=True)


def write_exposures(path: Path, exposures: Exposures) -> None:
    """Puts the exposures where serve reads them. Raises OSError."""
    text = json.dumps(plain_exposures(exposures, "control"), indent=1)
    write_atomically(path, text.encode() + b"\n")


def kept_exposures(paths: Paths, version: str) -> Exposures | None:
    """The exposures of a version that was served before, as serve kept them; None for one it did not keep."""
    if not re.fullmatch(r"[0-9a-f]{12}\.[0-9]{1,18}", version):
        return None
    try:
        content = read_or_none(paths.kept(version), MAX_BYTES)
        return None if content is None else parse_exposures(json.loads(content))
    except (OSError, ValueError, RecursionError):
        return None


def close_gates(settings: Settings, models: tuple[Model, ...]) -> None:
    """Before anything runs: caps every flag at 0, so that the first user comes to canary when it is warm.

    Reads the flag file, or the last good one; with neither there is nobody to let through.
    """
    paths = Paths(settings.flags, settings.state)
    for path in (paths.flags, paths.last_good):
        with contextlib.suppress(Exception):  # whatever is wrong with it, serve will say so
            content = read_or_none(path, MAX_BYTES)
            flags = flags_in(content or b"", prefixes(models)).flags
            exposures = start_exposures(paths, lambda *_: None)
            write_exposures(paths.exposure, with_caps(exposures, {flag.key: (flag.salt, 0) for flag in flags}))
            return


async def somebody_listens(address: str) -> bool:
    """Whether a connection to the address is accepted. One that cannot be made in time may still be: True."""
    where = parse_address(address, port_zero=True)
    try:
        async with asyncio.timeout(1):
            if isinstance(where, TcpAddress):
                _, writer = await asyncio.open_connection(where.host, where.port)
            else:
                _, writer = await asyncio.open_unix_connection(str(where.path))
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    return True


@dataclass(slots=True)
class Control:
    """The pieces of the role, wired."""

    settings: Settings
    models: tuple[Model, ...]
    metrics: Metrics
    events: Events
    compiler: Compiler
    admin: EnvoyAdmin
    audit: Journal = field(init=False)
    controller: Controller = field(init=False)
    flag_file: FlagFile = field(init=False)
    decided: Decided = field(default_factory=Decided)
    telemetry: Telemetry = field(init=False)
    access_log: AccessLogService = field(init=False)
    reconciler: Reconciler = field(init=False)
    request_metrics: RequestMetrics = field(init=False)
    _unkept: int = field(default=0, init=False)
    _envoy_problem: str = field(default="", init=False)
    _envoy_seen: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Reads what earlier runs decided."""
        paths = Paths(self.settings.flags, self.settings.state)
        self.audit = Journal(paths.state / "audit.jsonl")
        self.controller = Controller(
            models=self.models,
            exposures=start_exposures(paths, self.tell),
            write=lambda exposures: write_exposures(paths.exposure, exposures),
            tell=self.tell,
        )
        kinds = {model.name: model.predictions for model in self.models}
        self.telemetry = Telemetry(Steps(lambda version: kept_exposures(paths, version)), kinds)
        self.telemetry.take_exposures(self.controller.exposures)
        self.access_log = AccessLogService(self.take_outcomes, time.monotonic)
        self.reconciler = Reconciler(
            admin=self.admin,
            decided=self.decided,
            log=self.telemetry.log,
            models=self.telemetry.model_of,
            server=self.models[0].name,
            tell=self.tell,
        )
        self.request_metrics = RequestMetrics(
            self.telemetry, self.access_log.counts, lambda: self.reconciler.found.differences
        )
        receiver = Receiver(prefixes(self.models), None, self.take_flags)
        self.flag_file = FlagFile(
            paths=paths,
            compile=compile_with(self.compiler, prefixes(self.models), replies=False),
            publish=receiver.take,
            tell=lambda _kind, _text: None,  # serve tells what becomes of the flag file
            count=lambda _accepted: None,
            keep=False,
        )

    def tell(self, kind: str, text: str, warning: bool = False) -> None:  # noqa: FBT001, FBT002  as the core calls it
        """An event: to the log, to people, and to the audit file, which keeps it."""
        (self.events.warn if warning else self.events.tell)(kind, text)
        at, before = datetime.now(UTC).isoformat(timespec="milliseconds"), self.audit.problem
        self.audit.add(json.dumps({"time": at, "event": kind, "text": text}))
        if self.audit.problem and self.audit.problem != before:
            self.events.warn("audit_not_written", f"{self.audit.problem}; tried again each tick")

    def take_flags(self, received: Received) -> None:
        """A ruleset that serve serves too: its flags get their gates, Envoy the headers that it reads."""
        flags = [flag for flag, _ in received.flags]
        followed = Exposures(flags={flag.key: exposure for flag, exposure in received.flags if exposure is not None})
        self.controller.take_flags(flags, received.published.ruleset.version, followed)
        self.telemetry.take_flags(flags, self.controller.exposures)
        self.forward_headers(flags)

    def render_envoy(self) -> None:
        """Writes Envoy's files at the start, where this process is the one to do it.

        Two of them may say more than models and settings do, and stay if they are there: the kill switch that an
        operator threw, and the headers that the flags read.
        """
        folder = self.settings.xds
        if folder is None:
            return
        files = render(self.models, envoy_settings(self.settings))
        kept = {name for name in ("rtds.yaml", "ecds.yaml") if (folder / name).exists()}
        changed = write(folder, {name: text for name, text in files.items() if name not in kept})
        if changed:
            self.tell("envoy_files", f"{', '.join(changed)} written to {folder}")

    def forward_headers(self, flags: list[Flag]) -> None:
        """Has Envoy forward the headers that the flags read, and no others."""
        if self.settings.xds is None:
            return
        names = forwarded_headers(name for flag in flags for name in headers_of(flag))
        try:
            changed = write(self.settings.xds, {"ecds.yaml": render_filter(names, envoy_settings(self.settings))})
        except EnvoyFileError as error:
            self.tell("envoy_files_not_written", str(error), True)
            return
        if changed:
            self.tell("headers_forwarded", f"Envoy shows perch these headers from now on: {', '.join(names)}")

    def take_outcomes(self, batch: Batch, _stream: StreamInfo) -> None:
        """What became of some requests, from Envoy's access log."""
        self.telemetry.take(batch.outcomes, time.monotonic())

    def report(self, reported: Reported) -> Result:
        """A value that somebody reports about a request or a unit."""
        return self.telemetry.report(reported, time.monotonic())

    async def log_outcomes(self) -> None:
        """Serves the access log, and ends each second of it. Raises StartError when its address is taken."""
        listen = self.settings.access_log
        try:
            await self.access_log.start(listen)
        except OSError as error:
            raise StartError(f"cannot listen at {listen} for Envoy's access log: {error}") from None
        second = 0
        try:
            while True:
                await asyncio.sleep(1 - time.monotonic() % 1)
                second = max(second + 1, int(time.monotonic()))
                self.request_metrics.second(second, self.metrics)
        finally:
            await self.access_log.stop(0)

    async def look(self) -> None:
        """Asks Envoy, ticks the controller, again and again."""
        while True:
            view = await self._view()
            before = self.controller.exposures
            self.controller.tick(time.monotonic(), view)
            self.audit.write()
            self._look_at_kept()
            if self.controller.exposures is not before:
                self.telemetry.take_exposures(self.controller.exposures)
            for model in self.models:
                if view is not None:
                    tags = {"model": model.name}
                    self.metrics.gauge("cluster.ready", view.stable(model.name), cohort="stable", **tags)
                    self.metrics.gauge("cluster.ready", view.canary(model.name), cohort="canary", **tags)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _view(self) -> View | None:
        try:
            view = View.of(await self.admin.hosts())
        except EnvoyUnreachable as error:
            if self._envoy_seen and not self._envoy_problem:
                self.events.warn("envoy_unreachable", str(error))
            self._envoy_problem = str(error)
            return None
        if self._envoy_problem and self._envoy_seen:
            self.events.tell("envoy_reachable", "Envoy answers again")
        self._envoy_problem, self._envoy_seen = "", True
        return view

    async def status(self) -> dict[str, Any]:
        """Everything that is known, as `GET /v1/status` and `perch status --json` show it."""
        published: Published | None = self.flag_file.published
        problems: tuple[Problem, ...] = self.flag_file.problems
        return {
            "ready": self.controller.not_ready() is None,
            "not_ready": self.controller.not_ready(),
            "flag_file": {
                "path": str(self.settings.flags),
                "version": published.version if published else None,
                "problems": [f"{self.settings.flags}:{problem}" for problem in problems],
            },
            "flags": {key: {**row, **self._measured(key)} for key, row in self.controller.status().items()},
            "alerts": [*self.controller.alerts(), *self._unwritten(), *self.reconciler.alerts()],
            "access_log": self._log_status(),
            "envoy": await self._envoy_status(),
        }

    def _unwritten(self) -> list[str]:
        """What is not in the state folder, a line each: events in the audit file, what serve serves."""
        audit = self.audit
        waiting = "1 event waits" if audit.waiting == 1 else f"{audit.waiting} events wait"
        lost = f", {audit.lost} before are lost" if audit.lost else ""
        alerts = [f"not written: {audit.problem}; {waiting} for it{lost}"] if audit.problem else []
        if self._unkept > UNKEPT_LOOKS:
            kept = Paths(self.settings.flags, self.settings.state).kept(self.controller.version)
            alerts.append(f"not written: {kept}; serve is late, or cannot keep what a restart needs")
        return alerts

    def _look_at_kept(self) -> None:
        """Counts the looks since serve should have kept what it serves, as far as one is there that would."""
        version = self.controller.version
        kept = Paths(self.settings.flags, self.settings.state).kept(version)
        self._unkept = 0 if not version or not self.decided.heard() or signature(kept) else self._unkept + 1

    def _measured(self, key: str) -> dict[str, Any]:
        """What was measured of a flag's requests; a key only once there is something behind it."""
        found = {**self._decided(key), **cohorts_of(self.telemetry, key)}
        reconciliation = self.reconciler.status(key)
        return found if reconciliation is None else {**found, "reconciliation": reconciliation}

    def _log_status(self) -> dict[str, Any]:
        """What came over the access log, and from whom."""
        counts = self.access_log.counts
        return {
            "streams": counts.open,
            "entries": counts.entries,
            "unreadable": counts.unreadable + counts.unreadable_messages,
            "envoys": {node: seen.entries for node, seen in counts.envoys.items()},
        }

    def _decided(self, key: str) -> dict[str, Any]:
        """What serve decided for a flag, and the unit that makes up an unusual share of it, if there is one."""
        heavy = self.decided.heaviest(key)
        decided: dict[str, Any] = {"decided": self.decided.by_reason(key)}
        if heavy is not None:
            share, unit = heavy
            decided["heavy_unit"] = {"share": round(share, 4), **({"unit": unit} if unit is not None else {})}
        return decided

    async def hear(self) -> None:
        """Takes what serve counts, as it comes; what is no report is dropped."""
        path = self.settings.counters
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
            reports.bind(str(path))
            path.chmod(0o600)
            reports.setblocking(False)
            try:
                while True:
                    with contextlib.suppress(ValueError, RecursionError):
                        self.decided.take(parse_report(json.loads(await loop.sock_recv(reports, 1 << 20))))
            finally:
                path.unlink(missing_ok=True)

    async def _envoy_status(self) -> dict[str, Any] | None:
        """Envoy's own counters of perch: what failed open and why. None while Envoy does not answer."""
        try:
            counters = await self.admin.counters(ENVOY_COUNTERS)
        except EnvoyUnreachable:
            return None
        return {name.rpartition(".")[2]: value for name, value in sorted(counters.items())}

    async def envoy_stats(self, query: str) -> tuple[str, bytes]:
        """Envoy's stats as Envoy gives them, for those who cannot reach its admin interface. Raises OSError."""
        try:
            return await self.admin.stats(query)
        except EnvoyUnreachable as error:
            raise OSError(str(error)) from None


async def control(settings: Settings) -> None:
    """Runs until SIGTERM. Raises StartError, or ModelsFileError for a models file that is wrong."""
    start_log("control", settings.log_level)
    models = load_models(settings.models)
    if settings.xds is not None and not await somebody_listens(settings.envoy_admin):
        close_gates(settings, models)
    metrics, compiler, admin = make_metrics(settings), Compiler(), EnvoyAdmin(settings.envoy_admin)
    try:
        role = Control(settings, models, metrics, Events("control", settings.events), compiler, admin)
        role.render_envoy()
        async with listening(role):
            await until_stopped(
                role.flag_file.follow, role.look, role.hear, role.log_outcomes, role.reconciler.run, metrics.run
            )
    finally:
        await admin.close()
        await compiler.stop()
        metrics.close()


def api_token(settings: Settings) -> str | None:
    """The token that writing to the API needs, from the setting or from its file. Raises StartError."""
    if settings.token is not None or settings.token_file is None:
        return settings.token
    try:
        return read_token(settings.token_file)
    except TokenError as error:
        raise StartError(str(error)) from None


def is_of_this_machine(address: Address) -> bool:
    """Whether nobody reaches the address from elsewhere: a unix socket, or loopback by its number."""
    return isinstance(address, UnixAddress) or (not address.is_name and ip_address(address.host).is_loopback)


@contextlib.asynccontextmanager
async def listening(role: Control) -> AsyncIterator[None]:
    """The API, listening while the body runs. Raises StartError when its address is taken."""
    sources = Sources(
        status=role.status,
        not_ready=role.controller.not_ready,
        envoy_stats=role.envoy_stats,
        metrics=role.request_metrics.prometheus,
        routes=outcome_routes(role.report, role.telemetry.kpis.refuse),
    )
    listen = role.settings.control_listen
    address = parse_address(listen, port_zero=True)
    api = make_api(sources)
    api.middlewares.append(writing_needs(api_token(role.settings), open_without=is_of_this_machine(address)))
    runner = web.AppRunner(api, access_log=None, logger=api_log)
    await runner.setup()
    try:
        if isinstance(address, TcpAddress):
            await web.TCPSite(runner, address.host, address.port, shutdown_timeout=1).start()
        else:
            await web.UnixSite(runner, str(address.path), shutdown_timeout=1).start()
    except OSError as error:
        await runner.cleanup()
        raise StartError(f"cannot listen at {listen}: {error.strerror}; choose another --control-port") from None
    try:
        role.events.tell("listening", f"control API at {listen}")
        yield
    finally:
        await runner.cleanup()

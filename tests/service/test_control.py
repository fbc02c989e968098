"""The warm gate and the control API: rules with time as an argument, then a real control beside a small Envoy."""
# ruff: noqa: D102  methods here are named after what they do

import asyncio
import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from typer.testing import CliRunner
from yarl import URL

from extproc.cli import app
from extproc.controller import Controller, View
from extproc.core.decided import Key, Report, plain_report
from extproc.core.exposure import parse_exposures
from extproc.core.flags import Exposure, Exposures
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.modelsfile import load_models

DEADLINE_S = 60
DIGITS, WINE = "digits", "wine"


def flags(text: str):
    return parse(read_document(f"version: 1\nflags: {text}\n".encode()), None).flags


BOTH = flags("{digits: {canary: 5}, wine: {canary: 50}}")


def view(digits: int = 0, wine: int = 0, *, stable: int = 1, ext_proc: int = 1) -> View:
    ready = {"digits_canary": digits, "wine_canary": wine, "digits_stable": stable, "wine_stable": stable}
    return View({**ready, "perch": ext_proc})


class Desk:
    """A controller with everything it wrote and told; `disk_full` makes writing fail."""

    def __init__(self, models, exposures=None, taken=BOTH):
        self.written = []
        self.told = []
        self.disk_full = False
        self.controller = Controller(
            models=models,
            exposures=exposures or Exposures(),
            write=self.write,
            tell=lambda kind, text, warning: self.told.append((kind, text, warning)),
        )
        self.now_s = 1000.0
        if taken is not None:
            self.controller.take_flags(taken, "v.0")

    def write(self, exposures):
        if self.disk_full:
            raise OSError(28, "No space left on device", "state/exposure.json")
        self.written.append(exposures)

    def look(self, *views):
        for one in views:
            self.now_s += 0.5
            self.controller.tick(self.now_s, one)

    def caps(self):
        return {key: entry.cap for key, entry in self.controller.exposures.flags.items()}

    def kinds(self):
        return [kind for kind, _, _ in self.told]


CLOSED = parse_exposures(
    {"seq": 4, "flags": {"digits": {"salt": "digits", "cap": 0}, "wine": {"salt": "wine", "cap": 0}}}
)


@pytest.fixture
def models(folder):
    return load_models(folder.models)


@pytest.fixture
def desk(models):
    return Desk(models, CLOSED)


def test_a_name_with_three_servers_behind_it_is_told_as_three(desk):
    seen = View({"digits_canary": 2}, {"digits_canary": 3})
    desk.look(seen, seen)
    assert [text for kind, text, _ in desk.told if kind == "canary_warm"] == [
        "digits: 2 of 3 canary servers ready; its share of users is sent there"
    ]


def test_a_gate_opens_after_two_looks_and_each_model_has_its_own(desk):
    desk.look(view(digits=1))
    assert desk.written == []
    desk.look(view(digits=1))
    assert desk.caps() == {DIGITS: 100, WINE: 0}
    assert desk.written == [desk.controller.exposures]
    assert desk.controller.exposures.seq == 5
    assert desk.kinds() == ["canary_warm"]
    desk.look(view(digits=1, wine=1), view(digits=1, wine=1))  # wine asks for two
    assert desk.caps() == {DIGITS: 100, WINE: 0}
    desk.look(view(digits=1, wine=2), view(digits=1, wine=2))
    assert desk.caps() == {DIGITS: 100, WINE: 100}


def test_a_gate_closes_after_three_looks_and_a_look_between_starts_anew(desk):
    desk.look(view(1), view(1))
    desk.look(view(0), view(0), view(1), view(0), view(0))
    assert desk.caps()[DIGITS] == 100
    desk.look(view(0))
    assert desk.caps()[DIGITS] == 0
    assert desk.kinds() == ["canary_warm", "canary_cold"]
    assert [warning for _, _, warning in desk.told] == [False, True]


def test_without_a_view_of_envoy_nothing_changes_and_no_look_is_counted(desk):
    desk.look(view(1), None, None, None, view(1))
    assert desk.caps()[DIGITS] == 100
    desk.look(view(0), None, view(0), None, None, None)
    assert desk.caps()[DIGITS] == 100
    desk.look(view(0))
    assert desk.caps()[DIGITS] == 0


def test_two_closures_within_five_minutes_are_a_lost_canary(desk):
    for _ in range(2):
        desk.look(view(1), view(1), view(0), view(0), view(0))
    assert desk.kinds().count("canary_lost") == 1
    desk.now_s += 600
    desk.look(view(1), view(1), view(0), view(0), view(0))
    assert desk.kinds().count("canary_lost") == 1


def test_what_the_disk_refused_is_written_at_a_later_tick_and_told_once(desk):
    desk.disk_full = True
    desk.look(view(1), view(1), view(1), view(1))
    assert desk.kinds().count("exposure_not_written") == 1
    assert desk.written == []
    desk.look(view(0), view(0), view(0))  # and meanwhile the gate has closed again
    desk.disk_full = False
    desk.look(view(0))
    assert [exposures.flags[DIGITS].cap for exposures in desk.written] == [0]
    assert desk.written[-1].seq > CLOSED.seq
    desk.look(view(0), view(0))
    assert len(desk.written) == 1


@pytest.mark.parametrize(
    ("entry", "is_open"),
    [({"salt": "digits", "cap": 100}, True), ({"salt": "digits", "cap": 0}, False), ({"salt": "old", "cap": 0}, True)],
)
def test_a_restarted_controller_finds_its_gates_as_the_exposures_say(models, entry, is_open):
    """An entry of another salt does not count: serve lets the flag's users through, so the gate is open."""
    desk = Desk(models, parse_exposures({"seq": 4, "flags": {"digits": entry}}))
    assert desk.caps()[DIGITS] == (100 if is_open else 0)
    desk.look(view(0), view(0))
    assert desk.caps()[DIGITS] == (100 if is_open else 0)


def test_a_restarted_controller_keeps_where_a_rollout_was(models):
    was = Exposure(salt="digits", attempt=2, canary_version="7", step=3, percent=Decimal(25), cap=100)
    desk = Desk(models, Exposures(40, {DIGITS: was}))
    desk.look(view(0), view(0), view(0))
    assert desk.controller.exposures.flags[DIGITS] == Exposure(
        salt="digits", attempt=2, canary_version="7", step=3, percent=Decimal(25), cap=0
    )


def test_before_the_flags_are_known_nothing_is_written(models):
    desk = Desk(models, CLOSED, taken=None)
    desk.look(view(0), view(0), view(1), view(1))
    assert desk.written == []
    assert desk.controller.exposures == CLOSED
    assert desk.controller.not_ready() == "no flag file has been read yet"  # who wants a canary is not known either


def test_a_flag_that_comes_later_begins_with_its_models_gate(models):
    desk = Desk(models, taken=())
    desk.look(view(digits=1), view(digits=1))
    desk.controller.take_flags(BOTH, "v.1")
    assert desk.caps() == {DIGITS: 100, WINE: 0}
    assert desk.written[-1] == desk.controller.exposures


def test_a_new_salt_keeps_the_gate_and_begins_a_new_entry(desk):
    desk.controller.take_flags(flags("{digits: {canary: 5, salt: new}}"), "v.1")
    assert desk.controller.exposures.flags[DIGITS] == Exposure(salt="new", cap=0)


def test_ready_needs_everything_once_and_later_the_path_of_stable_alone(desk):
    said = [desk.controller.not_ready()]
    for one in (view(ext_proc=0), view(stable=0), view(), view(1), view(1), view(1, 2), view(1, 2)):
        desk.look(one)
        said.append(desk.controller.not_ready())
    assert said == [
        "Envoy does not answer",
        "no ext_proc process is healthy",
        "no stable server of digits is ready",
        "the canary of digits is not warm",
        "the canary of digits is not warm",
        "the canary of wine is not warm",
        "the canary of wine is not warm",
        None,
    ]
    desk.look(*[view()] * 5)
    assert desk.caps() == {DIGITS: 0, WINE: 0}
    assert desk.controller.not_ready() is None
    desk.look(view(stable=0))
    assert desk.controller.not_ready() == "no stable server of digits is ready"
    desk.look(None)
    assert desk.controller.not_ready() == "Envoy does not answer"


@pytest.mark.parametrize("text", ["{digits: {canary: 0}}", "{digits: {canary: 50, enabled: false}}", "{}"])
def test_a_canary_that_nobody_wants_is_not_waited_for(models, text):
    desk = Desk(models, CLOSED, taken=flags(text))
    desk.look(view())
    assert desk.controller.not_ready() is None


def test_the_status_says_what_is_held_and_what_is_wanted(desk):
    desk.look(view(1), view(1))
    status = desk.controller.status()
    assert {key: (row["effective_percent"], row["wanted_percent"], row["held"]) for key, row in status.items()} == {
        DIGITS: (5.0, 5.0, False),
        WINE: (0.0, 50.0, True),
    }
    assert status[DIGITS]["ready"] == {"stable": 1, "canary": 1}


FULL = "not written, so serve follows what was decided before: state/exposure.json: No space left on device"


def served(desk):
    """What the status says is served of each flag, and whether it is held there."""
    return {key: (row["effective_percent"], row["held"]) for key, row in desk.controller.status().items()}


def test_a_gate_that_closed_and_could_not_be_written_is_shown_as_it_is_served_and_is_an_alert(desk):
    desk.look(*[view(1, 2)] * 2)
    assert (served(desk), desk.controller.alerts()) == ({DIGITS: (5.0, False), WINE: (50.0, False)}, [])
    desk.disk_full = True
    desk.look(*[view(0, 2)] * 3)
    assert desk.caps() == {DIGITS: 0, WINE: 100}
    assert served(desk) == {DIGITS: (5.0, False), WINE: (50.0, False)}
    assert desk.controller.alerts() == [f"{FULL}; digits has canary 5 %, not 0 %"]
    assert [text for kind, text, _ in desk.told if kind == "exposure_not_written"] == [
        "state/exposure.json: No space left on device; tried again each tick"
    ]
    desk.disk_full = False
    desk.look(view(0, 2))
    assert (served(desk), desk.controller.alerts()) == ({DIGITS: (0.0, True), WINE: (50.0, False)}, [])


def test_a_gate_that_opened_and_could_not_be_written_is_still_held(desk):
    desk.disk_full = True
    desk.look(*[view(1, 2)] * 2)
    assert served(desk) == {DIGITS: (0.0, True), WINE: (0.0, True)}
    assert desk.controller.alerts() == [f"{FULL}; digits has canary 0 %, not 5 %, wine has canary 0 %, not 50 %"]
    desk.look(*[view(0, 0)] * 3)  # as it was: nothing is served that should not be, but nothing can be decided either
    assert desk.controller.alerts() == [FULL]


def test_an_alert_about_many_flags_names_some_of_them(models):
    names = [f"f{i}" for i in range(9)]
    desk = Desk([replace(models[0], name=name) for name in names], taken=())
    desk.controller.take_flags(flags("{" + ", ".join(f"{name}: {{canary: 5}}" for name in names) + "}"), "v.1")
    desk.look(*[View({})] * 3)
    desk.disk_full = True
    desk.look(*[View({f"{name}_canary": 1 for name in names})] * 2)
    (alert,) = desk.controller.alerts()
    assert alert.removeprefix(FULL) == (
        "; f0 has canary 0 %, not 5 %, f1 has canary 0 %, not 5 %, f2 has canary 0 %, not 5 %, and 6 more"
    )


def test_exposures_that_somebody_else_wrote_are_shown_as_serve_follows_them(desk):
    desk.look(*[view(1, 2)] * 2)
    desk.controller.take_flags(BOTH, "v.9", CLOSED)
    assert served(desk) == {DIGITS: (0.0, True), WINE: (0.0, True)}


def test_a_flag_that_came_while_the_disk_was_full_has_no_gate_yet_and_the_status_says_so(models):
    desk = Desk(models, CLOSED, taken=())
    desk.look(view())
    desk.disk_full = True
    new = flags("{digits: {canary: 5, salt: new}}")
    desk.controller.take_flags(new, "v.1", CLOSED)
    assert served(desk) == {DIGITS: (5.0, False)}
    assert desk.controller.alerts() == [f"{FULL}; digits has canary 5 %, not 0 %"]


# The real process.


class SmallEnvoy:
    """Envoy's admin interface, as far as control asks it: hosts and their health, a few counters."""

    def __init__(self):
        self.healthy = {"perch": 1, "digits_stable": 1, "digits_canary": 0, "wine_stable": 1, "wine_canary": 0}
        self.broken = ""
        self.asked = []

    async def clusters(self, _request):
        if self.broken:
            return web.Response(text=self.broken)
        hosts = {name: [self.host(i, n) for i in range(2)] for name, n in self.healthy.items()}
        return web.json_response(
            {"cluster_statuses": [{"name": name, "host_statuses": rows} for name, rows in hosts.items()]}
        )

    @staticmethod
    def host(i, healthy):
        health = {"eds_health_status": "HEALTHY"} | ({} if i < healthy else {"failed_active_health_check": True})
        return {"address": {"pipe": {"path": f"/{i}"}}, "health_status": health}

    async def stats(self, request):
        self.asked.append(request.rel_url.raw_query_string)
        stats = [{"name": "http.ing.ext_proc.perch.failure_mode_allowed", "value": 3}]
        return web.json_response({"stats": stats})

    def app(self):
        app = web.Application()
        app.add_routes([web.get("/clusters", self.clusters), web.get("/stats", self.stats)])
        return app


class ControlProcess:
    """A `perch control` whose API is a unix socket."""

    def __init__(self, folder, service, admin, **settings):
        self.folder, self.service = folder, service
        self.listen = folder.root / "control.sock"
        self.settings = {
            "envoy_admin": admin, "control_listen": f"unix:{self.listen}", "xds": folder.root / "xds",
            "access_log": f"unix:{folder.root}/als.sock", "listen": f"unix:{folder.socket}", **settings,
        }  # fmt: skip
        self.process = None

    async def start(self):
        log = (self.folder.root / "control.log").open("ab")
        with contextlib.closing(log):
            self.process = subprocess.Popen(  # noqa: ASYNC220  starting blocks no longer than a fork
                [sys.executable, "-m", "extproc", "control"],
                env=self.service.environment(self.folder, **self.settings), cwd=self.folder.root,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        await self.until(self.answers, "the API answers")
        return self

    def log(self):
        return (self.folder.root / "control.log").read_text()

    async def until(self, condition, what):
        end = asyncio.get_running_loop().time() + DEADLINE_S
        while asyncio.get_running_loop().time() < end:
            assert self.process.poll() is None, self.log()
            found = condition()
            if found := (await found if asyncio.iscoroutine(found) else found):
                return found
            await asyncio.sleep(0.05)
        return pytest.fail(f"still not after {DEADLINE_S} s: {what}\n{self.log()}")

    async def get(self, path):
        """Status and body."""
        connector = aiohttp.UnixConnector(str(self.listen))
        url = URL(f"http://control{path}", encoded=True)
        async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
            return answer.status, await answer.text()

    async def answers(self):
        with contextlib.suppress(aiohttp.ClientError, OSError):
            return (await self.get("/livez"))[0] == 200
        return False

    async def status(self):
        code, body = await self.get("/v1/status")
        assert code == 200
        return json.loads(body)

    async def readyz(self, code):
        return (await self.get("/readyz"))[0] == code

    def exposures(self):
        with contextlib.suppress(OSError):
            return json.loads((self.folder.state / "exposure.json").read_text())
        return {"flags": {}}

    def cap(self, key=DIGITS):
        return self.exposures()["flags"].get(key, {}).get("cap")

    async def end(self):
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


@pytest.fixture
async def envoy():
    small = SmallEnvoy()
    runner = web.AppRunner(small.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    small.address = f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    small.runner = runner
    yield small
    await runner.cleanup()


@pytest.fixture
async def start_control(folder, service, envoy):
    started = []

    async def start(**settings):
        control = ControlProcess(folder, service, envoy.address, **settings)
        started.append(control)
        return await control.start()

    yield start
    for control in started:
        await control.end()


def closed(folder):
    folder.put_exposures(json.dumps({"seq": 7, "flags": {"digits": {"salt": "digits", "cap": 0}}}))


async def test_control_opens_the_gate_when_the_canary_is_warm_and_closes_it_when_it_is_gone(
    folder, service, envoy, start_control
):
    folder.put(service.flags_yaml(5))
    closed(folder)
    control = await start_control()
    await control.until(lambda: _said(control, "the canary of digits is not warm"), "what is missing")
    assert await control.readyz(503)
    status = await control.status()
    assert (status["flags"][DIGITS]["held"], status["flags"][DIGITS]["effective_percent"]) == (True, 0.0)
    envoy.healthy["digits_canary"] = 1
    await control.until(lambda: control.readyz(200), "ready")
    assert control.cap() == 100
    written = control.exposures()
    assert written["seq"] > 7
    assert written["written_by"] == "control"
    envoy.healthy["digits_canary"] = 0
    await control.until(lambda: control.cap() == 0, "the gate is closed")
    assert control.exposures()["seq"] > written["seq"]
    await control.until(lambda: control.readyz(200), "ready: the path of stable is there")
    events = [json.loads(line) for line in (folder.state / "audit.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.index("canary_warm") < kinds.index("canary_cold")
    assert all(event["time"].endswith("+00:00") for event in events)


async def _said(control, text):
    return text in (await control.get("/readyz"))[1]


async def test_the_status_has_the_keys_that_programs_rely_on(folder, service, envoy, start_control):
    folder.put(service.flags_yaml("12.345"))
    envoy.healthy |= {"digits_canary": 2, "wine_canary": 2}
    control = await start_control()
    await control.until(lambda: control.readyz(200), "ready")
    status = await control.until(lambda: _seeing_envoy(control), "a status while Envoy answers in time")
    row = status["flags"][DIGITS]
    assert row["effective_percent"] == 12.345
    assert row["held"] is False
    assert row["version"].partition(".")[0] == service.digest(folder.flags.read_bytes())
    assert row["ready"] == {"stable": 1, "canary": 2}
    assert status["envoy"]["failure_mode_allowed"] == 3
    assert status["flag_file"]["problems"] == []
    folder.flags.write_text("version: 1\nflags: [")
    found = await control.until(lambda: _problems(control), "the problem is shown")
    assert found[0].startswith(f"{folder.flags}:")
    assert (await control.status())["flags"][DIGITS]["effective_percent"] == 12.345


async def _seeing_envoy(control):
    """The status, unless Envoy, which is this process, kept control waiting: then what is Envoy's is not in it."""
    status = await control.status()
    return status if status["envoy"] is not None and status["flags"][DIGITS]["ready"]["stable"] is not None else None


async def _problems(control):
    return (await control.status())["flag_file"]["problems"]


async def test_an_envoy_that_does_not_answer_changes_no_gate(folder, service, envoy, start_control):
    folder.put(service.flags_yaml(5))
    envoy.healthy["digits_canary"] = 1
    control = await start_control()
    await control.until(lambda: control.readyz(200), "ready")
    seq = control.exposures()["seq"]
    envoy.broken = '{"cluster_statuses": 5}'
    await control.until(lambda: _said(control, "Envoy does not answer"), "told")
    envoy.broken = "<html>"
    status = await control.status()
    assert status["ready"] is False
    await envoy.runner.cleanup()
    await control.until(lambda: _envoy_gone(control), "no counters")
    assert (await control.get("/envoy/stats"))[0] == 502
    assert control.exposures()["seq"] == seq
    assert control.cap() == 100


async def _envoy_gone(control):
    return (await control.status())["envoy"] is None


async def test_envoys_stats_are_passed_on_with_their_query_as_it_came(envoy, start_control):
    control = await start_control()

    async def passed_on():
        code, body = await control.get("/envoy/stats?format=json&filter=a%2526b%23c")
        return body if code == 200 else None

    assert "failure_mode_allowed" in await control.until(passed_on, "Envoy's answer in time")
    assert "format=json&filter=a%2526b%23c" in envoy.asked


def forwarded(folder):
    """The headers that the file for Envoy names."""
    text = (folder.root / "xds" / "ecds.yaml").read_text()
    patterns = yaml.safe_load(text)["resources"][0]["typed_config"]["forward_rules"]["allowed_headers"]["patterns"]
    return {pattern["exact"] for pattern in patterns}


async def test_a_header_that_a_flag_names_is_forwarded_and_survives_a_restart(folder, service, envoy, start_control):
    folder.put(service.flags_yaml(5))
    control = await start_control()
    await control.until((folder.root / "xds" / "ecds.yaml").exists, "the files are there")
    assert "x-account-id" not in forwarded(folder)
    folder.put(service.flags_yaml(5, more="unit: [x-account-id, 'cookie:sid']"))
    await control.until(lambda: {"x-account-id", "cookie"} <= forwarded(folder), "the headers are forwarded")
    await control.end()
    before = (folder.root / "xds" / "ecds.yaml").stat().st_ino
    again = await start_control()
    await again.until(lambda: _knows(again), "the flags are known")
    assert (folder.root / "xds" / "ecds.yaml").stat().st_ino == before  # never written, so never without them
    assert {"x-account-id", "cookie"} <= forwarded(folder)


async def _knows(control):
    return (await control.status())["flag_file"]["version"]


async def test_after_corrupt_exposures_a_new_file_is_begun_above_every_version_that_was_served(
    folder, service, envoy, start_control
):
    folder.put(service.flags_yaml(5))
    folder.put_exposures("{ torn")
    (folder.state / "rulesets").mkdir()
    (folder.state / "rulesets" / "0123456789ab.41.json").write_text("{}")
    (folder.state / "rulesets" / "notes.by.hand.json").write_text("{}")
    control = await start_control()
    await control.until(lambda: _knows(control), "the flags are known")
    await control.until(lambda: control.cap() == 0, "a new file with a closed gate")
    assert control.exposures()["seq"] > 41


async def test_garbage_for_the_counters_ends_nothing(folder, service, envoy, start_control):
    folder.put(service.flags_yaml(5))
    path = folder.root / "counters.sock"
    control = await start_control(counters=path)
    await control.until(lambda: _knows(control), "the flags are known")
    await control.until(path.is_socket, "the counters' socket")
    report = Report("w", "b", 1, {Key(DIGITS, DIGITS, "v.0", "canary", "SPLIT", ""): 7}, {})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for garbage in (b"", b"{", b"\xff", b"[]", b"5", b"null", b"{}", b'{"worker": 5, "counts": 7}', b"[" * 100_000):
            sender.sendto(garbage, str(path))
        sender.sendto(json.dumps(plain_report(report)).encode(), str(path))

    async def counted():
        return (await control.status())["flags"][DIGITS]["decided"] == {"canary": {"SPLIT": 7}}

    await control.until(counted, "the report behind the garbage is counted")


async def test_sigterm_ends_control_with_zero_and_leaves_no_process(folder, service, envoy, start_control):
    folder.put(service.flags_yaml(5))
    control = await start_control()
    await control.until(lambda: _knows(control), "the flags are known")
    children = service.children_of(control.process.pid)
    control.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(control.process.wait, DEADLINE_S) == 0
    await asyncio.to_thread(service.wait_until, lambda: not any(map(service.is_alive, children)), "no child is left")
    assert "Traceback" not in control.log()


async def test_serve_follows_control_and_goes_on_without_it(folder, service, envoy, start_control, launch):
    folder.put(service.flags_yaml(100))
    closed(folder)
    perch = await asyncio.to_thread(launch)

    async def decides(cohort, reason):
        async def right():
            return (await asyncio.to_thread(perch.ask)).what == (cohort, reason)

        await control.until(right, f"{cohort} {reason}")

    control = await start_control()
    await decides("stable", "HELD")
    envoy.healthy["digits_canary"] = 2
    await decides("canary", "SPLIT")
    serving = perch.version()
    await control.until(lambda: _shows_version(control, serving), f"control follows its own exposures: {serving}")
    await control.end()
    envoy.healthy["digits_canary"] = 0
    for _ in range(20):
        assert (await asyncio.to_thread(perch.ask)).what == ("canary", "SPLIT")
    text = service.flags_yaml(0, more="description: without control")
    assert (await asyncio.to_thread(perch.put, text)).what == ("stable", "SPLIT")


async def _shows_version(control, version):
    """Control reads anew what it has written, and may be later than serve at that."""
    return (await control.status())["flags"][DIGITS]["version"] == version


async def test_while_nothing_can_be_written_the_status_shows_what_serve_goes_on_serving(
    folder, service, envoy, start_control, launch
):
    """A process that may make no file longer stands for a full disk: it is told the same way, and ends again."""
    folder.put(service.flags_yaml(100))
    closed(folder)
    perch = await asyncio.to_thread(launch)
    envoy.healthy["digits_canary"] = 2
    control = await start_control()

    async def shows(percent, held, alerts):
        async def right():
            status = await control.status()
            row = status["flags"].get(DIGITS, {})
            found = (
                row.get("effective_percent"),
                row.get("held"),
                [alert for alert in status["alerts"] if "not wr" in alert],
            )
            return found[:2] == (percent, held) and len(found[2]) == alerts and (status, found[2])

        return await control.until(right, f"{percent} % and {alerts} alerts")

    async def decides(cohort, reason):
        async def right():
            return (await asyncio.to_thread(perch.ask)).what == (cohort, reason)

        await control.until(right, f"{cohort} {reason}")

    await decides("canary", "SPLIT")
    await shows(100.0, False, 0)
    serving = perch.version()
    await control.until(lambda: _shows_version(control, serving), f"control follows its own exposures: {serving}")
    unlimited = resource.prlimit(control.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    envoy.healthy["digits_canary"] = 0
    status, alerts = await shows(100.0, False, 2)
    assert (await asyncio.to_thread(perch.ask)).what == ("canary", "SPLIT")
    assert status["flags"][DIGITS]["version"] == perch.version() == serving
    folder_name = str(folder.state)
    assert alerts[0] == (
        f"not written, so serve follows what was decided before: {folder_name}/exposure.json: File too large; "
        "digits has canary 100 %, not 0 %"
    )
    assert alerts[1].startswith(f"not written: {folder_name}/audit.jsonl: File too large; ")
    resource.prlimit(control.process.pid, resource.RLIMIT_FSIZE, unlimited)
    await shows(0.0, True, 0)
    await decides("stable", "HELD")
    kinds = [json.loads(line)["event"] for line in (folder.state / "audit.jsonl").read_text().splitlines()]
    assert "canary_cold" in kinds
    assert "exposure_not_written" in kinds


async def test_what_serve_could_not_keep_is_an_alert_until_it_can(folder, service, envoy, start_control):
    folder.put(service.flags_yaml(5))
    envoy.healthy["digits_canary"] = 1
    path = folder.root / "counters.sock"
    control = await start_control(counters=path)
    await control.until(lambda: control.readyz(200), "ready")
    version = f"{service.digest(folder.flags.read_bytes())}.{control.exposures()['seq']}"
    await control.until(lambda: _shows_version(control, version), f"control follows its own exposures: {version}")

    async def said():
        alerts = (await control.status())["alerts"]
        return [alert for alert in alerts if alert.endswith("serve is late, or cannot keep what a restart needs")]

    async def gone():
        return not await said()

    assert await gone()  # nobody serves yet, so there is nothing to keep
    await control.until(path.is_socket, "the counters' socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as serve:
        serve.sendto(json.dumps({"worker": "w", "boot": "b", "seq": 1, "counts": [], "heavy": {}}).encode(), str(path))
    (alert,) = await control.until(said, "the alert")
    record = folder.state / "rulesets" / f"{version}.json"
    assert alert.startswith(f"not written: {record}; ")
    record.parent.mkdir()
    record.write_text("{}")
    await control.until(gone, "no alert any more")


async def test_a_taken_address_is_named(folder, service, envoy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "extproc", "control", "--listen", address]
        environment = service.environment(folder, envoy_admin=envoy.address)
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, cwd=folder.root, stderr=asyncio.subprocess.PIPE
        )
        _, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 1
    assert f"cannot listen at {address}" in said.decode()
    assert "Traceback" not in said.decode()


@pytest.mark.parametrize(("name", "value"), [("envoy_admin", "nonsense"), ("control_listen", "nonsense")])
def test_a_bad_address_is_one_line_that_names_its_variable(folder, service, monkeypatch, name, value):
    for variable, text in service.environment(folder, **{name: value}).items():
        monkeypatch.setenv(variable, text)
    ended = CliRunner().invoke(app, ["control"])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"perch: PERCH_{name.upper()}: ")


def test_close_gates_caps_every_flag_and_keeps_the_rest(folder, service):
    from extproc.control import close_gates
    from extproc.settings import Settings

    settings = Settings(flags=folder.flags, state=folder.state, models=folder.models)
    models = load_models(folder.models)
    close_gates(settings, models)  # no flag file: nobody to let through, nothing to write
    assert not (folder.state / "exposure.json").exists()
    folder.put(service.flags_yaml(5))
    folder.put_exposures(json.dumps({"seq": 3, "flags": {"digits": {"salt": "digits", "percent": 25, "step": 2}}}))
    close_gates(settings, models)
    entry = json.loads((folder.state / "exposure.json").read_text())["flags"]["digits"]
    assert (entry["percent"], entry["step"], entry["cap"]) == (25, 2, 0)
    folder.flags.write_text("version: 1\nflags: [")
    Path(folder.state / "flags.last-good.yaml").write_text(service.flags_yaml(5, salt="other"))
    close_gates(settings, models)
    assert json.loads((folder.state / "exposure.json").read_text())["flags"]["digits"]["salt"] == "other"


async def test_control_closes_the_gates_when_it_starts_before_envoy_and_leaves_them_when_it_starts_again(
    folder, service, envoy, start_control
):
    folder.put(service.flags_yaml(5))
    folder.put_exposures(json.dumps({"seq": 7, "flags": {"digits": {"salt": "digits", "cap": 100}}}))
    envoy.healthy["digits_canary"] = 1
    beside_envoy = await start_control()
    await beside_envoy.until(lambda: beside_envoy.readyz(200), "ready")
    assert (beside_envoy.cap(), beside_envoy.exposures()["seq"]) == (100, 7)
    await beside_envoy.end()
    alone = await start_control(envoy_admin=f"unix:{folder.root}/not-there.sock")
    assert (alone.cap(), alone.exposures()["seq"]) == (0, 8)


async def test_writing_needs_the_token_where_others_reach_the_api_and_none_on_a_socket_of_this_machine(
    folder, service, envoy, start_control
):
    folder.put(service.flags_yaml(5))
    secret = folder.root / "token"
    secret.write_text("correct-horse-battery\n")
    control = await start_control(token_file=secret)
    assert (await _post(control))[0] == 401
    assert (await _post(control, "Bearer correct-horse-batterz"))[0] == 401
    assert (await _post(control, "Bearer correct-horse-battery"))[0] in (200, 400)  # 400: no flag file yet
    assert (await control.get("/v1/status"))[0] == 200
    await control.end()
    assert (await _post(await start_control()))[0] in (200, 400)


async def _post(control, authorization=None):
    connector = aiohttp.UnixConnector(str(control.listen))
    headers = {} if authorization is None else {"authorization": authorization}
    report = {"unit": "user-1", "flag": "digits", "name": "accuracy", "value": 1}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://control/v1/outcomes", json=report, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"short", "needs 16 characters"), ("zwölf-zwölf-zwölf".encode(), "plain characters")],
)
async def test_a_token_file_that_cannot_be_used_ends_control_with_one_line(folder, service, content, said):
    secret = folder.root / "token"
    if content is not None:
        secret.write_bytes(content)
    folder.put(service.flags_yaml(5))
    environment = service.environment(folder, token_file=secret, control_listen=f"unix:{folder.root}/c.sock")
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "extproc", "control"],
        env=environment, cwd=folder.root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("perch: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"perch: {secret}: ")
    assert said in lines[0]
    assert "Traceback" not in done.stderr

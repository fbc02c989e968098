"""`perch up` itself: how it starts, what it says, how it ends, and what it keeps from one run to the next."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

CANARY_USER = "user-6"  # bucket 2879 under the shipped salt: on canary at 5 %


async def test_the_gate_holds_a_cold_canary_and_closes_on_a_lost_one_and_a_restart_remembers(tools):
    with tools.folder() as place, tools.standing_in(place / "late-stable.sock", "stable"):
        models, flags = tools.stood_in(place, "late"), tools.flag_file(late=5)
        missed: list[int] = []
        with tools.running(models, flags, start=False) as system:
            async with tools.client_of(system) as client:
                system.begin()
                tools.until(lambda: system.get(system.port, "/livez")[0] == 200, "the listener")
                await is_held(tools, system, client)
                assert explained(system) == ("stable", "HELD")
                # Until Envoy has checked serve as well, and while it does not answer control, that is what is missing.
                not_warm = (503, "the canary of late is not warm\n")
                tools.until(lambda: system.get(system.control_port, "/readyz") == not_warm, "the readiness to say so")
                assert "curl" not in system.output
                with tools.standing_in(place / "late-canary.sock", "canary"), well(tools, system, missed):
                    await is_open(tools, system, client)
                    tools.until(lambda: "curl" in system.output, "the table")
                    tools.until(lambda: explained(system) == ("canary", "SPLIT"), "explain to say so")
                await is_held(tools, system, client)
                with tools.standing_in(place / "late-canary.sock", "canary") as canary:
                    with well(tools, system, missed):
                        await is_open(tools, system, client)
                    canary.send_signal(signal.SIGUSR1)  # answers, but says that it is not ready
                    tools.until(lambda: not system.healthy()["late_canary"], "Envoy to notice")
                    await is_held(tools, system, client)
                    tools.until(lambda: "late: lost its canary twice" in system.output, "the line of the event")
                    with well(tools, system, missed):
                        canary.send_signal(signal.SIGUSR2)
                        await is_open(tools, system, client)
                    assert_told(system, missed)
                    await restarted_it_remembers(tools, system, client)


@contextlib.contextmanager
def well(tools: Any, system: Any, missed: list[int]) -> Iterator[None]:
    """Inside, the canary is well, or gets well. Adds how many of Envoy's health checks failed for all that.

    The machine may be so busy that the stand-in does not come to answer, and two such checks are a canary that is gone.
    """

    def failed() -> int:
        name = "cluster.late_canary.health_check.failure"
        found: dict[str, int] = tools.until(lambda: system.counters(f"^{name}$"), "Envoy's counters")
        return found[name]

    before = failed()
    yield
    missed.append(failed() - before)


def assert_told(system: Any, missed: list[int]) -> None:
    """Each of three times warm and two times cold has its event; more of them only where health checks were missed."""
    warm, cold = len(system.events("canary_warm")), len(system.events("canary_cold"))
    assert 0 <= cold - 2 <= sum(checks // 2 for checks in missed)
    assert warm == cold + 1
    assert system.events("canary_lost") == ["late: lost its canary twice within five minutes"] * (cold // 2)


async def restarted_it_remembers(tools: Any, system: Any, client: Any) -> None:
    """Percentage, version and users are as before, although the flag file was broken meanwhile."""
    before = system.status()["flags"]["late"]
    assert system.stop() == 0
    system.flags.write_text("version: 1\nflags: {late: {canary: much}}\n")
    system.start()
    await client.until(CANARY_USER, "200 canary", model="late")
    tools.until(lambda: numbers(system) == (False, 5, 5, 1), "the percentage of before")
    assert digest_of(system.status()["flags"]["late"]) == digest_of(before)
    for line in ("flags rejected: ", "last good: "):
        tools.until(lambda line=line: line in system.output, line)


async def is_held(tools: Any, system: Any, client: Any) -> None:
    """Nobody is on canary, and the status says why. Stable serves small and large bodies all the while."""
    large = tools.inference(10_000)
    for body in [None, large] * 2:
        assert str(await client.infer(CANARY_USER, model="late", body=body)) == "200 stable"
    tools.until(lambda: numbers(system) == (True, 0, 5, 0), "the flag held")
    for body in (None, large):
        assert str(await client.infer(CANARY_USER, model="late", body=body)) == "200 stable"


async def is_open(tools: Any, system: Any, client: Any) -> None:
    """Canary's users are on canary."""
    await client.until(CANARY_USER, "200 canary", model="late")
    tools.until(lambda: numbers(system) == (False, 5, 5, 1), "the flag not held")


def numbers(system: Any) -> tuple[Any, ...] | None:
    """What the status says of the flag: held, percentage, percentage without the gate, canary servers."""
    flag = system.status().get("flags", {}).get("late")
    return flag and (flag["held"], flag["effective_percent"], flag["wanted_percent"], flag["ready"]["canary"])


def explained(system: Any) -> tuple[str, str]:
    """Arm and reason as `perch explain` says them."""
    files = ["--flags", system.flags, "--state", system.state, "--models", system.folder / "models.yaml"]
    asked = ["explain", "--flag", "late", "--unit", CANARY_USER, "--json", *map(str, files)]
    answer = subprocess.run([sys.executable, "-m", "extproc", *asked], capture_output=True, check=True, cwd=system.root)
    content = json.loads(answer.stdout)
    return content["cohort"], content["reason"]


def digest_of(flag: dict[str, Any]) -> str:
    """The part of a version that stands for the flag file; the rest counts the controller's writes."""
    return flag["version"].partition(".")[0]


def one_of_each(tools: Any) -> dict[str, Any]:
    """The shipped model with one server per arm."""
    return tools.digits(stable=["unix:digits-stable-0.sock"], canary=["unix:digits-canary-0.sock"])


def test_what_happens_is_told_in_a_line_each_and_ctrl_c_stops_envoy_first(tools):
    with tools.running(one_of_each(tools)) as system:
        warm = re.compile(r"control +digits: 1 of 1 canary servers ready; its share of users is sent there\n")
        tools.until(lambda: warm.search(system.output), "the line that `perch up` passes on")
        for address in (system.port, system.control_port, system.admin_port):
            assert f"http://127.0.0.1:{address}" in system.output
        table_ends = len(system.output)
        system.serve_flags(tools.flag_file(digits=7))
        system.edit_flags("version: 1\nflags: {digits: {canary: 101}}\n")
        system.signal(signal.SIGKILL, "digits-canary-0")
        for line in (
            r"serve +flags reloaded: 1 flag, version [0-9a-f]+\.\d+",
            r"serve +flags rejected: .*flags\.yaml:2:\d+: flags\.digits\.canary: .*",
            r"digits-canary-0 +died: killed by SIGKILL: .*",
            r"digits-canary-0 +restarting: in 0\.2 s",
        ):
            told = re.compile(rf"^\d\d:\d\d:\d\d +{line}$", re.MULTILINE)
            tools.until(lambda told=told: told.search(system.output, table_ends), line)
        system.until_settled()
        everything = set(system.roles())
        system.process.send_signal(signal.SIGINT)
        while "envoy" in (left := set(system.roles())):
            # One look takes its time: Envoy may have ended in the middle of it, and after Envoy the others.
            assert left == everything or "envoy" not in system.roles()
        assert system.process.wait(60) == 0
        assert "Traceback" not in system.report()


def test_killed_at_any_moment_it_leaves_no_process_and_the_next_run_clears_its_folder(tools):
    with tools.running(one_of_each(tools), start=False) as system:
        system.begin()
        tools.until(lambda: {"envoy", "serve", "control", "digits-canary-0"} <= set(system.roles()), "every process")
        system.stop(signal.SIGKILL)
        tools.until(lambda: not system.left_processes(), "the end of every process")
        (left,) = system.temporary.iterdir()
        system.begin()
        tools.until(lambda: not left.exists() and "serve" in system.roles(), "a start that clears what was left")
        assert system.stop() == 0


def break_port(system: Any, option: str) -> Any:
    """Somebody else listens at the port."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", getattr(system, option)))
    taken.listen()
    return taken


def break_file(system: Any, name: str, text: str | None) -> None:
    """Another text in a file, or no file."""
    (system.folder / name).unlink()
    if text is not None:
        (system.folder / name).write_text(text)


MISTAKES = {
    "port": (
        lambda s: break_port(s, "port"),
        r"port {port} is taken by another program; choose another with --port PORT",
    ),
    "control port": (lambda s: break_port(s, "control_port"), r"port {control_port} is taken .* --control-port PORT"),
    "admin port": (lambda s: break_port(s, "admin_port"), r"port {admin_port} is taken .* --admin PORT"),
    "no models file": (lambda s: break_file(s, "models.yaml", None), r".*models\.yaml:1:1: cannot be read: .*"),
    "bad models file": (lambda s: break_file(s, "models.yaml", "digits: [\n"), r".*models\.yaml:\d+:\d+: not YAML: .*"),
    "no flag file": (lambda s: break_file(s, "flags.yaml", None), r".*flags\.yaml:1:1: .*no such file.*"),
    "bad flag file": (
        lambda s: break_file(s, "flags.yaml", "version: 1\nflags: {digits: {canary: 101}}\n"),
        r".*flags\.yaml:2:\d+: flags\.digits\.canary: .*",
    ),
    "no artifacts": (
        lambda s: setattr(s, "options", ("--canary", str(s.folder / "nothing"))),
        r"digits-canary-0: exit code 1 before it was ready: .*nothing.*",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_left(mistake, tools):
    make, message = MISTAKES[mistake]
    with tools.running(one_of_each(tools), start=False) as system:
        taken = make(system)
        system.begin()
        assert system.process.wait(60) == 1
        if taken is not None:
            taken.close()
        wanted = message.format(port=system.port, control_port=system.control_port, admin_port=system.admin_port)
        assert re.fullmatch(f"(..:..:.. +perch +starting .*\n)?perch: {wanted}\n", system.output), system.output

"""`perch serve` from start to end: before there is a good file, after a restart, and what it says meanwhile."""

import asyncio
import contextlib
import json
import os
import pickle
import random
import re
import resource
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from typer.testing import CliRunner

from extproc.cli import app
from extproc.core.flags import Exposures
from extproc.flagcompiler import Compiler, Head, Refused, Task
from extproc.receiver import Receiver

STATSD_LINE = re.compile(r"(?P<name>[a-z_.]+):(?P<value>-?\d+(?:\.\d+)?)\|(?P<kind>c|g|ms)(?:\|#(?P<tags>\S+))?")
FULL = {"digits": {"salt": "digits", "cap": 0}}


def closed(seq: int = 3) -> str:
    return json.dumps({"seq": seq, "flags": FULL})


@pytest.fixture
def statsd():
    """A real UDP listener; `.lines()` are all that came so far as (name, value, kind, tags)."""

    class Listener:
        def __init__(self):
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self.socket.bind(("127.0.0.1", 0))
            self.socket.setblocking(False)
            self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
            self.got = []

        def lines(self):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = self.socket.recv(65_536)
                    assert len(packet) < 1432
                    for line in packet.decode("ascii").split("\n"):
                        match = STATSD_LINE.fullmatch(line)
                        assert match, line
                        tags = dict(tag.split(":", 1) for tag in match["tags"].split(","))
                        self.got.append((match["name"], float(match["value"]), match["kind"], tags))
            return self.got

        def total(self, name, **tags):
            """The sum of the counter's lines with these tags."""
            return sum(
                value
                for found, value, kind, found_tags in self.lines()
                if kind == "c" and found == name and tags.items() <= found_tags.items()
            )

        def last(self, name, **tags):
            """The gauge's last value with these tags; None if it was never told."""
            return next(
                (
                    value
                    for found, value, kind, found_tags in reversed(self.lines())
                    if kind == "g" and found == name and tags.items() <= found_tags.items()
                ),
                None,
            )

    listener = Listener()
    yield listener
    listener.socket.close()


@pytest.fixture
def perch(shared_perch, service):
    """The shared perch, at a flag file that sends everybody to canary and no exposures' opinion."""
    shared_perch.folder.put_exposures(json.dumps({"seq": 0, "flags": {}}))
    shared_perch.put(service.flags_yaml(100, more=f"description: '{random.random()}'"))
    service.wait_until(lambda: shared_perch.ask().what == ("canary", "SPLIT"), "the gate is open")
    return shared_perch


def test_without_any_good_file_everybody_is_stable_and_it_is_not_ready(folder, launch, service):
    perch = launch()
    perch.wait_for_event("flags_rejected")
    assert perch.client().health() == 2
    assert perch.ask().what == ("stable", "DEFAULT")
    assert perch.ask().metadata["model"] == "digits"
    folder.put("version: 1\nflags: {")
    perch.wait_for_event("flags_rejected", 2)
    assert perch.client().health() == 2
    assert perch.put(service.flags_yaml(100)).what == ("canary", "SPLIT")
    assert perch.client().health() == 1


@pytest.mark.parametrize("left", ["half-written", "a folder"])
def test_the_last_good_file_is_served_across_a_restart(folder, launch, service, left):
    perch = launch()
    good = service.flags_yaml(100, more="description: good")
    version = perch.put(good).metadata["version"]
    service.wait_until((folder.state / "flags.last-good.yaml").exists, "the last good file is kept")
    assert perch.stop() == 0
    folder.flags.unlink()
    if left == "half-written":
        folder.flags.write_text(service.flags_yaml(0)[:20])
    elif left == "a folder":
        folder.flags.mkdir()
    folder.put_exposures(closed())
    again = launch()
    again.wait_for_event("last_good")
    assert again.client().health() == 1
    assert again.ask().what == ("stable", "HELD")
    assert again.version() == version.replace(".0", ".3")
    if left == "a folder":
        folder.flags.rmdir()
    assert again.put(service.flags_yaml(0, more="description: mended")).cohort == "stable"
    assert "Traceback" not in again.log()


@pytest.mark.parametrize("kind", ["binary", "a folder"])
def test_a_last_good_file_that_is_not_good_leaves_everybody_stable(folder, launch, service, kind):
    place = folder.state / "flags.last-good.yaml"
    folder.state.mkdir()
    place.write_bytes(b"\0\1") if kind == "binary" else place.mkdir()
    perch = launch()
    perch.wait_for_event("not_served")
    assert perch.ask().what == ("stable", "DEFAULT")
    assert perch.client().health() == 2
    assert perch.put(service.flags_yaml(100)).cohort == "canary"
    assert len(perch.events("not_served")) == 1


def test_exposures_that_are_corrupt_at_the_start_close_the_gate_until_they_are_good_or_gone(folder, launch, service):
    folder.put(service.flags_yaml(100))
    folder.put_exposures("{ half")
    perch = launch()
    perch.wait_for_event("flags_loaded")
    assert perch.ask().what == ("stable", "HELD")
    folder.put_exposures(json.dumps({"seq": 1, "flags": {}}))
    service.wait_until(lambda: perch.ask().what == ("canary", "SPLIT"), "good exposures open the gate")
    assert perch.stop() == 0
    folder.put_exposures("{ half again")
    again = launch()
    again.wait_for_event("flags_loaded", 2)
    assert again.ask().what == ("stable", "HELD")
    (folder.state / "exposure.json").unlink()
    service.wait_until(lambda: again.ask().what == ("canary", "SPLIT"), "no exposures close no gate")


def test_sigterm_ends_it_with_zero_and_leaves_no_socket_and_no_process(folder, launch, service):
    folder.put(service.flags_yaml())
    perch = launch()
    perch.ask()
    children = perch.children()
    assert children  # the flag compiler
    assert perch.stop() == 0
    assert not folder.socket.exists()
    service.wait_until(lambda: not any(map(service.is_alive, children)), "its children are gone")
    assert "Traceback" not in perch.log()


def test_a_killed_serve_leaves_no_flag_compiler(folder, launch, service):
    perch = launch()
    children = perch.children()
    assert children
    perch.process.send_signal(signal.SIGKILL)
    service.wait_until(lambda: not any(map(service.is_alive, children)), "its children are gone")


def test_a_stale_socket_of_a_killed_serve_is_replaced(folder, launch, service):
    folder.put(service.flags_yaml())
    first = launch()
    first.wait_for_event("flags_loaded")
    first.process.kill()
    first.process.wait()
    assert folder.socket.is_socket()
    second = launch()
    second.wait_for_event("listening", 2)
    second.wait_for_event("flags_loaded", 2)
    assert second.ask().what[1] == "SPLIT"


def run_serve(folder, service, *options, **settings):
    """`perch serve` with these options, which is expected to end by itself."""
    command = [sys.executable, "-m", "extproc", "serve", *options]
    environment = service.environment(folder, **settings)
    return subprocess.run(
        command, env=environment, cwd=folder.root, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_socket_that_another_serve_uses_is_named_and_left_alone(folder, launch, service):
    folder.put(service.flags_yaml())
    perch = launch()
    perch.wait_for_event("flags_loaded")
    second = run_serve(folder, service, "--listen", f"unix:{folder.socket}")
    assert second.returncode == 1
    assert str(folder.socket) in second.stderr
    assert "another process" in second.stderr
    assert "Traceback" not in second.stderr
    assert perch.ask().what[1] == "SPLIT"
    assert service.Client(f"unix:{folder.socket}").health() == 1


def test_a_file_that_is_no_socket_is_never_removed(folder, service):
    precious = folder.root / "precious.txt"
    precious.write_text("work of years")
    ended = run_serve(folder, service, "--listen", f"unix:{precious}")
    assert ended.returncode == 1
    assert str(precious) in ended.stderr
    assert precious.read_text() == "work of years"


def test_a_taken_port_is_named(folder, service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run_serve(folder, service, "--listen", address)
    assert ended.returncode == 1
    assert address in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        (["--listen", "nonsense"], {}, "--listen"),
        (["--listen", "nonsense", "--workers", "2"], {}, "--listen"),
        (["--listen", "unix:" + "/x" * 60], {}, "/x/x"),
        (["--listen", "127.0.0.1:65536"], {}, "65536"),
        (["--workers", "0"], {}, "--workers"),
        ([], {"statsd": "nonsense"}, "PERCH_STATSD"),
        ([], {"statsd": "127.0.0.1:0"}, "PERCH_STATSD"),
        ([], {"listen": "10.0.0.1"}, "PERCH_LISTEN"),
        ([], {"workers": "many"}, "PERCH_WORKERS"),
        ([], {"force_token": "short"}, "PERCH_FORCE_TOKEN"),
        ([], {"statsd_tags": "jaeger"}, "PERCH_STATSD_TAGS"),
        ([], {"transport": "carrier-pigeon"}, "PERCH_TRANSPORT"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(folder, service, monkeypatch, options, settings, named):
    for name, value in service.environment(folder, **settings).items():
        monkeypatch.setenv(name, value)
    ended = CliRunner().invoke(app, ["serve", *options])
    assert ended.exit_code == 2
    (said,) = ended.stderr.splitlines()
    assert said.startswith("perch: ")
    assert named in said
    assert "Value error" not in said


def test_a_models_file_that_is_not_there_is_one_line(folder, service):
    ended = run_serve(folder, service, models="/nowhere/models.yaml")
    assert ended.returncode == 1
    (said,) = ended.stderr.splitlines()
    assert said.startswith("perch: /nowhere/models.yaml")


def test_a_state_folder_that_cannot_be_written_is_told_and_stops_nothing(folder, launch, service):
    folder.state.write_text("a file stands where the folder should be")
    folder.put(service.flags_yaml(100))
    perch = launch()
    assert perch.wait_for_event("state_not_kept")
    assert perch.ask().what == ("canary", "SPLIT")
    assert perch.put(service.flags_yaml(0)).what == ("stable", "SPLIT")
    assert perch.client().health() == 1


def test_a_disk_that_is_full_is_told_and_stops_nothing(perch, service):
    """Files may grow to a few bytes only: what a full disk does to a write half-way through."""
    folder = perch.folder
    perch.put(service.flags_yaml(0))
    kept = folder.state / "flags.last-good.yaml"
    service.wait_until(lambda: kept.exists() and kept.read_text() == service.flags_yaml(0), "the first file is kept")
    _, hard = resource.prlimit(perch.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(perch.process.pid, resource.RLIMIT_FSIZE, (10, hard))
    assert perch.put(service.flags_yaml(100)).what == ("canary", "SPLIT")
    assert perch.put(service.flags_yaml(50)).what[1] == "SPLIT"
    assert kept.read_text() == service.flags_yaml(0)
    version = perch.version()
    assert not (folder.state / "rulesets" / f"{version}.json").exists()
    resource.prlimit(perch.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    service.wait_until(
        lambda: kept.read_text() == service.flags_yaml(50), "what is served is kept without another edit"
    )
    service.wait_until((folder.state / "rulesets" / f"{version}.json").exists, "its record too")
    service.wait_until(lambda: not list(folder.state.rglob(".*")), "no temporary file is left")


async def test_a_task_whose_compiler_dies_over_it_is_given_to_a_new_one():
    """A compiler can be killed (out of memory) for no fault of the file; the file must not wait for another edit."""
    compiler = Compiler()
    task = Task(content=b"version: 1\nflags: {}\n", exposures=Exposures(), models={}, with_replies=False)
    try:
        await compiler.start()
        first = compiler._process
        first.send_signal(signal.SIGSTOP)
        compiling = asyncio.ensure_future(_parts(compiler.compile(task)))
        await asyncio.sleep(0)  # the task is written: the pipe has room for it
        await asyncio.sleep(0)
        assert compiler._turn.locked()
        first.kill()
        (head,) = await compiling
        assert isinstance(head, Head)
        assert compiler._process is not first
    finally:
        await compiler.stop()


async def test_what_a_compiler_sent_before_it_died_is_void(monkeypatch):
    """It dies in the middle of its answer; the next one's answer is served, each flag of it once."""
    compiler, whole, begun = Compiler(), Compiler._answer, []

    async def dies_once(self, task):
        begun.append(task)
        sent = 0
        async for part in whole(self, task):
            yield part
            if (sent := sent + 1) == 2 and len(begun) == 1:
                raise EOFError

    monkeypatch.setattr(Compiler, "_answer", dies_once)
    names = [f"m{i:02}" for i in range(40)]
    content = "version: 1\nflags:\n" + "".join(f"  {name}: {{salt: {name}, canary: 5}}\n" for name in names)
    models = {name: f"/v2/models/{name}/" for name in names}
    task = Task(content=content.encode(), exposures=Exposures(), models=models, with_replies=True)
    received = []
    try:
        verdict = await Receiver(task.models, None, received.append).take(compiler.compile(task))
    finally:
        await compiler.stop()
    assert (len(begun), verdict.problems, verdict.flags) == (2, (), 40)
    (one,) = received
    assert [flag.key for flag, _ in one.flags] == names
    assert len(one.published.replies) == len(one.published.ruleset.choices)


async def test_of_a_file_with_endless_problems_the_first_ones_are_told():
    compiler = Compiler()
    content = b"version: 1\nflags:\n" + b"".join(b"  f%d: {canary: 101}\n" % i for i in range(2000))
    task = Task(content=content, exposures=Exposures(), models={}, with_replies=False)
    try:
        (refused,) = await _parts(compiler.compile(task))
    finally:
        await compiler.stop()
    assert isinstance(refused, Refused)
    assert len(refused.problems) == 200
    assert refused.problems[0].place.line == 3


async def _parts(answer):
    return [pickle.loads(part) async for part in answer]


def test_the_next_edit_works_after_the_flag_compiler_was_killed(perch, service):
    rejected = len(perch.events("flags_rejected"))
    for canary in (0, 100):
        (compiler,) = perch.children()
        os.kill(compiler, signal.SIGKILL)
        reply = perch.put(service.flags_yaml(canary, more=f"description: after {compiler}"))
        assert reply.cohort == ("canary" if canary else "stable")
        assert compiler not in perch.children()
    assert len(perch.events("flags_rejected")) == rejected


def test_a_rollback_is_followed_though_the_flag_compiler_was_just_killed(perch, service):
    (compiler,) = perch.children()
    perch.folder.put_exposures(closed())
    os.kill(compiler, signal.SIGKILL)
    service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the rollback is followed")


def test_a_stopped_flag_compiler_keeps_no_request_waiting(perch, service):
    (compiler,) = perch.children()
    os.kill(compiler, signal.SIGSTOP)
    edited = perch.folder.put(service.flags_yaml(0))
    for _ in range(20):
        assert perch.ask().what == ("canary", "SPLIT")
    assert perch.client().health() == 1
    os.kill(compiler, signal.SIGCONT)
    assert perch.wait_for_file(edited).what == ("stable", "SPLIT")


def test_statsd_is_told_the_decisions_the_ruleset_and_the_reloads(folder, launch, service, statsd):
    folder.put(service.flags_yaml(100, more="allow_force: true"))
    perch = launch(statsd=statsd.address, force_token=service.TOKEN)
    version = perch.wait_for_file(service.digest(folder.flags.read_bytes())).metadata["version"]
    base = statsd.total("perch.decision.count")
    for i in range(7):
        perch.ask(f"user-{i}")
    perch.ask("tester", (b"x-force-cohort", f"stable;{service.TOKEN}".encode()))
    perch.ask(None, path=b"/v2/models/wine/infer")
    tags = {"flag": "digits", "model": "digits"}
    service.wait_until(
        lambda: statsd.total("perch.decision.count", cohort="stable", reason="FORCED", **tags) == 1, "forced decision"
    )
    service.wait_until(
        lambda: statsd.total("perch.decision.count", flag="none", model="wine", reason="DEFAULT") == 1, "no flag"
    )
    service.wait_until(
        lambda: statsd.total("perch.decision.count", cohort="canary", reason="SPLIT", **tags) >= 7, "seven decisions"
    )
    service.wait_until(lambda: statsd.total("perch.decision.reload", result="accepted") == 1, "the reload")
    service.wait_until(lambda: statsd.last("perch.decision.canary_percent", **tags) == 100, "the percentage")
    assert statsd.last("perch.decision.ruleset", version=version) == 1
    folder.put("version: 1\nflags: [")
    service.wait_until(lambda: statsd.total("perch.decision.reload", result="rejected") == 1, "the rejection")
    perch.put(service.flags_yaml("12.345", more="enabled: false"))
    service.wait_until(lambda: statsd.last("perch.decision.canary_percent", **tags) == 0, "switched off counts as 0")
    perch.put(service.flags_yaml("12.345"))
    service.wait_until(lambda: statsd.last("perch.decision.canary_percent", **tags) == 12.345, "three decimals")
    asked = statsd.total("perch.decision.count")
    perch.ask("last")
    assert perch.stop() == 0
    assert statsd.total("perch.decision.count") > asked >= base  # what was decided last is told before the end


def test_a_statsd_that_is_not_there_costs_no_request(folder, launch, service):
    folder.put(service.flags_yaml(100))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    perch = launch(statsd=address)
    perch.wait_for_event("flags_loaded")
    assert all(perch.ask(f"u{i}").cohort == "canary" for i in range(50))
    assert perch.stop() == 0
    assert "Traceback" not in perch.log()


def test_garbage_on_a_stream_ends_neither_the_stream_nor_the_server(perch, service):
    good = service.request_bytes([(b"x-user-id", b"alice")])
    replies = perch.client().process(b"\xff" * 100, good, b"", random.Random(1).randbytes(5000), good)
    assert [service.decode(reply).what for reply in replies][1::3] == [("canary", "SPLIT")] * 2
    assert all(service.decode(replies[i]).what == ("stable", "ERROR") for i in (0, 2, 3))


def test_a_message_larger_than_a_megabyte_is_refused_and_the_server_lives(perch, service):
    with pytest.raises(grpc.RpcError) as refused:
        perch.client().process(b"\x00" * (2 << 20))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert perch.ask().what == ("canary", "SPLIT")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_answer_after_a_start_is_by_the_flag_file(folder, launch, service, workers):
    """Envoy may not have noticed the restart, and would believe a `stable` that only means: not read yet."""
    rules = "".join(f"\n  - {{name: r{n}, when: {{header: x-r, in: [a{n}]}}, serve: stable}}" for n in range(1000))
    folder.put(service.flags_yaml(100, more=f"rules:{rules}"))  # takes some tenths of a second to read
    perch = launch(workers=workers)
    for worker in range(workers):
        assert perch.client(worker).health() == 1
        assert perch.ask(worker=worker).what == ("canary", "SPLIT")

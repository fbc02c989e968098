import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from extproc.supervisor import EventKind, Process, StartFailed, Supervisor

ENV = {"PATH": os.environ["PATH"]}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Supervises one program that has a child of its own, says who is who, and waits to be killed. How it ends: argv[2].
SUPERVISING = """
import asyncio, os, sys
from pathlib import Path
from extproc.supervisor import Process, Supervisor

async def main(folder, ending):
    both = folder / "both"
    async def ready():
        return both.exists()
    supervisor = Supervisor([Process(
        name="parent",
        argv=("sh", "-c", f"trap '' TERM; sleep 1000 & echo $! > {both}.new; mv {both}.new {both}; wait"),
        env={"PATH": os.environ["PATH"]}, log_path=folder / "log", ready=ready)], lambda event: None)
    await supervisor.start()
    print(supervisor.pids()["parent"], both.read_text().strip(), supervisor._guard._process.pid, flush=True)
    if ending == "waits":
        await supervisor.run()
    raise SystemExit("forgot to stop")

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


class Events(list):
    """The events so far, and a way to wait for one."""

    def __init__(self):
        super().__init__()
        self.more = asyncio.Event()

    def __call__(self, event):
        """Note an event."""
        self.append(event)
        self.more.set()

    def of(self, name):
        """The kinds of one process's events."""
        return [str(event.kind) for event in self if event.process == name]

    async def until(self, kind, name, times=1):
        """The `times`-th event of this kind and process."""
        async with asyncio.timeout(60):
            while True:
                found = [event for event in self if (event.kind, event.process) == (kind, name)]
                if len(found) >= times:
                    return found[times - 1]
                self.more.clear()
                await self.more.wait()


@pytest.fixture
def events():
    return Events()


@pytest.fixture
async def supervise(events):
    made = []

    def build(*processes, on_event=events, **options):
        made.append(Supervisor(processes, on_event, **{"backoff_s": (0.01,), **options}))
        return made[-1]

    yield build
    for supervisor in made:
        await supervisor.stop()


@pytest.fixture
def process(tmp_path):
    def build(name, script="touch {up}; exec sleep 1000", **options):
        """A shell program; it is ready once it has made the file `{up}`."""
        up = tmp_path / f"{name}.up"

        async def ready():
            return up.exists()

        options = {"ready": ready, "leftovers": (up,), **options}
        argv = ("sh", "-c", script.format(up=up))
        return Process(name=name, argv=argv, env=ENV, log_path=tmp_path / "logs" / f"{name}.log", **options)

    return build


def alive(pid):
    """Whether the process exists and is no zombie (whose parent, not ours, has yet to look at it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_dead(*pids):
    async with asyncio.timeout(60):
        while any(alive(pid) for pid in pids):  # noqa: ASYNC110  the kernel has no event for a stranger's death
            await asyncio.sleep(0.01)


async def test_a_stage_starts_together_and_the_next_once_all_of_it_is_ready(process, supervise, events, tmp_path):
    # Each of the first two is ready only when the other runs: one after the other would never end.
    meet = "touch {up}.here; while ! test -e %s; do sleep 0.02; done; touch {up}; exec sleep 1000"
    supervisor = supervise(
        process("late", stage=2),
        process("left", meet % (tmp_path / "right.up.here"), stage=1),
        process("right", meet % (tmp_path / "left.up.here"), stage=1),
    )
    await supervisor.start()
    order = [(str(event.kind), event.process) for event in events]
    assert sorted(order[:2]) == [("started", "left"), ("started", "right")]
    assert sorted(order[2:4]) == [("ready", "left"), ("ready", "right")]
    assert order[4:] == [("started", "late"), ("ready", "late")]
    assert {event.process: event.pid for event in events} == supervisor.pids()
    assert len(set(supervisor.pids().values())) == 3


async def test_stages_stop_in_reverse_and_nothing_is_left(process, supervise, events, tmp_path):
    supervisor = supervise(process("a", stage=0), process("b", stage=1), process("c", stage=2))
    await supervisor.start()
    pids = supervisor.pids()
    running = asyncio.create_task(supervisor.run())
    await asyncio.gather(supervisor.stop(), supervisor.stop())
    await running
    stopped = [event for event in events if event.kind is EventKind.STOPPED]
    assert [event.process for event in stopped] == ["c", "b", "a"]
    assert {event.process: event.pid for event in stopped} == pids
    assert {event.detail for event in stopped} == {"killed by SIGTERM"}
    assert supervisor.pids() == {}
    for pid in [*pids.values(), supervisor._guard._process.pid]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list(tmp_path.glob("*.up")) == []


async def test_what_dies_is_started_again_after_growing_pauses(process, supervise, events):
    supervisor = supervise(process("a"), backoff_s=(0.01, 0.02, 0.04), steady_s=3600)
    await supervisor.start()
    running = asyncio.create_task(supervisor.run())
    for times in range(1, 5):
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
        again = await events.until(EventKind.READY, "a", times + 1)
        assert supervisor.pids() == {"a": again.pid}
    assert not running.done()
    pauses = [event.detail for event in events if event.kind is EventKind.RESTARTING]
    assert pauses == ["in 0.01 s", "in 0.02 s", "in 0.04 s", "in 0.04 s"]
    assert events.of("a") == ["started", "ready", *(["died", "restarting", "started", "ready"] * 4)]
    died = await events.until(EventKind.DIED, "a")
    assert died.detail.startswith("killed by SIGKILL: it wrote nothing (log: ")


async def test_a_program_that_stayed_up_a_while_restarts_at_the_first_pause_again(process, supervise, events):
    supervisor = supervise(process("a"), backoff_s=(0.01, 3600), steady_s=0)
    await supervisor.start()
    for times in range(1, 4):
        os.kill(supervisor.pids()["a"], signal.SIGKILL)
        await events.until(EventKind.READY, "a", times + 1)
    assert {event.detail for event in events if event.kind is EventKind.RESTARTING} == {"in 0.01 s"}


async def test_a_restart_that_fails_is_tried_again(process, supervise, events, tmp_path):
    script = f"if test -e {tmp_path}/broken; then echo no; exit 3; fi; touch {{up}}; exec sleep 1000"
    supervisor = supervise(process("a", script))
    await supervisor.start()
    (tmp_path / "broken").touch()
    os.kill(supervisor.pids()["a"], signal.SIGKILL)
    failed = await events.until(EventKind.DIED, "a", 3)
    assert failed.detail == f"exit code 3 before it was ready: no (log: {tmp_path}/logs/a.log)"
    (tmp_path / "broken").unlink()
    await events.until(EventKind.READY, "a", 2)


async def test_a_program_that_dies_at_start_is_named_with_its_last_words_and_the_rest_is_stopped(
    process, supervise, events, tmp_path
):
    dies = process("dies", "echo one; echo; printf '\\033[31mport 80 is\\033[0m taken\\n' >&2; exit 3", stage=1)
    # Its neighbour is never ready: the failure must not wait for it.
    supervisor = supervise(process("fine"), dies, process("slow", "exec sleep 1000", stage=1))
    with pytest.raises(StartFailed) as failed:
        await supervisor.start()
    assert str(failed.value) == (
        f"dies: exit code 3 before it was ready: one | [31mport 80 is[0m taken (log: {tmp_path}/logs/dies.log)"
    )
    assert supervisor.pids() == {}
    assert events.of("dies") == ["started", "died"]
    assert events.of("fine") == ["started", "ready", "stopped"]
    assert events.of("slow") == ["started", "stopped"]


async def test_last_words_are_those_of_this_start_not_of_an_older_log(process, supervise, tmp_path):
    log = tmp_path / "logs" / "dies.log"
    log.parent.mkdir()
    log.write_text("old news\n")
    with pytest.raises(StartFailed, match="it wrote nothing"):
        await supervise(process("dies", "exit 1")).start()
    assert log.read_text() == "old news\n"


@pytest.mark.parametrize("argv", [("no-such-program",), ("/",), ("./missing", "x")])
async def test_a_program_that_does_not_exist_is_named(supervise, tmp_path, argv):
    supervisor = supervise(Process(name="a", argv=argv, env=ENV, log_path=tmp_path / "log"))
    with pytest.raises(StartFailed, match=f"^a: could not be started: there is no program '{argv[0]}'$"):
        await supervisor.start()


async def test_a_file_that_cannot_be_executed_says_so(supervise, tmp_path):
    (tmp_path / "text").write_bytes(b"\0not a program")
    (tmp_path / "text").chmod(0o755)

    async def never():
        return False

    argv = (str(tmp_path / "text"),)
    supervisor = supervise(Process(name="a", argv=argv, env=ENV, log_path=tmp_path / "log", ready=never))
    with pytest.raises(StartFailed, match=r"^a: exit code 127 before it was ready: cannot run .*: Exec format error"):
        await supervisor.start()


@linux_only
async def test_a_program_that_ignores_the_stop_signal_is_killed_after_its_grace_with_its_children(
    process, supervise, events, tmp_path
):
    script = f"trap '' TERM; sleep 1000 & echo $! > {tmp_path}/child; touch {{up}}; wait"
    supervisor = supervise(process("stubborn", script, stop_grace_s=0.2))
    await supervisor.start()
    both = supervisor.pids()["stubborn"], int((tmp_path / "child").read_text())
    assert all(alive(pid) for pid in both)
    await supervisor.stop()
    stopped = await events.until(EventKind.STOPPED, "stubborn")
    assert stopped.detail == "killed, still running 0.2 s after SIGTERM"
    await until_dead(*both)


async def test_its_own_stop_signal_is_what_a_program_gets(process, supervise, events):
    script = "trap 'exit 7' INT; touch {up}; while :; do sleep 0.01; done"
    supervisor = supervise(process("a", script, stop_signal=signal.SIGINT))
    await supervisor.start()
    await supervisor.stop()
    assert events[-1].detail == "exit code 7"


@linux_only
async def test_children_of_a_program_that_died_are_gone_before_it_starts_again(process, supervise, events, tmp_path):
    script = f"sleep 1000 & echo $! >> {tmp_path}/children; touch {{up}}; wait"
    supervisor = supervise(process("a", script))
    await supervisor.start()
    os.kill(supervisor.pids()["a"], signal.SIGKILL)
    await events.until(EventKind.READY, "a", 2)
    first, second = (tmp_path / "children").read_text().split()
    await until_dead(first)
    assert alive(second)
    await supervisor.stop()
    await until_dead(second)


async def test_stop_during_start_ends_both(process, supervise, events):
    supervisor = supervise(process("never", "exec sleep 1000"), process("next", stage=1))
    starting = asyncio.create_task(supervisor.start())
    await events.until(EventKind.STARTED, "never")
    await supervisor.stop()
    await starting
    await supervisor.run()
    assert events.of("never") == ["started", "stopped"]
    assert events.of("next") == []


async def test_stop_before_the_first_process_exists_starts_nothing(process, supervise, events):
    supervisor = supervise(process("a"))
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0)  # the keeper is made, the process is not
    await supervisor.stop()
    await starting
    assert supervisor.pids() == {}
    assert events.of("a") in ([], ["started", "stopped"])


async def test_stop_while_a_restart_is_pending_does_not_wait_for_it(process, supervise, events):
    supervisor = supervise(process("a"), backoff_s=(3600,))
    await supervisor.start()
    os.kill(supervisor.pids()["a"], signal.SIGKILL)
    await events.until(EventKind.RESTARTING, "a")
    async with asyncio.timeout(60):
        await supervisor.stop()
    assert events.of("a") == ["started", "ready", "died", "restarting"]


async def test_a_stop_whose_caller_is_cancelled_goes_on(process, supervise, events):
    supervisor = supervise(process("a", "trap '' TERM; touch {up}; while :; do sleep 1000; done", stop_grace_s=0.3))
    await supervisor.start()
    impatient = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    impatient.cancel()
    await supervisor.stop()
    assert impatient.cancelled()
    assert events.of("a") == ["started", "ready", "stopped"]


async def test_a_program_slow_to_be_ready_is_told_of_with_what_its_probe_said(process, supervise, events, tmp_path):
    async def ready():
        if not (tmp_path / "go").exists():
            raise ConnectionRefusedError("nobody listens")
        return True

    supervisor = supervise(process("a", "exec sleep 1000", ready=ready, ready_within_s=0.05))
    starting = asyncio.create_task(supervisor.start())
    slow = await events.until(EventKind.SLOW, "a", 2)
    assert slow.detail == "not ready within 0.05 s (ConnectionRefusedError: nobody listens)"
    (tmp_path / "go").touch()
    await starting
    assert events.of("a")[-1] == "ready"


async def test_output_of_every_life_is_appended_to_one_log(process, supervise, events, tmp_path):
    supervisor = supervise(process("a", "echo out; echo err >&2; touch {up}; exec sleep 1000"))
    await supervisor.start()
    os.kill(supervisor.pids()["a"], signal.SIGKILL)
    await events.until(EventKind.READY, "a", 2)
    assert (tmp_path / "logs" / "a.log").read_text() == "out\nerr\nout\nerr\n"


async def test_leftovers_are_removed_before_a_start_and_after_an_end(process, supervise, tmp_path):
    socket = tmp_path / "socket"
    socket.touch()
    script = f"test -e {socket} && exit 1; touch {socket} {{up}}; exec sleep 1000"
    supervisor = supervise(process("a", script, leftovers=(socket,)))
    await supervisor.start()
    assert socket.exists()
    await supervisor.stop()
    assert not socket.exists()


async def test_a_program_has_its_own_session_no_input_and_only_the_given_environment(process, supervise, tmp_path):
    script = f"cat > {tmp_path}/input; env > {tmp_path}/env; touch {{up}}; exec sleep 1000"
    supervisor = supervise(process("a", script))
    await supervisor.start()
    pid = supervisor.pids()["a"]
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert (tmp_path / "input").read_bytes() == b""
    given = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert given - {"PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE"} == {"PATH"}


@linux_only
async def test_a_program_does_not_inherit_that_python_ignores_sigpipe(process, supervise, tmp_path):
    supervisor = supervise(
        process("a", f"grep SigIgn /proc/self/status > {tmp_path}/ignored; touch {{up}}; exec sleep 1000")
    )
    await supervisor.start()
    mask = int((tmp_path / "ignored").read_text().split()[1], 16)
    assert not mask & 1 << (signal.SIGPIPE - 1)


async def test_a_fault_of_the_listener_ends_the_start_and_leaves_nothing(process, supervise):
    def broken(_event):
        raise RuntimeError("no terminal")

    supervisor = supervise(process("a"), on_event=broken)
    with pytest.raises(RuntimeError, match="no terminal"):
        await supervisor.start()
    assert supervisor.pids() == {}
    with pytest.raises(RuntimeError, match="no terminal"):
        await supervisor.run()


def test_two_processes_of_one_name_are_refused(process):
    with pytest.raises(ValueError, match="two processes named a: give each its own name"):
        Supervisor([process("a"), process("a")], print)


@linux_only
@pytest.mark.parametrize("ending", ["killed", "killed after its guard", "forgets"])
async def test_nothing_outlives_the_supervising_process_however_it_ends(tmp_path, ending):
    argv = [sys.executable, "-c", SUPERVISING, str(tmp_path), "forgets" if ending == "forgets" else "waits"]
    supervising = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program, its_child, guard = map(int, (await supervising.stdout.readline()).split())
    try:
        if ending == "killed after its guard":
            os.kill(guard, signal.SIGKILL)
        if ending != "forgets":
            assert alive(program)
            assert alive(its_child)
            supervising.kill()
        _, errors = await supervising.communicate()
        await until_dead(program, guard)
        if ending == "killed after its guard":  # then the kernel's promise is left, which is for the program alone
            os.kill(its_child, signal.SIGKILL)
        await until_dead(its_child)
        assert (b"forgot to stop" in errors) == (ending == "forgets")
    finally:
        for pid in (program, its_child, guard):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

"""`perch serve --workers 2`: the same ruleset everywhere, whoever dies."""

import json
import os
import random
import signal
from pathlib import Path

import pytest


def workers_of(perch) -> list[int]:
    """The pids of the workers, in no order; the flag compiler is the other child."""
    return [pid for pid in perch.children() if b"serve-worker" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """What the process was started as; empty when it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.fixture(scope="module")
def running(service, tmp_path_factory):
    """One perch with two workers for the tests that leave it running."""
    perch = service.Perch(service.Folder(tmp_path_factory.mktemp("perch")), workers=2)
    perch.folder.put(service.flags_yaml(100))
    yield perch.start()
    perch.end()


def good(perch, service):
    """Everybody on canary, on both workers, and no exposures' opinion."""
    perch.folder.put_exposures(json.dumps({"seq": 0, "flags": {}}))
    digest = perch.folder.put(service.flags_yaml(100, more=f"description: '{random.random()}'"))
    for worker in (0, 1):
        perch.wait_for_file(digest, worker=worker)
        service.wait_until(lambda w=worker: perch.ask(worker=w).what == ("canary", "SPLIT"), "the gate is open")
    return perch


@pytest.fixture
def perch(running, service):
    return good(running, service)


@pytest.fixture
def own_perch(folder, launch, service):
    """One that a test may end."""
    folder.put(service.flags_yaml(100))
    return good(launch(workers=2), service)


def test_every_worker_serves_every_version(perch, service):
    folder = perch.folder
    for canary in (0, 100, 50):
        digest = folder.put(service.flags_yaml(canary))
        replies = [perch.wait_for_file(digest, worker=worker) for worker in (0, 1)]
        assert replies[0] == replies[1]
    folder.put_exposures(json.dumps({"seq": 9, "flags": {"digits": {"salt": "digits", "cap": 0}}}))
    for worker in (0, 1):
        service.wait_until(lambda w=worker: perch.ask(worker=w).what == ("stable", "HELD"), "both workers hold")
        assert perch.version(worker).endswith(".9")
    record = folder.state / "rulesets" / f"{perch.version()}.json"
    service.wait_until(record.exists, "the parent keeps what is served")


def test_two_workers_give_every_user_the_same_arm(perch, service):
    folder = perch.folder
    digest = folder.put(service.flags_yaml(50))
    for worker in (0, 1):
        perch.wait_for_file(digest, worker=worker)
    replies = [[perch.ask(f"user-{i}", worker=worker) for i in range(100)] for worker in (0, 1)]
    assert replies[0] == replies[1]
    assert {reply.cohort for reply in replies[0]} == {"canary", "stable"}


def test_a_bad_file_changes_no_worker(perch, service):
    rejected = len(perch.events("flags_rejected"))
    perch.folder.put("version: 1\nflags: [")
    perch.wait_for_event("flags_rejected", rejected + 1)
    for worker in (0, 1):
        assert perch.ask(worker=worker).what == ("canary", "SPLIT")
        assert perch.client(worker).health() == 1


def test_a_killed_worker_is_replaced_and_given_what_is_served_now(perch, service):
    folder = perch.folder
    digest = folder.put(service.flags_yaml(100, more="description: now"))
    for worker in (0, 1):
        perch.wait_for_file(digest, worker=worker)
    before, told = set(workers_of(perch)), len(perch.events("worker_restarting"))
    assert len(before) == 2
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    service.wait_until(lambda: len(set(workers_of(perch)) - before) == 2, "two new workers")
    perch.connect_anew()
    for worker in (0, 1):
        assert perch.wait_for_file(digest, worker=worker).what == ("canary", "SPLIT")
        assert perch.client(worker).health() == 1
    assert len(perch.events("worker_restarting")) == told + 2


def test_a_worker_killed_while_the_flag_file_is_broken_gets_the_last_good_ruleset(perch, service):
    folder = perch.folder
    rejected, told = len(perch.events("flags_rejected")), len(perch.events("worker_restarting"))
    folder.put("version: 1\nflags: [")
    perch.wait_for_event("flags_rejected", rejected + 1)
    (pid, _) = workers_of(perch)
    os.kill(pid, signal.SIGKILL)
    perch.wait_for_event("worker_restarting", told + 1)
    perch.connect_anew()
    for worker in (0, 1):
        service.wait_until(lambda w=worker: perch.ask(worker=w).what == ("canary", "SPLIT"), "the last good ruleset")


def test_a_stopped_worker_keeps_no_rollback_from_the_others(perch, service):
    folder = perch.folder
    stopped = workers_of(perch)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        folder.put_exposures(json.dumps({"seq": 2, "flags": {"digits": {"salt": "digits", "cap": 0}}}))
        record = folder.state / "rulesets"
        service.wait_until(lambda: list(record.glob("*.2.json")), "the parent has published the rollback")
    finally:
        os.kill(stopped, signal.SIGCONT)
    for worker in (0, 1):
        service.wait_until(lambda w=worker: perch.ask(worker=w).what == ("stable", "HELD"), "both workers hold")


def test_sigterm_ends_all_of_it_with_zero(own_perch, folder, service):
    perch = own_perch
    children = perch.children()
    assert len(children) == 3
    assert perch.stop() == 0
    service.wait_until(lambda: not any(map(service.is_alive, children)), "all children are gone")
    assert not list(folder.root.glob("p.sock*"))
    assert "Traceback" not in perch.log()


def test_a_killed_parent_leaves_no_worker_and_no_compiler(own_perch, folder, service):
    perch = own_perch
    children = perch.children()
    assert len(children) == 3
    perch.process.kill()
    perch.process.wait()
    service.wait_until(lambda: not any(map(service.is_alive, children)), "all children are gone")
    assert "Traceback" not in perch.log()


def test_without_any_good_file_the_workers_answer_stable_and_are_not_ready(folder, launch, service):
    perch = launch(workers=2)
    perch.wait_for_event("flags_rejected")
    for worker in (0, 1):
        assert perch.ask(worker=worker).what == ("stable", "DEFAULT")
        assert perch.client(worker).health() == 2
    digest = folder.put(service.flags_yaml(100))
    for worker in (0, 1):
        assert perch.wait_for_file(digest, worker=worker).what == ("canary", "SPLIT")
        assert perch.client(worker).health() == 1

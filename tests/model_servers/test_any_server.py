"""docs/any-model-server.md on the real thing: servers of the standard library, unchanged, behind `perch up`."""

import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_ports

PLAIN_SERVER = Path(__file__).parent / "plain_server.py"
PERCH = Path(sys.executable).parent / "perch"
WAIT_S = 60


@contextlib.contextmanager
def _plain_server(answer, *options):
    """A plain server process; gives its address."""
    command = [sys.executable, str(PLAIN_SERVER), "0", answer, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.fixture
def listener(tmp_path):
    """The port of an Envoy with two plain servers behind it: the canary sends perch's headers, stable does not."""
    if not PERCH.exists() or shutil.which("envoy", path=str(PERCH.parent)) is None:
        pytest.skip("perch or its Envoy binary is not installed beside this Python")
    with contextlib.ExitStack() as stack:
        stable = stack.enter_context(_plain_server("old"))
        canary = stack.enter_context(_plain_server("new", "--headers"))
        models = {"own": {"prefix": "/predict/", "stable": [stable], "canary": [canary], "warm": "/ready"}}
        flags = {"version": 1, "flags": {"own": {"unit": ["x-user-id"], "salt": "own-1", "canary": 50}}}
        (tmp_path / "models.yaml").write_text(json.dumps(models))
        (tmp_path / "flags.yaml").write_text(json.dumps(flags))
        port, control, admin = free_ports(3)
        command = [str(PERCH), "up", "--port", str(port), "--control-port", str(control), "--admin", str(admin)]
        files = ["--models", "models.yaml", "--flags", "flags.yaml", "--state", "state"]
        with (tmp_path / "up.log").open("wb") as log:
            process = stack.enter_context(subprocess.Popen([*command, *files], cwd=tmp_path, stdout=log, stderr=log))
        try:
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _ask(port, user):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict/x", b"{}", {"x-user-id": user})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}").get("answer"), dict(response.getheaders())
    except (OSError, ValueError, http.client.HTTPException):
        return 0, None, {}
    finally:
        connection.close()


ARMS = {("old", "stable"), ("new", "canary")}


def _arms(asked):
    """Who got which answer of which cohort."""
    arms = {}
    for user, (_, answer, headers) in asked.items():
        arms.setdefault((answer, headers.get("x-model-cohort")), []).append(user)
    return arms


def test_two_plain_servers_split_the_users_and_keep_what_headers_they_send(listener):
    users = [f"user-{number}" for number in range(40)]
    # Until the canary is warm and gets its users, and nothing has stood still for two rounds, which others make up for.
    end_s, first, again = time.monotonic() + WAIT_S, {}, {}
    while time.monotonic() < end_s and (_arms(first) != _arms(again) or _arms(again).keys() != ARMS):
        time.sleep(0.25)
        first, again = ({user: _ask(listener, user) for user in users} for _ in range(2))
    assert all(status == 200 for status, _, _ in again.values())
    assert [answer for _, answer, _ in first.values()] == [answer for _, answer, _ in again.values()]
    assert {answer for _, answer, _ in again.values()} == {"old", "new"}
    for _, answer, headers in again.values():
        assert headers["x-model-cohort"] == {"old": "stable", "new": "canary"}[answer]
        assert headers.get("x-model-version") == {"old": None, "new": "new"}[answer]

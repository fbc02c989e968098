"""The system in containers through its published ports: who gets which version, whatever goes."""

import json
import shutil
import time
from pathlib import Path

import pytest

from extproc.core.bucketing import bucket_of, hash_prefix, hash_unit

SALT = "digits-2026-11"
USERS = [f"user-{n}" for n in range(300)]


@pytest.fixture(autouse=True)
def settled(stack):
    """Every test begins with everything healthy and 20 % of the users on canary."""
    stack.until_settled()
    if stack.effective() != 20:
        stack.set_canary(20)
    return stack


def wanted(user: str, percent: float) -> str:
    """The arm that the documented hash gives."""
    return "canary" if bucket_of(hash_unit(hash_prefix(SALT), user.encode())) < percent * 1000 else "stable"


def test_every_user_gets_the_arm_that_the_hash_gives_and_keeps_it(stack):
    expected = {user: wanted(user, 20) for user in USERS}
    stack.assert_served(expected)
    stack.assert_served(dict(reversed(expected.items())))
    assert 0.1 < list(expected.values()).count("canary") / len(USERS) < 0.3


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "by a rename"])
def test_an_edit_of_the_flag_file_on_the_host_moves_users(stack, in_place):
    stack.set_canary(60, in_place=in_place)
    # Both ext_procs follow the file on their own, a moment after control may have.
    moved = {user: wanted(user, 60) for user in USERS}
    until_so(stack, moved)
    stack.assert_served(moved)
    stack.set_canary(20, in_place=in_place)
    until_so(stack, {user: wanted(user, 20) for user in USERS})


def until_so(stack, arms):
    deadline_s = time.monotonic() + 30
    while (found := stack.arms(USERS)) != arms:
        assert time.monotonic() < deadline_s, {user for user in USERS if found[user] != arms[user]}


CONTAINERS = [
    "control-1",
    "extproc-1-1",
    "extproc-2-1",
    "model-canary-1",
    "model-canary-2",
    "model-stable-1",
    "model-stable-2",
]


@pytest.mark.parametrize("container", [*CONTAINERS, "envoy-1"])
def test_a_container_has_no_rights_and_nothing_to_write_to_but_its_volumes(stack, container):
    assert stack.exec(container, "id", "-u").stdout.strip() == "10001"
    status = stack.exec(container, "cat", "/proc/1/status").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    for place in ("/etc", "/opt/perch", "/usr/local", "/home"):
        assert "Read-only" in stack.exec(container, "touch", f"{place}/mark").stderr
    if container == "envoy-1":
        assert "Read-only" in stack.exec(container, "touch", "/var/lib/envoy/mark").stderr
    for program in ("gcc", "pip", "pip3", "make"):
        assert stack.exec(container, "sh", "-c", f"command -v {program}").returncode != 0


def test_envoys_admin_is_a_private_socket_and_control_hands_on_its_stats(stack):
    mode = stack.exec("envoy-1", "stat", "-c", "%F %U", "/run/perch/envoy-admin.sock").stdout
    assert mode.startswith("socket")
    assert "envoy_server_live" in stack.get("/envoy/stats?format=prometheus&filter=server.live")[1]
    assert stack.get("/envoy/quitquitquit", method="POST")[0] in (401, 404)


def test_whoever_writes_to_the_control_api_shows_the_token(stack, stack_module):
    report = json.dumps({"unit": "user-1", "flag": "digits", "name": "accuracy", "value": 1}).encode()
    kind = {"content-type": "application/json"}
    wrong = {**kind, "authorization": "Bearer not the token of this API"}
    right = {**kind, "authorization": f"Bearer {stack_module.TOKEN}"}
    assert stack.get("/v1/outcomes", method="POST", data=report, headers=kind)[0] == 401
    assert stack.get("/v1/outcomes", method="POST", data=report, headers=wrong)[0] == 401
    code, body = stack.get("/v1/outcomes", method="POST", data=report, headers=right)
    assert code == 200, body
    assert stack.get("/v1/status")[0] == 200


def test_what_the_operators_page_tells_to_run_in_control_works(stack):
    shown = stack.exec("control-1", "perch", "status")
    assert shown.stdout.startswith("ready"), shown.stdout + shown.stderr
    rendered = stack.exec("control-1", "perch", "envoy", "render", "--out", "/tmp/envoy-files")
    assert "/tmp/envoy-files/lds.yaml" in rendered.stdout, rendered.stdout + rendered.stderr
    validated = stack.exec("control-1", "perch", "envoy", "validate")
    assert validated.returncode == 0, validated.stderr


def test_the_kill_switch_of_envoy_needs_nothing_of_perch_and_outlasts_controls_restart(stack, stack_module):
    rtds = "/var/lib/envoy/rtds.yaml"
    assert f"sed -i 's/canary_pct: 100/canary_pct: 0/' {rtds}" in (stack_module.ROOT / "compose/README.md").read_text()
    stack.exec("control-1", "sed", "-i", "s/canary_pct: 100/canary_pct: 0/", rtds)
    nobody = dict.fromkeys(USERS, "stable")
    until_so(stack, nobody)
    stack.until_again("control-1", stack.kill("control-1"))
    stack.until_settled()
    assert stack.arms(USERS) == nobody
    stack.exec("control-1", "sed", "-i", "s/canary_pct: 0/canary_pct: 100/", rtds)
    until_so(stack, {user: wanted(user, 20) for user in USERS})


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_killed_container_costs_no_client_an_error_and_no_user_the_arm(stack, stack_module, container):
    for _ in range(stack_module.TRIES):  # the machine may be so busy that perch is late for Envoy: then once more
        before = stack.lateness()
        with stack_module.Clients(stack, USERS[:20]) as clients:
            with clients.between():
                killed = stack.kill(container)
            stack.until_again(container, killed)
            stack.until_settled()
            clients.until_more()
        assert clients.failed() == []
        moved = [(one.user, one.arm) for one in clients.answers if one.arm != wanted(one.user, 20)]
        stack.assert_excused(moved, before)
        if not moved:
            return
    pytest.fail(f"perch was late {stack_module.TRIES} times")


def test_envoy_is_back_by_itself_after_a_crash(stack, stack_module):
    before = stack.kill("envoy-1")
    stack.until_again("envoy-1", before)
    stack.until_settled()
    until_so(stack, {user: wanted(user, 20) for user in USERS})


def test_the_canary_is_rolled_to_a_new_version_without_an_error(stack, stack_module):
    third = with_version(stack.folder / "canary-3", "3-mlp")
    stable = {name: known["Id"] for name, known in stack.containers().items() if "canary" not in name}
    user = next(user for user in USERS if wanted(user, 20) == "canary")
    assert stack.infer_in_time(user).version == "2-mlp"
    with stack_module.Clients(stack, USERS[:20]) as clients:
        stack.settings["PERCH_CANARY_DIR"] = str(third)
        stack.up("model-canary")
        stack.until_settled()
        assert stack.infer_in_time(user).version == "3-mlp"
        clients.until_more()
    assert clients.failed() == []
    others = {name: known["Id"] for name, known in stack.containers().items() if "canary" not in name}
    assert others == stable
    stack.assert_served({user: wanted(user, 20) for user in USERS})


def with_version(folder: Path, version: str) -> Path:
    """The canary's artifacts under another version."""
    shutil.copytree(Path(__file__).parents[2] / "model_servers" / "artifacts" / "digits" / "2", folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": "2-mlp"', f'"version": "{version}"'))
    assert json.loads(manifest.read_text())["version"] == version
    return folder


def test_after_sigterm_everything_ends_cleanly_and_a_restart_serves_what_was_served(stack, stack_module):
    stack.set_canary(40)
    before = stack.status()["flags"]["digits"]["version"]
    stack.compose("stop")
    # 137 would be the SIGKILL that follows ten seconds later.
    assert {name: known["State"]["ExitCode"] for name, known in stack.containers().items()} == dict.fromkeys(
        stack.containers(), 0
    )
    good = stack.flags.read_text()
    stack.flags.write_text("version: 1\nflags: {digits: {canary: 4000}}\n")
    stack.up()
    stack.until_settled()
    status = stack.status()
    assert status["flag_file"]["problems"] != []
    assert stack.effective() == 40
    file, _, seq = status["flags"]["digits"]["version"].partition(".")
    assert file == before.partition(".")[0]
    assert int(seq) > int(before.partition(".")[2])
    until_so(stack, {user: wanted(user, 40) for user in USERS})
    stack.flags.write_text(good)
    stack_module.until(lambda: not stack.status()["flag_file"]["problems"], "the good file again")


def test_the_canary_gets_nobody_before_it_is_warm(stack, stack_module):
    stack.compose("stop")
    with stack.health_checks():
        stack.compose("up", "--no-build", "--detach", "envoy")  # and what it depends on; the canary is not among it
        stack_module.until(lambda: stack.status().get("flags", {}).get("digits", {}).get("held"), "the flag held")
        stack_module.until(lambda: stack.infer(USERS[0]).status == 200, "the first answer")
        assert set(stack.arms(USERS).values()) == {"stable"}
        assert stack.get("/readyz")[0] == 503
    stack.up()
    stack.until_settled()
    until_so(stack, {user: wanted(user, 20) for user in USERS})


def test_the_overlay_brings_prometheus_the_numbers_of_all(stack, stack_module):
    stack.overlay = ("compose.observability.yaml",)
    stack.up()
    stack.until_settled()
    stack.arms(USERS)
    for query in (
        'sum(perch_request_count_total{flag="digits"}) >= 300',
        'envoy_cluster_membership_healthy{envoy_cluster_name="digits_canary"} == 2',
        'statsd_lines_total{metric="perch.decision.count"} > 0',
        'statsd_lines_total{metric="perch.model.requests"} > 0',
        "sum(up) == 3",
    ):
        stack_module.until(lambda query=query: stack.prometheus(query), query)


def test_the_installed_package_has_the_artifacts_that_its_models_file_names(stack):
    program = (
        "from extproc.envoyfile import template_folder; from extproc.modelsfile import load_models; "
        "print([d.joinpath('manifest.json').is_file() "
        "for m in load_models(template_folder() / 'models.yaml') for d in m.artifacts.values()])"
    )
    found = stack.exec("control-1", "python", "-I", "-c", program)
    assert found.stdout.strip() == "[True, True]", found.stderr

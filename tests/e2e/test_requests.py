"""Requests through the whole system: the case files, and 2,000 users before, while and after everything restarts."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import mmh3
import pytest
import yaml

from extproc.core.decision import Request, decide
from extproc.explain import load
from extproc.flagfile import Paths

TOKEN = "e2e-token-0123456789"
TRIES = 5
USERS = [f"user-{i}" for i in range(2_000)]
MODEL_SERVERS = ["digits-stable-0", "digits-canary-0", "digits-stable-1", "digits-canary-1"]


def read_cases() -> list[dict[str, Any]]:
    """Every case of every file, with its defaults filled in.

    `method`, `path`, `headers`, `http` (2 for HTTP/2) make the request. `status`, `served` (the arm by the response
    header and by the stand-in's own word; null where no model server answered), `body` are the answer's. `reason` is
    why perch decided so; null where perch must not have been asked. `upstream` are headers as the model server got
    them. With `fresh_request_id` the id must be Envoy's own, the same upstream and back.
    """
    cases = []
    for path in sorted((Path(__file__).parent / "cases").glob("*.yaml")):
        default = {"file": path.stem, "method": "POST", "path": "/v2/models/echo/infer", "headers": [], "http": 1}
        default |= {"status": 200, "served": "stable" if path.stem == "spoofs" else None, "reason": None, "body": None}
        default |= {"upstream": {}, "fresh_request_id": False}
        cases += [
            default | {"upstream": {}, "fresh_request_id": False} | case for case in yaml.safe_load(path.read_text())
        ]
    return cases


CASES = read_cases()


def the_flags(tools: Any, percent: float = 5, echo: str = "echo") -> str:
    """What is served. Tests change the digits' share, or the key of the stand-in's flag."""
    flags = {
        "digits": percent,
        "letters": {"salt": "letters-1", "canary": 40},
        "plain": {"salt": "plain-1", "canary": 10},
        echo: {"model": "echo", "salt": "echo-1", "canary": 50, "allow_force": True},
    }
    return tools.flag_file(**flags)


@pytest.fixture(scope="module")
def statsd():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def system(tools, statsd):
    """Two models with real servers, and two with stand-ins that tell what they were asked."""
    environment = {"PERCH_FORCE_TOKEN": TOKEN, "PERCH_STATSD": f"127.0.0.1:{statsd.getsockname()[1]}"}
    one_each = {arm: [f"unix:letters-{arm}-0.sock"] for arm in ("stable", "canary")}
    with tools.folder() as place, contextlib.ExitStack() as stack:
        models = {**tools.digits(), **tools.digits("letters", **one_each)}
        for name in ("echo", "plain"):
            models |= tools.stood_in(place, name)
            for arm in ("stable", "canary"):
                stack.enter_context(tools.standing_in(place / f"{name}-{arm}.sock", arm))
        yield stack.enter_context(tools.running(models, the_flags(tools), environment=environment))


@pytest.fixture
async def client(tools, system):
    async with tools.client_of(system) as client:
        yield client


# --- one request at a time --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """A response, header names in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key == name]

    @property
    def told(self) -> list[tuple[str, str]]:
        """The request's headers as the stand-in got them, names in lower case."""
        return [(name.lower(), value) for name, value in json.loads(self.body)["headers"]]


def send(port: int, case: dict[str, Any]) -> Got:
    """The case's request, written byte by byte: no client library may mend what it says."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        return send_http2(connection, case) if case["http"] == 2 else send_http1(connection, case)


def send_http1(connection: socket.socket, case: dict[str, Any]) -> Got:
    """One request on a connection of its own."""
    headers = [["host", "e2e"], ["connection", "close"], ["content-length", "2"], *case["headers"]]
    head = [f"{case['method']} {case['path']} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    connection.sendall("\r\n".join([*head, "", "{}"]).encode("latin-1"))
    with http.client.HTTPResponse(connection, method=case["method"]) as answer:
        answer.begin()
        return Got(answer.status, [(name.lower(), value) for name, value in answer.getheaders()], answer.read())


def send_http2(connection: socket.socket, case: dict[str, Any]) -> Got:
    """The same over HTTP/2 without TLS, known to be spoken."""
    h2c = h2.connection.H2Connection()
    h2c.initiate_connection()
    pseudo = [(":method", case["method"]), (":path", case["path"]), (":authority", "e2e"), (":scheme", "http")]
    h2c.send_headers(1, [*pseudo, *map(tuple, case["headers"])])
    h2c.send_data(1, b"{}", end_stream=True)
    connection.sendall(h2c.data_to_send())
    headers, body = [], b""
    while True:
        for event in h2c.receive_data(connection.recv(65536)):
            match event:
                case h2.events.ResponseReceived():
                    headers = [(name.decode(), value.decode()) for name, value in event.headers]
                case h2.events.DataReceived():
                    body += event.data
                case h2.events.StreamEnded():
                    return Got(int(dict(headers)[":status"]), headers, body)


def asked(system: Any) -> int:
    """How often Envoy asked perch."""
    return system.counter("http.edge.ext_proc.perch.streams_started")


def judge(case: dict[str, Any], got: Got, assigned: str | None) -> None:
    """The answer against the case; `assigned` is the routing header that the model server must have got."""
    assert got.status == case["status"]
    assert got.all("x-model-cohort") == ([case["served"]] if case["served"] else [])
    if case["body"] is not None:
        assert json.loads(got.body) == case["body"]
    if case["served"] is None or not case["path"].startswith(("/v2/models/echo", "/v2/models/plain")):
        return
    assert json.loads(got.body)["arm"] == case["served"]
    assert [value for name, value in got.told if name == "x-model-cohort"] == ([assigned] if assigned else [])
    assert not [name for name, _ in got.told if name.startswith(("x-perch", "x-force-cohort")) or "_" in name]
    assert TOKEN not in got.body.decode()
    for name, value in case["upstream"].items():
        assert [found for key, found in got.told if key == name] == [value]
    if case["fresh_request_id"]:
        (fresh,) = got.all("x-request-id")
        assert re.fullmatch(r"[0-9a-f-]{36}", fresh)
        assert [value for name, value in got.told if name == "x-request-id"] == [fresh]


def in_time(system: Any, ask: Callable[[], Any]) -> Any:
    """What came of a request about which perch was heard, and whose canary Envoy found well.

    Where the machine is so busy that perch is late for Envoy, or a canary for its health check, Envoy sends the request
    to stable and counts that: then it is asked again.
    """
    for _ in range(TRIES):
        before = failed_open(system), *ailing(system)
        found = ask()
        if (failed_open(system), *ailing(system)) == before and not before[2]:
            return found
        system.disturbed = True
        system.until_settled()
    return pytest.fail(f"perch or a canary was late {TRIES} times")


@pytest.mark.parametrize("case", CASES, ids=[f"{case['file']}: {case['name']}" for case in CASES])
def test_a_request_gets(case, tools, system):
    def ask() -> tuple[Got, int]:
        before = asked(system)
        return send(system.port, case), asked(system) - before

    got, times = in_time(system, ask)
    judge(case, got, case["served"] if case["reason"] else None)
    assert times == (1 if case["reason"] else 0)


def test_the_line_that_up_prints_works_in_a_shell(system):
    system.until_settled()
    (line,) = re.findall(r"^curl .*$", system.output, re.MULTILINE)
    command = ["bash", "-c", line]
    shell = in_time(system, lambda: subprocess.run(command, check=True, capture_output=True, text=True, timeout=30))
    assert "HTTP/1.1 200 OK" in shell.stdout
    assert "x-model-cohort: canary" in shell.stdout
    assert '"model_version":"2-mlp"' in shell.stdout


def test_with_perch_down_no_spoof_reaches_the_canary_and_no_token_the_model_server(tools, system):
    system.until_settled()
    with system.unsupervised():
        system.signal(signal.SIGKILL, "serve")
        for case in CASES:
            if case["reason"]:
                judge(case | {"served": "stable"}, send(system.port, case), assigned=None)
    system.until_settled()


def test_every_decision_is_counted_with_its_reason_and_renaming_a_flag_moves_nobody(tools, system, statsd):
    system.until_settled()
    wanted: Counter[tuple[str, str]] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    receive(statsd, counted)  # all that was sent so far: it would leave no room in the socket for what is counted
    system.serve_flags(the_flags(tools, echo="counted"))
    before = asked(system)
    for case in CASES:
        if case["reason"] and "/plain/" not in case["path"]:
            judge(case, in_time(system, lambda case=case: send(system.port, case)), case["served"])
            wanted[case["reason"], case["served"]] += 1
            receive(statsd, counted)
    tools.until(lambda: receive(statsd, counted) >= wanted, f"{wanted} in StatsD")
    assert counted.total() <= asked(system) - before  # no more than cases, but for what was asked again
    system.serve_flags(the_flags(tools))
    assert {reason for reason, _ in counted} == {"SPLIT", "NO_UNIT", "AMBIGUOUS_UNIT", "FORCED"}


def receive(statsd: socket.socket, counted: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Adds what has arrived of the renamed flag's decisions."""
    with contextlib.suppress(BlockingIOError):
        while True:
            for line in statsd.recv(65536).decode().splitlines():
                name, _, rest = line.partition(":")
                number, _, tags = rest.partition("|c|#")
                tag = dict(one.split(":", 1) for one in tags.split(",") if ":" in one)
                if name == "perch.decision.count" and tag.get("flag") == "counted":
                    counted[tag["reason"], tag["cohort"]] += int(number)
    return counted


# --- many users -------------------------------------------------------------------------------------------------------


def expected(system: Any, model: str = "digits") -> dict[str, str]:
    """What every user must get: by perch's core, over the very files that are served."""
    models = yaml.safe_load((system.folder / "models.yaml").read_text())
    loaded = load(Paths(system.flags, system.state), {name: one["prefix"] for name, one in models.items()}, None)
    path = models[model]["prefix"].encode() + b"infer"
    requests = {user: Request({b":path": path, b"x-user-id": user.encode()}) for user in USERS}
    return {user: f"200 {decide(loaded.ruleset, request).choice.cohort}" for user, request in requests.items()}


def by_formula(salt: str, percent: float) -> dict[str, str]:
    """The same by the design's formula, with nothing of perch's."""
    below = round(percent * 1000)
    buckets = {user: mmh3.hash(f"{salt}:{user}", 0, signed=False) * 100_000 >> 32 for user in USERS}
    return {user: "200 canary" if bucket < below else "200 stable" for user, bucket in buckets.items()}


async def all_get(client: Any, system: Any, wanted: dict[str, str], model: str = "digits") -> None:
    """Asks for every user once; each must get what is wanted.

    Where the machine is so busy that perch is late for Envoy, Envoy sends canary's users to stable and counts
    it: no more of them than it counted may be on stable, and they are asked again. So are those of a canary that was
    late for its health check.
    """
    for _ in range(TRIES):
        before, (failures, ill) = failed_open(system), ailing(system)
        answers = await client.all(wanted, model=model)
        wrong = {user: wanted[user] for user in wanted if answers[user] != wanted[user]}
        assert set(wrong.values()) <= {"200 canary"}, {user: answers[user] for user in wrong}
        assert {answers[user] for user in wrong} <= {"200 stable"}
        if not ill and ailing(system) == (failures, 0):
            assert len(wrong) <= failed_open(system) - before, f"on stable for no reason: {sorted(wrong)}"
        if not wrong:
            return
        wanted, system.disturbed = wrong, True
        await asyncio.to_thread(system.until_settled)
    pytest.fail(f"perch or canary is late again and again: {sorted(wanted)}")


def failed_open(system: Any) -> int:
    """How often Envoy let a request pass without an answer from perch."""
    return system.counter("http.edge.ext_proc.perch.failure_mode_allowed")


def ailing(system: Any) -> tuple[int, int]:
    """How many health checks canaries have failed so far, and how many of them Envoy finds ill now."""
    counted = system.counters(r"^cluster\..*_canary\.(health_check\.failure|membership_(total|healthy))$")
    sums: Counter[str] = Counter()
    for name, n in counted.items():
        sums[name.rpartition(".")[2]] += n
    assert sums["membership_total"], counted
    return sums["failure"], sums["membership_total"] - sums["membership_healthy"]


async def test_two_models_are_split_independently_of_each_other(tools, system, client):
    await asyncio.to_thread(system.until_settled)
    letters = by_formula("letters-1", 40)
    assert letters == expected(system, "letters")
    await all_get(client, system, {user: letters[user] for user in USERS[:400]}, "letters")
    both = Counter((letters[user], arm) for user, arm in by_formula(tools.salt, 40).items())
    for letter, digit in both:
        share = (0.4 if "canary" in letter else 0.6) * (0.4 if "canary" in digit else 0.6)
        assert abs(both[letter, digit] - 2000 * share) < 88  # 4 sigma


async def test_a_reload_moves_exactly_the_predicted_users(tools, system, client):
    await asyncio.to_thread(system.until_settled)
    for percent in (12.345, 5):
        await asyncio.to_thread(system.serve_flags, the_flags(tools, percent))
        wanted = by_formula(tools.salt, percent)
        assert wanted == expected(system)
        await all_get(client, system, wanted)


async def test_fifty_quick_edits_fail_no_request_and_no_user_moves_too_early_or_back(tools, system, client):
    await asyncio.to_thread(system.until_settled)
    await asyncio.to_thread(system.serve_flags, the_flags(tools, 0))
    some = USERS[:40]
    seen: dict[str, list[Any]] = {user: [] for user in some}
    late = failed_open(system)
    stop = asyncio.Event()
    asking = [asyncio.create_task(keep_asking(client, user, seen[user], stop)) for user in some]
    written_s = {}
    for percent in range(2, 102, 2):
        written_s[percent] = asyncio.get_running_loop().time()
        system.edit_flags(last := the_flags(tools, percent))
        await asyncio.sleep(0.02)
    await asyncio.to_thread(system.serve_flags, last)
    stopped_s = asyncio.get_running_loop().time()
    stop.set()
    await asyncio.gather(*asking)
    late = failed_open(system) - late
    await asyncio.to_thread(system.serve_flags, the_flags(tools))
    for user in some:
        assert {str(answer) for answer in seen[user]} <= {"200 stable", "200 canary"}
        first = next(i for i, answer in enumerate(seen[user]) if str(answer) == "200 canary")
        reached = min(percent for percent in written_s if by_formula(tools.salt, percent)[user] == "200 canary")
        assert seen[user][first].ended_s > written_s[reached]
        back = [answer for i, answer in enumerate(seen[user]) if i > first or answer.began_s > stopped_s]
        late -= sum(str(answer) == "200 stable" for answer in back)
    assert late >= 0, "users went back to stable, and not because perch was late for Envoy"


async def keep_asking(client: Any, user: str, seen: list[Any], stop: asyncio.Event) -> None:
    """One user, one request after the other; the last ones are sent after `stop`, until one is answered by canary."""
    while not stop.is_set():
        seen.append(await client.infer(user))
    async with asyncio.timeout(60):
        seen.append(await client.infer(user))
        while str(seen[-1]) != "200 canary":
            seen.append(await client.infer(user))


async def test_five_percent_stay_on_canary_whatever_restarts_and_nobody_is_without_perch(tools, system, client):
    await asyncio.to_thread(system.until_settled)
    wanted = by_formula(tools.salt, 5)
    assert wanted == expected(system)
    assert 61 < list(wanted.values()).count("200 canary") < 139  # within 4 sigma of 100
    for _ in range(3):
        await all_get(client, system, wanted)
    for roles in (["control"], ["envoy"], MODEL_SERVERS[:2], MODEL_SERVERS[2:]):
        await asyncio.to_thread(restart, system, *roles)
    with system.unsupervised():
        system.signal(signal.SIGKILL, "serve")
        before = failed_open(system)
        assert set((await client.all(USERS)).values()) == {"200 stable"}
        assert failed_open(system) == before + len(USERS)
        told = await asyncio.to_thread(tools.until, lambda: system.status()["envoy"], "control to hear of Envoy")
        assert told["failure_mode_allowed"] == before + len(USERS)
    await asyncio.to_thread(system.until_settled)
    for _ in range(3):
        await all_get(client, system, wanted)


def restart(system: Any, *names: str) -> None:
    """Kills and waits until others of the same names serve."""
    before = system.roles()
    system.signal(signal.SIGKILL, *names)
    for name in names:
        while system.roles().get(name, before[name]) == before[name]:
            assert system.runs
    system.until_settled()

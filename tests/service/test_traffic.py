"""`perch traffic` against a listener that keeps its own record, and a control API with a real store."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from rich.console import Console

from extproc.core.heavyhitters import HEAVY_SHARE, HeavyHitters
from extproc.core.kpis import Kpis, Served
from extproc.outcomesapi import outcome_routes
from extproc.traffic import labels as labels_module
from extproc.traffic import running, sending
from extproc.traffic.arrivals import Crowd, arrivals
from extproc.traffic.command import USERS, ZIPF
from extproc.traffic.digits import FILE, load_digits
from extproc.traffic.showing import line_of, print_summary
from extproc.traffic.tally import Tally

ROOT = Path(__file__).parents[2]
TRUTH = {digit.body: digit.label for digit in load_digits()}


class Listener:
    """Envoy and the models, played: stable is right, canary says 9, and every request is kept."""

    def __init__(self):
        self.requests, self.kpis, self.control_statuses = [], Kpis(), []
        self.posts = []

    async def infer(self, request):
        """An answer as the models and Envoy give it; a test may put another one in its place."""
        body, user = await request.read(), request.headers["x-user-id"]
        cohort = "canary" if user.endswith(("3", "4")) else "stable"
        request_id = f"id-{len(self.requests)}"
        self.requests.append((user, body, cohort, request_id))
        served = Served("digits", "", 0, cohort, cohort, None, True, 0.0)
        self.kpis.remember(request_id, served, 0.0)
        return await self.answer(request, cohort, request_id, TRUTH[body])

    async def answer(self, _request, cohort, request_id, truth):
        """Stable is right, canary is not."""
        headers = {
            "x-model-cohort": cohort,
            "x-model-version": {"stable": "1", "canary": "2"}[cohort],
            "x-model-prediction": truth if cohort == "stable" else "none",
            "x-request-id": request_id,
        }
        return web.json_response({"outputs": []}, headers=headers)

    async def control(self, request, handler):
        """Fails as often as it was told, then takes the outcomes."""
        if request.path == "/v1/outcomes":
            self.posts.append(request.headers)
            if self.control_statuses:
                return web.json_response({"error": "no"}, status=self.control_statuses.pop(0))
        return await handler(request)


@contextlib.asynccontextmanager
async def serving(app):
    """An application on a port of its own; its URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    await runner.cleanup()


@pytest.fixture
async def listener():
    played = Listener()
    envoy = web.Application()
    envoy.add_routes([web.post("/v2/models/digits/infer", played.infer)])

    @web.middleware
    async def failing(request, handler):
        return await played.control(request, handler)

    control = web.Application(middlewares=[failing])
    control.add_routes(outcome_routes(lambda reported: played.kpis.report(reported, 0.0), played.kpis.refuse))
    async with serving(envoy) as played.url, serving(control) as played.control_url:
        yield played


async def start(*options, **environment):
    """`perch traffic` with these options."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "extproc", "traffic", *map(str, options)),
        cwd=ROOT,
        env=own | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process):
    """Its exit code, what it printed, and its complaints."""
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def traffic(played, *options, **environment):
    """The summary of a run that succeeds."""
    where = ("--url", played.url, "--control", played.control_url, "--label-delay", 0, "--json")
    code, out, err = await ended(await start(*where, *options, **environment))
    assert (code, err) == (0, "")
    return json.loads(out)


# --- what is sent ---


def test_the_digits_are_those_that_training_holds_out():
    train = pytest.importorskip("model_servers.train")
    pytest.importorskip("sklearn")
    held_out = train.load_digits()
    with np.load(FILE, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["pixels"], held_out.test_pixels)
        assert np.array_equal(arrays["labels"], held_out.test_labels)
    assert len(TRUTH) == len(held_out.test_labels)


def test_the_digits_come_in_the_package_with_their_source_and_licence():
    assert "CC BY 4.0" in FILE.with_suffix(".md").read_text()
    assert FILE.stat().st_size < 50_000


CROWD = {"users": 1000, "zipf": 1.1, "rate": 100.0, "digits": 599}


def test_the_same_seed_gives_the_same_traffic_and_another_one_another():
    first, again, other = (list(islice(arrivals(Crowd(seed=seed, **CROWD)), 500)) for seed in (1, 1, 2))
    assert first == again != other


def test_users_are_as_busy_as_zipf_says_and_requests_as_frequent_as_the_rate():
    sent = list(islice(arrivals(Crowd(seed=1, **CROWD)), 20_000))
    total = sum(rank**-1.1 for rank in range(1, 1001))
    asked = Counter(arrival.user for arrival in sent)
    for rank in (1, 2, 10):
        expected = 20_000 * rank**-1.1 / total
        assert abs(asked[f"user-{rank}"] - expected) < 5 * expected**0.5
    assert 190 < sent[-1].due_s < 210
    assert {arrival.digit for arrival in sent} == set(range(599))
    assert (
        Counter(arrival.user for arrival in islice(arrivals(Crowd(**CROWD | {"zipf": 0, "users": 2})), 1000))["user-2"]
        > 400
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_users_of_the_defaults_are_busy_and_quiet_and_none_looks_like_no_person(seed):
    """Counted as serve does, who is alerted of one that sends more than 5 %."""
    heavy, asked, second, shares = HeavyHitters(), Counter(), 0, []
    everybody = Counter()
    for arrival in islice(arrivals(Crowd(users=USERS, zipf=ZIPF, rate=50, digits=1, seed=seed)), 10_000):
        if arrival.due_s > second + 1:
            heavy.add({int(user.removeprefix("user-")): n for user, n in asked.items()}, second)
            shares += [share for _, share in [heavy.heaviest() or (0, 0.0)]]
            everybody += asked
            asked, second = Counter(), second + 1
        asked[arrival.user] += 1
    assert 0.01 < max(shares) < 0.8 * HEAVY_SHARE
    tenth = sum(n for _, n in everybody.most_common(USERS // 10))
    assert tenth > 0.4 * everybody.total()


# --- what is summed up ---


async def test_the_summary_is_what_the_listener_saw_and_control_was_told(listener):
    found = await traffic(listener, "--requests", 300, "--rate", 2000, "--users", 20, "--seed", 7)
    seen = Counter(cohort for _, _, cohort, _ in listener.requests)
    assert (found["sent"], found["answered"], found["skipped"]) == (300, 300, 0)
    assert (found["statuses"], found["versions"]) == ({"200": 300}, {"1": seen["stable"], "2": seen["canary"]})
    for cohort, accuracy in (("stable", 1.0), ("canary", 0.0)):
        row = found["cohorts"][cohort]
        assert (row["requests"], row["errors"], row["accuracy"]) == (seen[cohort], 0, accuracy)
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
    told = {"sent": 300, "accepted": 300, "joined": 300, "pending": 0, "duplicates": 0, "late": 0, "refused": 0}
    assert found["labels"] == told | {"unsent": 0}
    sums = {key.arm: (moments.n, moments.sum) for key, moments in listener.kpis.totals().items()}
    assert sums == {"stable": (seen["stable"], seen["stable"]), "canary": (seen["canary"], 0)}
    wanted = list(islice(arrivals(Crowd(users=20, zipf=ZIPF, rate=2000, digits=599, seed=7)), 300))
    assert Counter(user for user, *_ in listener.requests) == Counter(arrival.user for arrival in wanted)


async def test_people_get_a_table_and_nothing_on_stderr(listener):
    where = ("--url", listener.url, "--control", listener.control_url, "--label-delay", 0)
    code, out, err = await ended(await start(*where, "--requests", 50, "--rate", 1000))
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:2] == ["cohort", "requests"]
    assert {row[0]: row[-1] for row in rows[1:3]} == {"canary": "0.0%", "stable": "100.0%"}
    assert "50 sent in" in out
    assert "labels: 50 sent, accepted 50, joined 50" in out


async def test_answers_of_every_kind_are_counted_as_what_they_are(listener):
    kinds = Counter()

    async def answer(request, cohort, request_id, truth):
        kind = kinds.total() % 5
        kinds[kind] += 1
        headers = {"x-model-cohort": cohort, "x-request-id": request_id}
        match kind:
            case 0:
                return web.json_response({"error": "broken"}, status=500, headers=headers)
            case 1:
                request.transport.close()
                return web.Response()
            case 2:  # no header says what the model saw, but the answer does
                return web.json_response({"outputs": [{"name": "label", "data": [int(truth)]}]}, headers=headers)
            case 3:  # no word of perch at all
                return web.Response(text="hello")
            case _:
                return web.Response(status=404, headers=headers)

    listener.answer = answer
    found = await traffic(listener, "--requests", 100, "--rate", 1000, "--max-errors", 60)
    assert found["statuses"] == {"200": 40, "404": 20, "500": 20, "no answer": 20}
    assert sum(found["problems"].values()) == 20
    assert found["cohorts"]["unknown"]["requests"] == 20
    assert found["cohorts"]["unknown"]["accuracy"] is None
    known = [found["cohorts"][cohort] for cohort in ("stable", "canary")]
    assert sum(row["errors"] for row in known) == 40
    assert found["errors"] == 60
    assert sum(row["judged"] for row in known) == sum(row["correct"] for row in known) == 20
    assert (found["answered"], found["labels"]["joined"]) == (80, 20)


async def test_a_slow_server_gets_the_next_request_before_it_has_answered_the_last(listener):
    everybody, answer = asyncio.Event(), listener.answer

    async def together(*args):
        if len(listener.requests) == 40:
            everybody.set()
        await everybody.wait()
        return await answer(*args)

    listener.answer = together
    found = await traffic(listener, "--requests", 40, "--rate", 500, "--connections", 40)
    assert found["statuses"] == {"200": 40}


def plan_of(listener, **more):
    """A run in this process, without labels."""
    digits = load_digits()
    crowd = Crowd(users=5, zipf=1, rate=1000, digits=len(digits))
    given = {"control": None, "token": None, "seconds": None, "connections": 2, "label_delay_s": 0}
    return running.Plan(url=f"{listener.url}/v2/models/digits/infer", digits=digits, crowd=crowd, **given | more)


def hold(listener):
    """No request is answered before this event."""
    release, answer = asyncio.Event(), listener.answer

    async def held(*args):
        await release.wait()
        return await answer(*args)

    listener.answer = held
    return release


async def test_more_than_can_wait_is_skipped_and_counted(listener, monkeypatch):
    monkeypatch.setattr(sending, "MAX_WAITING", 5)
    release = hold(listener)

    def show(_seconds, tally, _text):
        if tally.skipped == 50 - 2 - 5:
            release.set()

    found = await asyncio.wait_for(running.run(plan_of(listener, requests=50), asyncio.Event(), show), 60)
    assert (found["sent"], found["skipped"], found["statuses"]) == (7, 43, {"200": 7})


async def test_what_waits_when_it_is_stopped_is_not_sent_any_more(listener, monkeypatch):
    monkeypatch.setattr(sending, "GRACE_S", 0.1)
    hold(listener)
    stop = asyncio.Event()
    feed = arrivals(Crowd(users=5, zipf=1, rate=1e6, digits=1))
    async with aiohttp.ClientSession() as session:
        sender = sending.Sender(session, f"{listener.url}/v2/models/digits/infer", load_digits(), 2)
        sent = asyncio.create_task(sender.send(islice(feed, 20), stop))
        async with asyncio.timeout(60):
            while len(listener.requests) < 2 or sender._queue.qsize() < 18:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        stop.set()
        await sent
    assert (sender.tally.sent, sender.tally.skipped, sender.tally.statuses) == (2, 18, {"abandoned": 2})


# --- labels ---


async def test_labels_are_sent_again_until_control_has_answered_and_count_once(listener):
    listener.control_statuses = [503, 500, 503]
    found = await traffic(listener, "--requests", 20, "--rate", 1000)
    assert (found["labels"]["joined"], found["labels"]["duplicates"], found["labels"]["unsent"]) == (20, 0, 0)
    assert len(listener.posts) > 3


async def test_labels_carry_the_token_and_a_control_that_wants_another_is_told_in_a_line(listener):
    found = await traffic(listener, "--requests", 5, "--rate", 1000, PERCH_TOKEN="s3cret")
    assert {headers.get("authorization") for headers in listener.posts} == {"Bearer s3cret"}
    listener.control_statuses = [401] * 100
    found = await traffic(listener, "--requests", 200, "--rate", 200)
    assert found["labels"]["problem"] == "control answers 401 to labels, no more are sent; set PERCH_TOKEN"
    assert found["labels"]["refused"] + found["labels"]["unsent"] == 200
    assert found["statuses"] == {"200": 200}
    assert len(listener.control_statuses) == 99


async def test_without_labels_nobody_asks_control(listener):
    found = await traffic(listener, "--requests", 5, "--rate", 1000, "--no-labels", "--control", "http://127.0.0.1:1")
    assert ("labels" in found, listener.posts) == (False, [])


async def test_labels_wait_for_their_time(listener):
    where = ("--url", listener.url, "--control", listener.control_url, "--label-delay", 3600, "--requests", 5, "--json")
    process = await start(*where, "--rate", 1000)
    async with asyncio.timeout(60):
        while len(listener.requests) < 5:  # noqa: ASYNC110  another process is waited for
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, out, _ = await ended(process)
    assert (code, listener.posts) == (0, [])
    assert json.loads(out)["labels"]["unsent"] == json.loads(out)["answered"]


async def test_labels_are_not_sent_before_they_are_due(listener):
    async with aiohttp.ClientSession() as session:
        now_s = asyncio.get_running_loop().time()
        waiting = labels_module.Labels(session, listener.control_url, 100)
        waiting.add("later", now_s, correct=True)
        assert await waiting.send_due()
        assert listener.posts == []
        waiting.add("earlier", now_s - 200, correct=True)  # behind one that is not due
        waiting._waiting.rotate()
        assert await waiting.send_due()
    assert (len(listener.posts), waiting.told.sent) == (1, 1)


async def test_control_that_stays_away_in_the_end_is_given_up(monkeypatch):
    monkeypatch.setattr(labels_module, "PATIENCE_S", 0.1)
    async with aiohttp.ClientSession() as session:
        waiting = labels_module.Labels(session, "http://127.0.0.1:1", 0)
        waiting.add("id-1", 0.0, correct=True)
        waiting.add("", 0.0, correct=True)
        waiting.close()
        await asyncio.wait_for(waiting.run(), 60)
    assert waiting.plain()["unsent"] == 2
    assert waiting.problem.startswith("control does not answer at http://127.0.0.1:1 (")


# --- faults ---


@pytest.fixture
def nowhere():
    """A URL at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def test_a_listener_that_is_down_is_one_line_and_exit_1(nowhere, listener):
    code, out, err = await ended(await start("--url", nowhere, "--control", listener.control_url))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"perch: Envoy does not answer at {nowhere} (")
    assert "is `perch up` running? --url says where" in err


async def test_a_control_that_is_down_is_one_line_that_says_how_to_do_without(nowhere, listener):
    code, out, err = await ended(await start("--url", listener.url, "--control", nowhere))
    assert (code, out, err.count("\n"), listener.requests) == (1, "", 1, [])
    assert err.startswith(f"perch: control does not answer at {nowhere}/livez (")
    assert "--no-labels does without" in err


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:99999999"])
async def test_what_is_no_url_is_one_line(url):
    code, _, err = await ended(await start("--url", url))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("perch: Envoy does not answer at ")


async def test_a_listener_that_never_answers_is_exit_1_with_a_summary(listener):
    async def hangs_up(request, *_):
        request.transport.close()
        return web.Response()

    listener.answer = hangs_up
    where = ("--url", listener.url, "--no-labels", "--requests", 5, "--rate", 1000, "--json")
    code, out, err = await ended(await start(*where))
    assert (code, err) == (1, "perch: no request was answered\n")
    assert json.loads(out)["statuses"] == {"no answer": 5}


async def test_a_model_that_nobody_knows_is_as_many_errors_in_the_table_as_in_the_bar_and_exit_1(listener):
    where = ("--url", listener.url, "--no-labels", "--requests", 20, "--rate", 1000, "--model", "nobody")
    code, out, err = await ended(await start(*where))
    assert (code, err) == (1, "perch: 20 of 20 requests were errors, more than 50 %\n")
    rows = {row[0]: row for row in map(str.split, out.splitlines())}
    assert rows["unknown"][:4] == ["unknown", "20", "100.0%", "20"]
    shown = []
    plan = replace(plan_of(listener, requests=20), url=f"{listener.url}/v2/models/nobody/infer")
    await running.run(plan, asyncio.Event(), lambda _seconds, tally, _text: shown.append(line_of(tally)))
    assert shown[-1] == "20 sent, 0.0% by canary, 20 errors"


@pytest.mark.parametrize(
    ("options", "code"), [((), 0), (("--max-errors", 20), 0), (("--max-errors", 19.9), 1), (("--max-errors", 0), 1)]
)
async def test_how_many_errors_are_a_failure_can_be_chosen(listener, options, code):
    """Of ten requests one is refused and one has no answer; both are rows of the table."""
    answer = listener.answer

    async def one_of_each(request, *rest):
        if len(listener.requests) == 3:
            return web.Response(status=404, headers={"x-model-cohort": "stable"})
        if len(listener.requests) == 6:
            request.transport.close()
        return await answer(request, *rest)

    listener.answer = one_of_each
    where = ("--url", listener.url, "--no-labels", "--requests", 10, "--rate", 20, "--connections", 1, *options)
    found, out, err = await ended(await start(*where))
    assert (found, bool(err)) == (code, bool(code))
    table = out.partition(" sent in ")[0].splitlines()[1:-1]
    rows = [line.rsplit(maxsplit=7) for line in table]
    assert {row[0]: row[3] for row in rows if row[3] != "0"} == {"stable": "1", "no answer": "1"}


def test_what_a_server_says_cannot_draw_on_the_terminal():
    tally, out = Tally(sent=1), io.StringIO()
    tally.answer(200, "[bold]x[/bold]", "\x1b[2J[red]v", 1.0, None)
    print_summary({"seconds": 1.0, **tally.plain()}, Console(file=out, force_terminal=True, color_system="truecolor"))
    assert "[bold]x[/bold]" in out.getvalue()
    assert "versions: \ufffd[2J[red]v 1" in out.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_sums_up_also_what_was_under_way(listener, number):
    """Every connection is held by a request that hangs before it is stopped, so that nothing else is under way."""
    answer, connections, held, all_held = listener.answer, 12, [], asyncio.Event()

    async def every_third_hangs(*args):
        if len(listener.requests) % 3 == 0:
            held.append(args)
            if len(held) == connections:
                all_held.set()
            await asyncio.sleep(3600)
        return await answer(*args)

    listener.answer = every_third_hangs
    where = ("--url", listener.url, "--control", listener.control_url, "--rate", 500, "--seconds", 3600, "--json")
    process = await start(*where, "--label-delay", 0, "--connections", connections)
    await asyncio.wait_for(all_held.wait(), 60)
    process.send_signal(number)
    code, out, err = await ended(process)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["sent"] == len(listener.requests) == 3 * connections
    assert found["statuses"] == {"200": 2 * connections, "abandoned": connections}
    assert found["labels"]["joined"] + found["labels"]["unsent"] == found["statuses"]["200"]


@pytest.mark.parametrize("options", [
    ("--rate", "nan"), ("--rate", "inf"), ("--rate", "0"), ("--seconds", "inf"), ("--users", "0"), ("--zipf", "-1"),
    ("--zipf", "nan"), ("--label-delay", "nan"), ("--requests", "0"), ("--connections", "0"), ("--seed", "x"),
    ("--max-errors", "nan"), ("--max-errors", "101"),
])  # fmt: skip
async def test_a_number_that_is_none_is_a_mistake_of_use(options):
    code, out, err = await ended(await start(*options))
    assert (code, out) == (2, "")
    assert options[0] in err
    assert "Traceback" not in err

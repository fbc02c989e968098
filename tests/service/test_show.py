"""`perch status`: what people see of `GET /v1/status`, at every width, of every age, and when nobody answers."""

import asyncio
import contextlib
import copy
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console

from extproc import show
from extproc.show import StatusError, fetch_status, show_status
from extproc.statustable import StatusView, counted, duration, plain

ROOT = Path(__file__).parents[2]


def cohort(requests=10_000, share=0.95, **changed):
    return {
        "requests": requests,
        "errors": 30,
        "errors_by_class": {"5xx": 30},
        "fell_back": 0,
        "mismatched": 0,
        "aborted": 0,
        "p50_ms": 3.21,
        "p95_ms": 12.34,
        "p99_ms": 1_234.5,
        "predictions": {"7": 40, "3": 30, "1": 20, "0": 6, "9": 4},
        "model_versions": {"1-logistic": 10_000},
        "share": share,
        "last_minute": {"requests_per_s": 41.5, "error_rate": 0.0012, "p50_ms": 3.1, "p95_ms": 9.9, "p99_ms": 45.4},
    } | changed


SILENT = {"requests_per_s": 0.0, "error_rate": None, "p50_ms": None, "p95_ms": None, "p99_ms": None}
CANARY = cohort(526, 0.05, fell_back=12, model_versions={"2-mlp": 500, "3-mlp": 26})
FLAG = {
    "model": "digits",
    "enabled": True,
    "effective_percent": 5.0,
    "wanted_percent": 5.0,
    "held": False,
    "version": "56f7dd8daf00.4",
    "ready": {"stable": 2, "canary": 1},
    "decided": {"canary": {"SPLIT": 526}},
    "cohorts": {"stable": cohort(), "canary": CANARY},
    "drift": {"js": 0.1234, "wasserstein_sd": None, "psi": -0.01, "ks": 0.05, "n": 500, "n_stable": 9_970},
    "kpis": {"accuracy": {"stable": {"n": 1_200, "mean": 0.9534}, "canary": {"n": 83, "mean": 0.9612}}},
    "reconciliation": {
        "decided": 10_526,
        "assigned": 10_526,
        "served": 10_500,
        "lost": 0,
        "surplus": 2,
        "mismatched": 1,
    },
}
STATUS = {
    "ready": True,
    "not_ready": None,
    "flag_file": {"path": "flags.yaml", "version": "56f7dd8daf00.4", "problems": []},
    "flags": {"digits": FLAG},
    "alerts": [],
    "access_log": {"streams": 2, "entries": 10_526, "unreadable": 0, "envoys": {"edge-1": 10_526}},
    "envoy": {"failure_mode_allowed": 0},
}


def status(flag=None, **changed):
    """A whole status; `flag` changes the one flag in it."""
    made = copy.deepcopy(STATUS) | changed
    if flag is not None:
        made["flags"]["digits"] |= flag
    return made


def rendered(what, width=80, note="", height=None):
    """The lines as a terminal of that width shows them: none is wider than it, none ends with blanks.

    With a height, those of a watched screen.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, highlight=False, color_system=None)
    console.print(StatusView(what, note, fit=height is not None))
    lines = out.getvalue().split("\n")
    assert lines.pop() == ""
    assert all(len(line) <= width and line == line.rstrip() for line in lines)
    return lines


def test_cohorts_stand_side_by_side_with_the_numbers_of_the_last_minute():
    assert rendered(status()) == [
        "ready  0 failed open  10.5k log entries of 1 Envoy",
        "",
        "digits  canary 5 %  serving",
        "  model digits  2 stable, 1 canary ready  version 56f7dd8daf00.4",
        "  cohort requests   share fell back over   req/s  errors     p50     p95     p99",
        "  stable      10k  95.0 %         0 1 min   41.5  0.12 %  3.1 ms  9.9 ms 45.4 ms",
        "  canary      526   5.0 %        12 1 min   41.5  0.12 %  3.1 ms  9.9 ms 45.4 ms",
        "  predicts stable 7 40 %, 3 30 %, 1 20 %, 0 6 %, …",
        "           canary 7 40 %, 3 30 %, 1 20 %, 0 6 %, …",
        "  version  stable 1-logistic",
        "           canary 2-mlp, 3-mlp",
        "  drift    JS 0.123   PSI -0.010   KS 0.050   (500 of canary, 9,970 of stable)",
        "  accuracy stable 0.9534 (1,200)   canary 0.9612 (83)",
        "  log      10.5k decided, 0 lost, 2 surplus, 1 served by another arm",
    ]


def test_a_wide_terminal_has_predictions_and_versions_in_the_row_of_the_cohort():
    lines = rendered(status(), 160)
    assert lines[4].endswith("p99  version    predicts")
    assert lines[5].endswith("45.4 ms  1-logistic 7 40 %, 3 30 %, 1 20 %, 0 6 %, …")
    assert lines[6].endswith("45.4 ms  2-mlp, …   7 40 %, 3 30 %, 1 20 %, 0 6 %, …")
    assert lines[7].startswith("  drift ")
    assert not any(line.lstrip().startswith(("predicts", "version ")) for line in lines)


@pytest.mark.parametrize("width", [132, 140, 170])
def test_long_ranges_of_numbers_are_cut_before_any_number_of_the_cohort_is(width):
    ranges = {f"-{n}.23457e-05 .. -{n}.23457e-06": 100 for n in range(1, 6)}
    row = cohort(predictions=ranges, prediction_kind="numbers", learning=False)
    lines = rendered(status({"cohorts": {"stable": row, "canary": row}}), width)
    assert lines[4].startswith("  cohort requests   share fell back over   req/s  errors     p50     p95     p99")
    assert lines[5].startswith("  stable      10k  95.0 %         0 1 min   41.5  0.12 %  3.1 ms  9.9 ms 45.4 ms")
    assert lines[6].startswith("  canary ")
    assert " -1.23457e-05 .. -1.23457e-06 " in lines[5]
    assert lines[5].endswith("…")


@pytest.mark.parametrize("width", [80, 170])
def test_what_is_not_listed_is_told_in_a_word(width):
    learning = cohort(predictions={}, prediction_kind="numbers", learning=True)
    vectors = cohort(predictions={}, prediction_kind="vector", learning=False)
    lines = rendered(status({"cohorts": {"stable": learning, "canary": vectors}}), width)
    assert [line for line in lines if line.endswith(" (learning ranges)")] != []
    assert [line for line in lines if line.endswith(" (vectors)")] != []


def test_without_a_request_in_the_last_minute_the_row_is_of_all_and_says_so():
    lines = rendered(status({"cohorts": {"stable": cohort(last_minute=SILENT)}}))
    assert "  stable      10k  95.0 %         0 total      0  0.30 % 3.21 ms 12.3 ms  1.23 s" in lines
    assert not any(line.startswith("  canary ") for line in lines)


def test_before_any_traffic_a_flag_has_its_head_and_one_line():
    quiet = {
        key: FLAG[key]
        for key in ("model", "enabled", "effective_percent", "wanted_percent", "held", "version", "ready")
    }
    lines = rendered(
        status(flags={"digits": quiet}, access_log={"streams": 0, "entries": 0, "unreadable": 0, "envoys": {}})
    )
    assert lines == [
        "ready  0 failed open  0 log entries of 0 Envoys",
        "",
        "digits  canary 5 %  serving",
        "  model digits  2 stable, 1 canary ready  version 56f7dd8daf00.4",
        "  no request yet",
    ]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ({"enabled": False, "effective_percent": 0.0, "wanted_percent": 0.0}, "digits  canary 0 %  off"),
        ({"held": True, "effective_percent": 0.0}, "digits  canary 0 % of 5 %  held: canary not warm"),
        ({"effective_percent": 12.345, "wanted_percent": 12.345}, "digits  canary 12.345 %  serving"),
        ({"phase": "soaking"}, "digits  canary 5 %  serving  soaking"),
    ],
)
def test_the_head_of_a_flag_says_its_share_and_its_state(flag, line):
    assert line in rendered(status(flag))


def test_of_several_flags_the_columns_stand_below_each_other():
    other = copy.deepcopy(FLAG) | {"cohorts": {"stable": cohort(1), "canary": cohort(123_456_789, 1.0)}}
    lines = rendered(status(flags={"digits": FLAG, "wine": other}))
    rows = [line for line in lines if re.match(r"  (stable|canary) ", line)]
    assert len(rows) == 4
    assert {line.index("1 min") for line in rows} == {rows[0].index("1 min")}
    assert [line for line in lines if line and not line.startswith(" ")][1:] == [
        "digits  canary 5 %  serving",
        "wine  canary 5 %  serving",
    ]


@pytest.mark.parametrize("width", [40, 80, 160])
def test_texts_of_any_length_and_kind_stay_in_their_place(width):
    odd = {"a very long label that goes on and on": 5, "[red]x[/red]": 4, "\x1b[31m": 3, "": 2, "ü\n": 1}
    versions = {"v" * 500: 3, "\x1b[2J": 2}
    long = "f" * 200
    flag = copy.deepcopy(FLAG) | {
        "cohorts": {"stable": cohort(predictions=odd, model_versions=versions)},
        "model": long,
    }
    text = "\n".join(rendered(status(flags={long: flag}, alerts=["a\x1b[2J" + "b" * 300]), width))
    assert "\x1b" not in text
    assert "[red]" in text or width == 40
    if width > 40:
        for label in ("a very long label… 33 %", "[red]x[/red] 27 %", "\ufffd[31m 20 %"):
            assert label in text
        assert "\n  canary" not in text


def test_an_older_control_leaves_keys_out_and_they_are_dashes_or_absent():
    assert rendered({"ready": True, "flags": {"digits": {}}, "envoy": None}) == [
        "ready  Envoy does not answer",
        "",
        "digits  canary -  serving",
        "  model -  version -",
        "  no request yet",
    ]
    lines = rendered(status({"cohorts": {"stable": {"requests": 3}}, "drift": {}, "kpis": {}, "reconciliation": {}}))
    assert "  stable        3       -         - total      -       -       -       -       -" in lines
    assert rendered({}) == ["not ready: nobody says why  Envoy does not answer", "no flags"]


def parts_of(what, path=()):
    """Every path to a key in a status."""
    for key, value in what.items() if isinstance(what, dict) else ():
        yield (*path, key)
        yield from parts_of(value, (*path, key))


@pytest.mark.parametrize("path", list(parts_of(STATUS)), ids=lambda path: ".".join(map(str, path)))
def test_any_key_may_be_missing_or_null(path):
    for damage in ("missing", "null"):
        damaged = copy.deepcopy(STATUS)
        part = damaged
        for key in path[:-1]:
            part = part[key]
        if damage == "missing":
            del part[path[-1]]
        else:
            part[path[-1]] = None
        assert rendered(damaged)
        assert rendered(damaged, 160)


def test_what_needs_a_look_stands_directly_below_the_headline():
    flag = {"heavy_unit": {"share": 0.31, "unit": "anonymous"}}
    problems = {"problems": ["flags.yaml:3:4: canary: expected a number"]}
    lines = rendered(status(flag, flag_file=problems, alerts=["digits: 12 of 30000 requests are missing"]))
    assert lines[:6] == [
        "ready  0 failed open  10.5k log entries of 1 Envoy",
        "  ! the last good flag file is served: flags.yaml:3:4: canary: expected a number",
        "  ! digits: 12 of 30000 requests are missing",
        "  ! digits: one unit (anonymous) makes up 31% of the traffic; is it a person?",
        "",
        "digits  canary 5 %  serving",
    ]


# --- a watched screen ---


def many(flags, alerts=0):
    """A status of so many flags and alerts."""
    return status(flags={f"flag-{i}": FLAG for i in range(flags)}, alerts=[f"alert {i}" for i in range(alerts)])


def heads(lines):
    """The flags whose head is there."""
    return [line.partition(" ")[0] for line in lines if line.startswith("flag-")]


def test_what_fits_on_the_screen_is_shown_whole():
    assert rendered(many(1, 1), height=16) == rendered(many(1, 1))
    assert len(rendered(many(1, 1))) == 15


def test_of_three_flags_in_twenty_lines_every_one_shows_its_cohorts_and_the_alerts_stand_above():
    lines = rendered(many(3, 2), height=20)
    assert lines[1:3] == ["  ! alert 0", "  ! alert 1"]
    assert heads(lines) == ["flag-0", "flag-1", "flag-2"]
    assert [line[2:8] for line in lines].count("canary") == 3
    assert lines[-1] == "3 of 3 flags in short: too few lines; `perch status` shows all"
    assert len(lines) <= 19


def test_the_room_that_is_left_is_of_the_flags_above():
    lines = rendered(many(2), height=24)
    assert any(line.startswith("  drift") for line in lines[: lines.index("flag-1  canary 5 %  serving")])
    assert not any(line.startswith("  drift") for line in lines[lines.index("flag-1  canary 5 %  serving") :])
    assert lines[-1] == "1 of 2 flags in short: too few lines; `perch status` shows all"


def test_flags_and_alerts_for_which_there_is_no_line_are_counted():
    lines = rendered(many(40, 30), height=20)
    assert lines[1:10] == [f"  ! alert {i}" for i in range(8)] + [
        "  ! 22 more alerts: too few lines; `perch status` shows all"
    ]
    assert heads(lines) == [f"flag-{i}" for i in range(8)]
    assert lines[-1] == "32 more of 40 flags: too few lines; `perch status` shows all"


@pytest.mark.parametrize("height", [5, 6, 7, 10, 15, 20, 24, 30, 50, 100])
@pytest.mark.parametrize("flags", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("alerts", [0, 1, 5, 30])
def test_a_watched_screen_never_has_more_lines_than_the_terminal_and_hides_nothing_unsaid(flags, alerts, height):
    what = many(flags, alerts)
    lines, whole = rendered(what, height=height), rendered(what)
    assert len(lines) < height
    assert lines == whole or lines[-1].endswith("shows all") or any("more alert" in line for line in lines)
    hidden = [int(line.split()[0]) for line in lines if " more of " in line]
    assert len(heads(lines)) + sum(hidden) == flags
    told = [line for line in lines if line.startswith("  ! ")]
    more = [int(line.split()[1]) for line in told if " more alert" in line]
    assert len(told) - len(more) + sum(more) == alerts


def test_the_head_says_what_is_not_ready_and_what_could_not_be_read():
    log = {"streams": 1, "entries": 5, "unreadable": 7, "envoys": {"a": 2, "b": 3}}
    made = status(
        ready=False, not_ready="the canary of digits is not warm", access_log=log, envoy={"failure_mode_allowed": 3}
    )
    assert rendered(made)[:2] == [
        "not ready: the canary of digits is not warm  3 failed open  5 log entries of 2",
        "Envoys, 7 unreadable",
    ]
    gone = status(ready=False, not_ready="Envoy does not answer", envoy=None)
    assert rendered(gone)[0] == "not ready: Envoy does not answer  10.5k log entries of 1 Envoy"


def test_shares_of_a_cut_off_list_of_predictions_are_of_all_requests():
    cut = {str(n): 100 for n in range(20)}
    lines = rendered(status({"cohorts": {"stable": cohort(10_000, predictions=cut)}}))
    assert "  predicts stable 0 1 %, 1 1 %, 10 1 %, 11 1 %, …" in lines


@pytest.mark.parametrize(
    ("n", "text"),
    [(None, "-"), (0, "0"), (9_999, "9,999"), (10_000, "10k"), (12_345, "12.3k"), (999_499, "999k"), (999_500, "1M"),
     (123_456_789, "123M"), (5e12, "5T"), (2e16, "20000T")],
)  # fmt: skip
def test_numbers_are_short(n, text):
    assert counted(n) == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [(None, "-"), (0, "0 ms"), (0.098, "0.098 ms"), (3.21, "3.21 ms"), (45.4, "45.4 ms"), (99.6, "100 ms"),
     (999.4, "999 ms"), (999.6, "1 s"), (15_000, "15 s"), (99_600, "1.66 min"), (5_000_000, "83.3 min"),
     (5e7, "13.9 h")],
)  # fmt: skip
def test_durations_are_short(ms, text):
    assert duration(ms) == text


def test_plain_text_is_cut_where_it_is_too_long():
    assert plain("abcdef", 6) == "abcdef"
    assert plain("abcdefg", 6) == "abcde…"
    assert plain("\n\t\x00a", 6) == "\ufffd\ufffd\ufffda"


# --- asking control ---


class Control:
    """Answers `/v1/status` with whatever it is told."""

    def __init__(self):
        self.answer = web.json_response(STATUS).body
        self.code, self.content_type, self.asked = 200, "application/json", 0
        self.open = asyncio.Event()
        self.open.set()

    async def status(self, _request):
        """One answer, once it is open."""
        self.asked += 1
        await self.open.wait()
        return web.Response(status=self.code, body=self.answer, content_type=self.content_type)


@pytest.fixture
async def control(folder, monkeypatch):
    monkeypatch.setattr(show, "ANSWER_WITHIN", show.aiohttp.ClientTimeout(total=60))  # this process may stand still
    made = Control()
    application = web.Application()
    application.add_routes([web.get("/v1/status", made.status)])
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    await web.UnixSite(runner, str(folder.root / "control.sock")).start()
    made.address, made.socket = (
        f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}",
        f"unix:{folder.root}/control.sock",
    )
    made.runner = runner
    yield made
    await runner.cleanup()


async def test_the_status_is_asked_of_a_port_or_a_socket(control):
    assert await fetch_status(control.address) == STATUS
    assert await fetch_status(control.socket) == STATUS


async def test_what_is_no_status_is_said_in_one_line(control, monkeypatch):
    control.answer = b"[]"
    with pytest.raises(StatusError, match=r"^what answers at .* \(status 200\) is not perch's control$"):
        await fetch_status(control.address)
    control.answer, control.code = b"{}", 404
    with pytest.raises(StatusError, match=r"\(status 404\) is not perch's control$"):
        await fetch_status(control.address)
    control.content_type = "text/html"
    with pytest.raises(StatusError, match="control does not answer at"):
        await fetch_status(control.address)
    control.open.clear()
    monkeypatch.setattr(show, "ANSWER_WITHIN", show.aiohttp.ClientTimeout(total=0.05))
    with pytest.raises(StatusError, match=r"^control at .* did not answer within 0.05 s$"):
        await fetch_status(control.address)
    control.open.set()


async def test_json_is_the_whole_answer_and_in_a_pipe_a_line_per_look(control, capsys, monkeypatch):
    await show_status(control.address, watch=False, as_json=True)
    assert json.loads(capsys.readouterr().out) == STATUS
    monkeypatch.setattr(show, "WATCH_EVERY_S", 0.01)
    watching = asyncio.create_task(show_status(control.address, watch=True, as_json=True))
    await until(lambda: control.asked > 4)
    await control.runner.cleanup()
    with pytest.raises(StatusError, match="control does not answer at"):
        await asyncio.wait_for(watching, 30)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    assert all(json.loads(line) == STATUS for line in lines)


def without_escapes(text):
    """What a terminal shows of it."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is watched tells nobody
            await asyncio.sleep(0.01)


async def test_while_control_is_away_a_watched_screen_keeps_the_last_status_and_says_so(control, capsys, monkeypatch):
    monkeypatch.setattr(show, "WATCH_EVERY_S", 0.01)
    seen = []
    monkeypatch.setattr(
        show, "StatusView", lambda status, note="", **fit: seen.append(note) or StatusView(status, note, **fit)
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    watching = asyncio.create_task(show_status(control.address, watch=True, as_json=False))
    await until(lambda: control.asked > 2)
    control.code = 500
    await until(lambda: seen[-1].endswith("is not perch's control"))
    assert re.match(r"\d+ s old: what answers at ", seen[-1])
    control.code = 200
    await until(lambda: seen[-1] == "")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert "digits  canary 5 %  serving" in without_escapes(capsys.readouterr().out)
    assert rendered(STATUS, note=f"3 s old: {'x' * 20}")[0] == "3 s old: xxxxxxxxxxxxxxxxxxxx"


async def test_nobody_there_at_the_start_is_an_error_also_when_watching():
    with pytest.raises(StatusError, match=r"control does not answer at 127.0.0.1:1 .*is `perch up` running\?"):
        await show_status("127.0.0.1:1", watch=True, as_json=False)


# --- the command, as a process ---


PATIENT = """
import aiohttp
from extproc import cli, show
show.ANSWER_WITHIN = aiohttp.ClientTimeout(total=60)
cli.app()
"""


async def watch(control, stdout, **environment):
    """`perch status --watch` with this standard output, which bears that the test stands still for a while."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")} | {"TERM": "xterm"}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PATIENT, "status", "--watch", "--control-port", control.address.rpartition(":")[2]),
        cwd=ROOT,
        env=own | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
async def test_in_a_pipe_every_look_comes_at_once_as_plain_text(control, environment):
    process = await watch(control, asyncio.subprocess.PIPE, **environment)
    try:
        async with asyncio.timeout(60):
            looks = [await process.stdout.readuntil(b"\n\n2") for _ in range(2)]
            control.code = 500
            while b"control at" not in (line := await process.stdout.readline()) and b"is not perch" not in line:
                pass
            control.code = 200
            assert b"ready" in await process.stdout.readuntil(b"ready")
    finally:
        process.terminate()
        await process.wait()
    text = b"".join(looks).decode()
    assert environment or "\x1b" not in text
    assert not re.search(r"\x1b\[[^m]*[a-ln-zA-Z]|\r", text)  # colours at most, where they were asked for
    text = without_escapes(text)
    assert len(re.findall(r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d$", text, re.MULTILINE)) == 2
    assert [line for line in text.splitlines() if line.startswith("ready")] == [rendered(STATUS)[0]] * 2
    assert "  log      10.5k decided, 0 lost, 2 surplus, 1 served by another arm" in text


async def test_a_reader_that_has_seen_enough_ends_it_without_a_word(control):
    process = await watch(control, asyncio.subprocess.PIPE)
    await asyncio.wait_for(process.stdout.readline(), 30)
    process.stdout._transport.close()
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert err == b""


async def test_a_terminal_of_twenty_lines_shows_the_alerts_and_says_what_is_cut(control):
    control.answer = json.dumps(many(3, 1)).encode()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 80, 0, 0))
    process = await watch(control, theirs)
    os.close(theirs)
    screen = b""
    try:
        async with asyncio.timeout(60):
            while screen.count(b"shows all") < 2:
                screen += await asyncio.to_thread(os.read, ours, 65536)
    finally:
        process.terminate()
        await process.wait()
        os.close(ours)
    text = without_escapes(screen.decode())
    assert "  ! alert 0\r\n" in text
    assert "3 of 3 flags in short: too few lines; `perch status` shows all" in text
    assert "..." not in text

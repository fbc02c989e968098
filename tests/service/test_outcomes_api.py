"""`POST /v1/outcomes` over a real socket, into a real store."""

import asyncio
import contextlib
import gzip
import io
import json
import os
from dataclasses import MISSING, fields
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from extproc import outcomesapi
from extproc.api import Sources, log, make_api
from extproc.core.bucketing import hash_unit
from extproc.core.kpis import Kpis, Served
from extproc.outcomesapi import MAX_BODY, MAX_LINE, TURN, outcome_routes

NDJSON = "application/x-ndjson"
NOTHING = {"accepted": 0, "joined": 0, "pending": 0, "duplicates": 0, "late": 0, "refused": 0, "errors": []}


class Control:
    """A store that served ten requests of ten users, and the API in front of it."""

    def __init__(self, **more):
        self.kpis, self.now_s, self.watch = Kpis(**more), 0.0, lambda: None
        self.kpis.take_flags({"digits": {"": b"d:"}, "wine": {"": b"w:"}})
        for n in range(10):
            served = Served("digits", "", 0, "canary", "canary", hash_unit(b"d:", b"u-%d" % n), True, 0.0)
            self.kpis.remember(f"r-{n}", served, 0.0)

    @property
    def refused(self):
        """What the metric shows as refused."""
        return self.kpis.counts.refused

    def report(self, reported):
        """At the time of the test, which may watch."""
        result = self.kpis.report(reported, self.now_s)
        self.watch()
        return result

    @property
    def n(self):
        """Values that were summed."""
        return sum(moments.n for moments in self.kpis.totals().values())


@contextlib.asynccontextmanager
async def listening(control):
    """The control API with nothing behind it but the store; its address."""
    required = [each.name for each in fields(Sources) if each.default is MISSING and each.default_factory is MISSING]
    sources = Sources(**dict.fromkeys(required), routes=outcome_routes(control.report, control.kpis.refuse))
    runner = web.AppRunner(make_api(sources), access_log=None, logger=log, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1/outcomes"
    await runner.cleanup()


@pytest.fixture
def control():
    return Control()


@pytest.fixture
async def post(control):
    async with listening(control) as url, aiohttp.ClientSession() as session:

        async def ask(body, content_type="application/json", **headers):
            data = json.dumps(body).encode() if isinstance(body, dict | list) else body
            data = io.BytesIO(data) if isinstance(data, bytes) else data
            async with session.post(url, data=data, headers={"content-type": content_type, **headers}) as answer:
                return answer.status, await answer.json()

        ask.url, ask.session = url, session
        yield ask


def one(n=0, **more):
    return {"request_id": f"r-{n}", "flag": "digits", "name": "accuracy", "value": 1} | more


def lines(*outcomes):
    return b"".join(json.dumps(outcome).encode() + b"\n" for outcome in outcomes)


# --- the three forms ---


FORMS = [
    ([one(0)], "application/json", json.dumps(one(0)).encode()),
    ([one(0)], "application/json", json.dumps(one(0), indent=2).encode()),
    ([one(0), one(1)], "application/json", json.dumps([one(0), one(1)]).encode()),
    ([one(0), one(1)], "application/json", b"\n  " + json.dumps([one(0), one(1)], indent=2).encode()),
    ([one(0), one(1)], NDJSON, lines(one(0), one(1))),
    ([one(0), one(1)], "application/jsonl; charset=utf-8", lines(one(0), one(1))),
    ([one(0), one(1)], NDJSON, lines(one(0), one(1)).replace(b"\n", b"\r\n\r\n").rstrip()),
    ([one(0), one(1)], "application/x-www-form-urlencoded", lines(one(0), one(1))),
    ([one(0), one(1)], "application/json", b"\n\n" + lines(one(0), one(1))),
    ([one(0), one(1)], "text/plain", json.dumps([one(0), one(1)]).encode()),
]


@pytest.mark.parametrize(("outcomes", "content_type", "body"), FORMS)
async def test_an_object_an_array_and_lines_are_told_apart_whatever_type_they_are_sent_with(
    control, post, outcomes, content_type, body
):
    n = len(outcomes)
    assert await post(body, content_type) == (200, NOTHING | {"accepted": n, "joined": n})
    assert control.n == n


@pytest.mark.parametrize("body", [body for _, _, body in FORMS])
async def test_a_body_may_come_a_byte_at_a_time(control, post, body):
    async def dripping():
        for i in range(len(body)):
            yield body[i : i + 1]
            await asyncio.sleep(0)

    code, answer = await post(dripping())
    assert (code, answer["accepted"], answer["refused"]) == (200, control.n, 0)


async def test_a_compressed_body_is_read(control, post):
    assert (await post(gzip.compress(lines(one(0), one(1))), NDJSON, **{"content-encoding": "gzip"}))[0] == 200
    assert control.n == 2


async def test_the_answer_tells_what_became_of_each(control, post):
    control.now_s = 5.0
    body = lines(
        one(0), one(0), one(1, request_id="early"), {"unit": "u-3", "flag": "digits", "name": "ok", "value": 1}
    )
    code, answer = await post(body, NDJSON)
    assert (code, answer) == (200, NOTHING | {"accepted": 4, "joined": 2, "duplicates": 1, "pending": 1})
    control.now_s = 25 * 3600.0
    assert await post(one(5)) == (200, NOTHING | {"accepted": 1, "late": 1})


async def test_sent_again_nothing_counts_twice_and_it_is_no_error(control, post):
    body = lines(*(one(n, key=f"k{n}") for n in range(10)))
    assert (await post(body, NDJSON))[1]["joined"] == 10
    assert await post(body, NDJSON) == (200, NOTHING | {"accepted": 10, "duplicates": 10})
    assert control.n == 10


# --- what is refused ---


async def test_a_wrong_line_says_its_number_and_stops_nothing(control, post):
    wrong = b'{"request_id"\n' + lines(one(2, value="high"), one(3, flag="nope"), 7) + b"\xff\xfe\n"
    code, answer = await post(lines(one(0)) + b"\n" + wrong + lines(one(1)), NDJSON)
    assert (code, answer["accepted"], answer["refused"], control.n) == (200, 2, 5, 2)
    assert control.refused == 5
    assert [(each["line"], each["error"].partition(":")[0]) for each in answer["errors"]] == [
        (3, "not JSON"),
        (4, "value"),
        (5, "unknown flag 'nope'"),
        (6, "expected an object with request_id or unit, flag, name, value"),
        (7, "not JSON"),
    ]


async def test_a_wrong_item_of_an_array_says_its_place(control, post):
    body = b"[" + json.dumps(one(0)).encode() + b', {"request_id": "r-1", "name": "a", "value": NaN}]'
    errors = [{"index": 1, "error": "value: nan is no finite number"}]
    assert await post(body) == (200, NOTHING | {"accepted": 1, "joined": 1, "refused": 1, "errors": errors})
    assert control.refused == 1


@pytest.mark.parametrize(("body", "content_type", "told"), [
    (b"", "application/json", "the body holds no outcome"),
    (b"", NDJSON, "the body holds no outcome"),
    (b" \n\n ", "application/json", "the body holds no outcome"),
    (b"[]", "application/json", "the body holds no outcome"),
    (b"hello", "application/json", "not JSON: "),
    (b"hello", NDJSON, "not JSON: "),
    (b"[" * 100_000, "application/json", "not JSON: nested too deeply"),
    (b"[" * 60_000, NDJSON, "not JSON: nested too deeply"),
    (b"1" * 10_000, NDJSON, "not JSON: a number has too many digits"),
    (b"[" + b"1" * 1_000_000 + b"]", "application/json", "not JSON: a number has too many digits"),
    (json.dumps(one(value=10**4000)).encode(), NDJSON, "value: larger than 1e+12"),
    (json.dumps(one(name="\ud800")).encode(), NDJSON, "name: expected letters"),
    (json.dumps(one(request_id="\ud800")).encode(), NDJSON, "request_id: not encodable as UTF-8"),
    (b"\xff\xfe", NDJSON + "; charset=no-such-thing", "not JSON: "),
    (b'{"request_id": "r-0", "name": "a", "value": 1, "value": NaN}', NDJSON, "value: nan is no finite number"),
    (b'{"name": "a"', "application/json", "not JSON: "),
    (b"null", "application/json", "expected an object"),
    (json.dumps([[one(0)]]).encode(), "application/json", "expected an object"),
])  # fmt: skip
async def test_a_body_without_any_good_outcome_is_a_bad_request(control, post, body, content_type, told):
    code, answer = await post(body, content_type)
    assert (code, answer["accepted"], control.n) == (400, 0, 0)
    assert answer["errors"][0]["error"].startswith(told)
    assert control.refused == answer["refused"] == (told != "the body holds no outcome")


async def test_only_the_first_errors_are_told_and_all_are_counted(control, post):
    code, answer = await post(b"x\n" * 1_000, NDJSON)
    assert (code, answer["refused"], len(answer["errors"])) == (400, 1_000, 20)
    assert control.refused == 1_000


async def test_what_the_store_refuses_is_counted_once(control, post):
    assert (await post([one(0, flag="nope"), one(1, flag="wine")]))[1]["refused"] == 2
    assert control.refused == 2


async def test_a_line_that_is_too_long_is_refused_and_the_next_one_read(control, post):
    long = json.dumps(one(1)).encode() + b" " * MAX_LINE
    code, answer = await post(b"\n".join((json.dumps(one(0)).encode(), long, long * 3, lines(one(2)), long)), NDJSON)
    assert (code, control.n) == (200, 2)
    assert answer["errors"] == [{"line": n, "error": "longer than 65536 bytes"} for n in (2, 3, 6)]
    assert control.refused == 3


async def test_a_body_that_must_be_read_whole_is_refused_above_its_limit(control, post):
    spaces = b" " * MAX_BODY
    for body in (b"[" + spaces + b"]", b"{" + spaces + b"}"):
        code, answer = await post(body)
        assert code == 413
        assert "send more as NDJSON" in answer["error"]
    assert control.refused == 2
    code, answer = await post(b"[" + json.dumps(one(0)).encode() + b" " * (MAX_BODY - 200) + b"]")
    assert (code, control.n) == (200, 1)


async def test_a_store_that_is_full_refuses_and_says_when_to_come_again():
    async with listening(Control(max_pending=3)) as url, aiohttp.ClientSession() as session:
        body = lines(*(one(0, request_id=f"early-{n}") for n in range(5)))
        async with session.post(url, data=body) as answer:
            told = await answer.json()
    assert (told["pending"], told["refused"]) == (3, 2)
    assert "send it again in some seconds" in told["errors"][0]["error"]


# --- faults ---


async def test_what_was_taken_before_the_sender_died_stays_and_can_be_sent_again(control, post):
    torn = lines(*(one(n) for n in range(5)))[:-10]

    taken = asyncio.Event()
    control.watch = lambda: control.n == 4 and taken.set()

    async def dies():
        yield torn
        await taken.wait()
        raise ConnectionError("the sender is gone")

    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(dies(), NDJSON)
    assert control.n == 4
    code, answer = await post(lines(*(one(n) for n in range(5))), NDJSON)
    assert (code, answer["duplicates"], answer["joined"]) == (200, 4, 1)


GZIP, DEFLATE, BROTLI = ({"content-encoding": name} for name in ("gzip", "deflate", "br"))


@pytest.mark.parametrize("encoding", [GZIP, DEFLATE, BROTLI])
@pytest.mark.parametrize("content_type", ["application/json", NDJSON])
async def test_a_body_that_is_not_in_its_encoding_is_a_bad_request_with_a_line_in_the_log(
    control, post, caplog, content_type, encoding
):
    code, answer = await post(b"\xff\xff no compressed text", content_type, **encoding)
    told = f"Can not decode content-encoding: {encoding['content-encoding']}"
    errors = [{"error": f"the body cannot be read to its end: {told}"}]
    assert (code, answer) == (400, NOTHING | {"refused": 1, "errors": errors})
    assert control.refused == 1
    await until(lambda: caplog.records)
    assert [one.getMessage() for one in caplog.records] == [f"a request cannot be read: {told}"]
    assert "Traceback" not in caplog.text


async def test_what_stood_before_a_fault_of_the_encoding_stays_and_the_fault_is_told_though_it_was_accepted(
    control, post
):
    whole = gzip.compress(lines(*(one(n) for n in range(10))))

    async def spoiled():
        yield whole
        await until(lambda: control.n == 10)
        yield b"no member of it"

    code, answer = await post(spoiled(), NDJSON, **GZIP)
    assert (code, answer["joined"], answer["refused"], control.refused) == (400, 10, 1, 1)
    assert answer["errors"][0]["error"].startswith("the body cannot be read to its end: ")


@pytest.mark.parametrize("cut", [1, 20])
@pytest.mark.parametrize("head", [
    b"content-type: application/x-ndjson\r\ncontent-length: 9999\r\n\r\n",
    b"content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n999\r\n",
    b"content-type: application/json\r\ncontent-length: 9999\r\n\r\n",
])  # fmt: skip
async def test_a_client_that_goes_away_within_its_body_is_counted_and_leaves_no_traceback(
    control, post, caplog, head, cut
):
    async with going_away(post.url) as (_, writer):
        writer.write(b"POST /v1/outcomes HTTP/1.1\r\nhost: x\r\n" + head + lines(one(0), one(1), one(2))[:-cut])
        await until(lambda: control.n >= 2)
    await until(lambda: control.refused)
    assert (control.n, control.refused) == (2, 1)
    assert (await post(one(2)))[1]["joined"] == 1
    assert [record.getMessage() for record in caplog.records] == []


async def test_a_client_that_goes_away_before_its_first_line_is_counted_too(control, post, caplog):
    async with going_away(post.url) as (reader, writer):
        writer.write(b"POST /v1/outcomes HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n")
        assert b"100 Continue" in await reader.readline()  # the handler begins
    await until(lambda: control.refused == 1)
    assert (control.n, caplog.records) == (0, [])


@pytest.mark.parametrize("after", [b"", b"no length\r\n"])
async def test_a_body_that_stalls_or_loses_its_chunks_ends_with_what_came_before(control, post, monkeypatch, after):
    monkeypatch.setattr(outcomesapi, "STALL_S", 0.5)
    first = lines(one(0))
    async with going_away(post.url) as (reader, writer):
        head = b"POST /v1/outcomes HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(first), first))
        await until(lambda: control.n == 1)
        writer.write(after)
        assert b"408" in await asyncio.wait_for(reader.readline(), 30)  # as one that says: send it again
        answer = await asyncio.wait_for(reader.readuntil(b"}]}"), 30)
    assert b'"joined": 1' in answer
    assert b"the body cannot be read to its end: nothing came for 0.5 seconds" in answer
    assert control.refused == 1


@contextlib.asynccontextmanager
async def going_away(url):
    """A connection to the API for bytes as they are, reset at the end."""
    reader, writer = await asyncio.open_connection(URL(url).host, URL(url).port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until(condition):
    """Waits for something that other tasks do."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  the server signals none of it
            await asyncio.sleep(0.001)


def rss():
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MANY = 1 << 30


async def gigabyte(block, seen):
    """A gigabyte of a block repeated; what memory there was meanwhile goes to `seen`."""
    for n in range(MANY // len(block)):
        if n % 100 == 0:
            seen.append(rss())
        yield block


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("outcome", [
    pytest.param(lambda n: json.dumps(one(n % 10, key=f"k{n}")).encode() + b" " * 32_000 + b"\n", id="outcomes"),
    pytest.param(lambda _: b" " * 65_000, id="no line at all"),
])  # fmt: skip
async def test_a_gigabyte_of_lines_is_read_in_memory_that_does_not_grow(control, post, outcome):
    block, seen = b"".join(map(outcome, range(32))), []
    code, answer = await post(gigabyte(block, seen), NDJSON)
    assert answer["accepted"] == (MANY // len(block) * 32 if b"\n" in block else 0)
    assert code == (200 if b"\n" in block else 400)
    assert control.n == (32 if b"\n" in block else 0)
    assert max(seen) - seen[0] < 32 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
async def test_a_gigabyte_of_one_array_is_refused_without_being_kept(control, post):
    seen = []
    block = b"[" + b",".join([b"1"] * 500_000)
    with contextlib.suppress(aiohttp.ClientError):  # the server hangs up on who goes on sending
        code, _ = await post(gigabyte(block, seen))
        assert code == 413
    assert max(seen) - seen[0] < 32 << 20
    assert (await post(one(0)))[0] == 200


async def test_many_outcomes_let_others_have_their_turn(control, post):
    started = asyncio.Event()
    control.watch = started.set
    async with listening(control) as url, aiohttp.ClientSession() as session:
        body = [one(n % 10, key=f"{n}") for n in range(TURN * 10)]
        request = asyncio.create_task(session.post(url, json=body))
        await started.wait()
        assert control.n < len(body)
        async with await request as answer:
            assert answer.status == 200
    assert control.n == len(body)

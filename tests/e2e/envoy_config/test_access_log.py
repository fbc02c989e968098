"""What became of each request, as the access log service tells it, against what really happened to it."""

import asyncio
import contextlib
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded

from extproc.accesslog import AccessLogService
from extproc.core.decision import decide
from extproc.core.flags import Exposures, Flag
from extproc.core.outcomes import Assignment, Outcome
from extproc.core.request import Request
from extproc.core.ruleset import compile_ruleset
from extproc.wire.replies import replies

HALF = Flag(key="digits-v2", model="digits", salt="digits-v2", percent=Decimal(50))
RULESET = compile_ruleset([HALF], Exposures(), {"digits": "/v2/models/digits/"}, version="0123456789ab.7")
REPLIES = replies(RULESET.choices, RULESET.version)
NO_DEADLINE_S = 3600.0


def decision(user: str) -> tuple[Any, int]:
    """What perch decides for a user, and the user's hash."""
    return decide(RULESET, Request({b":path": b"/v2/models/digits/infer", b"x-user-id": user.encode()}))


def assignment(cohort: str) -> Assignment:
    """Of every user of a cohort."""
    return Assignment("digits-v2", "digits", cohort, "SPLIT", "", "0123456789ab.7")


USERS = {
    cohort: [f"u{n}" for n in range(400) if decision(f"u{n}")[0].cohort == cohort] for cohort in ("stable", "canary")
}


def answer(shown: dict[str, bytes]) -> bytes:
    """The reply of perch, as it is on the wire."""
    choice, unit_hash = decide(RULESET, Request({name.encode(): value for name, value in shown.items()}))
    return REPLIES[choice.index] + (b"" if unit_hash is None else struct.pack("<d", unit_hash))


@dataclass
class Log:
    """A running edge whose log is read; outcomes by request id."""

    edge: Any
    service: Any = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    repeated: list[Outcome] = field(default_factory=list)

    def take(self, batch: Any, _stream: Any) -> None:
        """Keeps them."""
        for one in batch.outcomes:
            if one.request_id in self.outcomes:
                self.repeated.append(one)
            self.outcomes[one.request_id] = one

    async def listen(self) -> None:
        """Starts the service at the address that Envoy knows."""
        self.service = AccessLogService(self.take, asyncio.get_running_loop().time)
        await self.service.start(f"unix:{self.edge.folder}/als.sock")

    async def of(self, request_id: str) -> Outcome:
        """The outcome of a request, when it has come."""
        await self.edge.until(lambda: request_id in self.outcomes)
        return self.outcomes[request_id]

    async def infer(self, cohort: str, **headers: str) -> Outcome:
        """What became of a request by a user of the cohort that was answered in some way."""
        got = await self.edge.infer(x_user_id=USERS[cohort][0], **headers)
        return await self.of(got.headers["x-request-id"])

    async def last_seen_by(self, server: str) -> Outcome:
        """What became of the request that a model server saw last."""
        return await self.of(self.edge.upstreams[server].seen[-1].headers["x-request-id"])


@pytest.fixture
def logged(running):
    """The context of a running edge with perch's own replies, whose log is read."""

    @contextlib.asynccontextmanager
    async def start(model, *args, **settings):
        async with running([model], *args, access_log="unix:als.sock", **settings) as edge:
            edge.decider.reply = answer
            log = Log(edge)
            await log.listen()
            try:
                yield log
            finally:
                await log.service.stop(0)
            assert log.service.counts.unreadable == log.service.counts.unreadable_messages == 0
            assert log.repeated == []

    return start


@pytest.fixture
def patient_model(a_model):
    """A model that no request takes too long for."""
    return replace(a_model("digits"), deadline_s=NO_DEADLINE_S)


class H2Client:
    """An HTTP/2 connection, many requests at a time."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.connection = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.connection.initiate_connection()
        self.answers = {}

    @classmethod
    async def to(cls, port):
        """Connects."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def ask(self, user):
        """Sends a request; its stream id."""
        stream = self.connection.get_next_available_stream_id()
        head = {":method": "POST", ":path": "/v2/models/digits/infer", ":scheme": "http", ":authority": "e2e"}
        self.connection.send_headers(stream, [*head.items(), ("x-user-id", user)])
        self.connection.send_data(stream, b"{}", end_stream=True)
        self.writer.write(self.connection.data_to_send())
        return stream

    def reset(self, stream):
        """Gives a request up."""
        self.connection.reset_stream(stream, 8)  # CANCEL
        self.writer.write(self.connection.data_to_send())

    async def all(self, users):
        """One request of each at once; their answers' headers."""
        streams = [self.ask(user) for user in users]
        waiting = set(streams)
        while waiting:
            data = await self.reader.read(65536)
            assert data, "closed"
            for event in self.connection.receive_data(data):
                if isinstance(event, ResponseReceived):
                    self.answers[event.stream_id] = dict(event.headers)
                elif isinstance(event, DataReceived):
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    waiting.discard(event.stream_id)
            self.writer.write(self.connection.data_to_send())
        return [self.answers.pop(stream) for stream in streams]

    async def close(self):
        """Ends the connection."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def test_a_request_of_each_arm_is_told_whole(logged, a_model):
    async with logged(a_model("digits")) as log:
        for cohort in ("stable", "canary"):
            outcome = await log.infer(cohort)
            assert outcome == Outcome(
                assignment=assignment(cohort),
                hash=decision(USERS[cohort][0])[1],
                model="digits",
                arm=cohort,
                served=cohort,
                inference=True,
                failed_open=False,
                status=200,
                attempts=1,
                deadline=False,
                aborted=False,
                upstream_ms=outcome.upstream_ms,
                total_ms=outcome.total_ms,
                model_version=f"v-digits-{cohort}-0",
                predictions="7",
                prediction_count=1,
                request_id=outcome.request_id,
                ended_s=outcome.ended_s,
            )
            assert 0 < outcome.upstream_ms < outcome.total_ms
            assert (outcome.error, outcome.eligible, outcome.mismatched, outcome.fell_back) == ("", True, False, False)
        assert list(log.service.counts.envoys) == ["perch-edge"]


async def test_what_is_no_inference_is_told_apart(logged, a_model):
    async with logged(a_model("digits")) as log:
        wanted = {
            "/livez": ("", "", "", 200, 0),
            "/v2": ("", "", "stable", 200, 1),
            "/v2/models/digits/ready": ("digits", "", "stable", 200, 1),
            "/nothing/here": ("", "", "", 404, 0),
        }
        for path, told in wanted.items():
            got = await log.edge.get(path)
            one = await log.of(got.headers["x-request-id"])
            assert (one.model, one.arm, one.served, one.status, one.attempts) == told
            assert (one.assignment, one.inference, one.failed_open, one.eligible) == (None, False, False, False)


async def test_a_canary_that_hangs_is_an_error_at_the_deadline(logged, a_model):
    model = replace(a_model("digits"), deadline_s=0.5)
    async with logged(model) as log:
        log.edge.upstreams["digits-canary-0"].delay_s = 5.0
        outcome = await log.infer("canary")
        assert (outcome.status, outcome.deadline, outcome.error, outcome.aborted) == (504, True, "deadline", False)
        assert (outcome.arm, outcome.served, outcome.upstream_ms, outcome.eligible) == ("canary", "", None, True)
        assert outcome.total_ms >= 490  # Envoy counts a timer from its loop's last look at the clock, just before


async def test_a_canary_that_stalls_in_the_middle_of_its_answer_is_an_error_at_the_deadline(logged, a_model):
    model = replace(a_model("digits"), deadline_s=2.0)  # long enough for the answer to have begun
    async with logged(model) as log:
        await begin_answers(log.edge.upstreams["digits-canary-0"], asyncio.sleep(20.0))
        with pytest.raises(aiohttp.ClientPayloadError):
            await log.edge.infer(x_user_id=USERS["canary"][0])
        outcome = await log.last_seen_by("digits-canary-0")
        assert (outcome.status, outcome.error, outcome.served, outcome.upstream_ms) == (200, "deadline", "canary", None)


async def test_a_canary_that_breaks_off_its_answer_is_an_error_though_the_status_was_200(logged, patient_model):
    async with logged(patient_model) as log:
        await begin_answers(log.edge.upstreams["digits-canary-0"], asyncio.sleep(0.05))
        with pytest.raises(aiohttp.ClientPayloadError):
            await log.edge.infer(x_user_id=USERS["canary"][0])
        outcome = await log.last_seen_by("digits-canary-0")
        assert (outcome.status, outcome.error, outcome.served, outcome.upstream_ms) == (0, "no_answer", "canary", None)
        assert outcome.eligible


async def begin_answers(upstream, before_the_end):
    """From now on the server sends the first 3 of 100 bytes, waits, and closes the connection."""

    async def begin(request):
        if request.headers.get("user-agent", "").startswith("Envoy/HC"):
            return web.Response()
        await request.read()
        upstream.seen.append(request)
        response = web.StreamResponse(headers={"content-length": "100"})
        await response.prepare(request)
        await response.write(b"abc")
        await before_the_end
        request.transport.abort()
        return response

    await upstream.stop()
    upstream.answer = begin
    await upstream.start()


async def test_a_client_that_goes_away_is_nobodys_error(logged, patient_model):
    async with logged(patient_model) as log:
        canary = log.edge.upstreams["digits-canary-0"]
        canary.delay_s = 60.0
        request = asyncio.create_task(log.edge.infer(x_user_id=USERS["canary"][0]))
        await log.edge.until(lambda: canary.seen)
        request.cancel()
        closed = await log.last_seen_by("digits-canary-0")
        client = await H2Client.to(log.edge.port)
        stream = client.ask(USERS["canary"][0])
        await log.edge.until(lambda: len(canary.seen) == 2)
        client.reset(stream)
        reset = await log.last_seen_by("digits-canary-0")
        await client.close()
        for one in (closed, reset):
            assert (one.status, one.aborted, one.deadline, one.error, one.eligible) == (0, True, False, "", False)
            assert (one.assignment, one.arm, one.served) == (assignment("canary"), "canary", "")


async def test_a_client_that_stalls_its_upload_is_nobodys_deadline(logged, a_model):
    model = replace(a_model("digits"), deadline_s=0.5)

    def soon(files):
        assert files["rds.yaml"].count('idle_timeout: "5.5s"') == 2
        return files | {"rds.yaml": files["rds.yaml"].replace('idle_timeout: "5.5s"', 'idle_timeout: "0.7s"')}

    async with logged(model, soon) as log:
        reader, writer = await asyncio.open_connection("127.0.0.1", log.edge.port)
        head = f"POST /v2/models/digits/infer HTTP/1.1\r\nhost: e2e\r\nx-user-id: {USERS['canary'][0]}\r\n"
        writer.write(head.encode() + b"content-length: 10\r\n\r\nabc")
        assert b" 408 " in await reader.readline()
        await log.edge.until(lambda: log.outcomes)
        writer.close()
        (outcome,) = log.outcomes.values()
        assert (outcome.status, outcome.deadline, outcome.aborted, outcome.error) == (408, False, False, "")


async def test_a_bad_answer_is_the_arms_that_gave_it(logged, a_model):
    async with logged(a_model("digits")) as log:
        log.edge.upstreams["digits-canary-0"].status = 500
        outcome = await log.infer("canary")
        assert (outcome.status, outcome.error, outcome.served, outcome.attempts) == (500, "5xx", "canary", 1)


async def test_refused_connections_are_told_as_attempts_and_the_last_resort_as_a_fall_back(
    logged, a_model, never_check_again
):
    async with logged(a_model("digits"), never_check_again) as log:
        await log.edge.upstreams["digits-canary-0"].stop()
        fell_back = await log.infer("canary")
        assert (fell_back.status, fell_back.attempts, fell_back.error) == (200, 3, "")
        assert (fell_back.arm, fell_back.served, fell_back.fell_back, fell_back.mismatched) == (
            "canary",
            "stable",
            True,
            False,
        )
        assert fell_back.model_version == "v-digits-stable-0"
        await log.edge.upstreams["digits-stable-0"].stop()
        nobody = await log.infer("canary")
        assert (nobody.status, nobody.attempts, nobody.error) == (503, 3, "5xx")
        assert (nobody.arm, nobody.served, nobody.fell_back, nobody.upstream_ms) == ("canary", "", False, None)


async def test_a_canary_that_is_known_to_be_down_is_a_fall_back_in_one_attempt(logged, a_model):
    async with logged(a_model("digits")) as log:
        log.edge.upstreams["digits-canary-0"].ready = 503
        await log.edge.until(lambda: log.edge.gone("digits_canary"))
        outcome = await log.infer("canary")
        assert (outcome.arm, outcome.served, outcome.attempts, outcome.fell_back) == ("canary", "stable", 1, True)


async def test_without_perch_the_log_says_that_it_failed_open(logged, a_model):
    async with logged(a_model("digits")) as log:
        await log.edge.decider.stop()
        killed = await log.infer("canary")
        await log.edge.until(lambda: log.edge.gone("perch"))
        known = await log.infer("canary")
        for one in (killed, known):
            assert (one.failed_open, one.assignment, one.hash) == (True, None, None)
            assert (one.status, one.arm, one.served, one.inference) == (200, "stable", "stable", True)
            assert (one.eligible, one.mismatched) == (False, False)


async def test_a_reply_of_perch_that_says_nothing_is_a_failure_as_well(logged, a_model):
    async with logged(a_model("digits")) as log:
        log.edge.decider.reply = lambda _: b""
        assert (await log.infer("canary")).failed_open


async def test_the_version_that_clients_must_not_see_is_in_the_log(logged, a_model):
    async with logged(a_model("digits"), show_version=False, show_cohort=False) as log:
        assert {(await log.infer(cohort)).model_version for cohort in USERS} == {
            "v-digits-stable-0",
            "v-digits-canary-0",
        }


async def test_2000_requests_are_2000_entries_over_both_protocols(logged, a_model):
    """Two worker threads: two streams of one Envoy, and every request's hash, arm and id as the client knows them."""
    asked: dict[str, str] = {}
    users = [f"u{number}" for number in range(1000)]
    async with logged(a_model("digits"), concurrency=2) as log:

        async def over_http1(share):
            for user in share:
                got = await log.edge.infer(x_user_id=user)
                asked[got.headers["x-request-id"]] = user

        async def over_http2(share):
            client = await H2Client.to(log.edge.port)
            for start in range(0, len(share), 10):  # few at once: model, perch and log share this loop with the clients
                some = share[start : start + 10]
                for user, headers in zip(some, await client.all(some), strict=True):
                    asked[headers["x-request-id"]] = user
            await client.close()

        await asyncio.gather(
            *(over_http1(users[number::4]) for number in range(4)),
            *(over_http2(users[number::4]) for number in range(4)),
        )
        assert len(asked) == 2000
        await log.edge.until(lambda: len(log.outcomes) >= 2000)
        assert set(log.outcomes) == set(asked)
        assert Counter(one.status for one in log.outcomes.values()) == {200: 2000}
        for request_id, user in asked.items():
            choice, unit_hash = decision(user)
            one = log.outcomes[request_id]
            cohort = str(choice.cohort)
            assert (one.assignment, one.hash) == (assignment(cohort), unit_hash)
            assert (one.arm, one.served, one.model_version) == (cohort, cohort, f"v-digits-{cohort}-0")
        counts = log.service.counts
        assert counts.entries == counts.envoys["perch-edge"].entries == 2000
        assert counts.opened == counts.open == counts.envoys["perch-edge"].streams <= 2


async def test_envoys_pings_on_a_silent_stream_are_no_reason_to_end_it(logged, a_model):
    """By default gRPC closes a connection at the third ping without anything sent; a test of 30 must take its time."""

    def often(files):
        assert files["cds.yaml"].count('interval: "10s"') == 2
        assert ' timeout: "1s"' not in files["cds.yaml"]
        return files | {"cds.yaml": files["cds.yaml"].replace('interval: "10s"', 'interval: "0.05s"')}

    async with logged(a_model("digits"), often) as log:
        await log.infer("canary")
        await asyncio.sleep(30 * 0.05)
        await log.infer("stable")
        assert (log.service.counts.opened, log.service.counts.open) == (1, 1)
        (connections,) = (await log.edge.admin.counters(r"^cluster\.perch_als\.upstream_cx_total$")).values()
        assert connections == 1


async def test_envoy_comes_back_to_a_service_that_was_started_again(logged, a_model):
    async with logged(a_model("digits")) as log:
        await log.infer("canary")
        await log.service.stop(0)
        lost = await log.edge.infer(x_user_id=USERS["canary"][0])
        assert lost.status == 200
        await log.listen()

        async def is_read():
            got = await log.edge.infer(x_user_id=USERS["canary"][0])
            await asyncio.sleep(0.6)
            return got.headers["x-request-id"] in log.outcomes

        await log.edge.until(is_read)
        assert log.service.counts.envoys["perch-edge"].streams == 1

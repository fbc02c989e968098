"""Independent clients: grpcio over both transports, h2 and the command-line clients over the fast lane."""

import asyncio
import random
import shutil

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/"


@pytest.fixture
async def started(transport_class, tmp_path):
    """(channel, serving): a grpcio client's channel to the transport; `serving[0]` may be changed."""
    serving = [True]
    transport = transport_class(lambda message: b"re:" + message, lambda: serving[0])
    address = await transport.start(f"unix:{tmp_path}/p.sock")
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel, serving
    await transport.stop(0.2)


grpcio_client = pytest.mark.asyncio(loop_factories=["asyncio"])
"""grpc.aio brings its own poller; uvloop has its turn in the other tests."""


@grpcio_client
async def test_grpcio_gets_one_reply_for_each_message(started):
    call = started[0].stream_stream(PROCESS)()
    for number in range(20):
        message = b"%d" % number * number
        await call.write(message)
        assert await call.read() == b"re:" + message
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


@grpcio_client
async def test_grpcio_ends_an_empty_stream_with_ok(started):
    call = started[0].stream_stream(PROCESS)()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


@grpcio_client
async def test_grpcio_runs_many_streams_at_once_with_messages_of_all_sizes(started):
    sizes = [0, 1, 100, 16_379, 16_380, 16_384, 65_535, 200_000]
    chance = random.Random(1)

    async def one(size: int) -> None:
        message = chance.randbytes(size)
        call = started[0].stream_stream(PROCESS)(iter([message, message]))
        assert [reply async for reply in call] == [b"re:" + message] * 2

    await asyncio.gather(*(one(size) for size in sizes * 8))


@grpcio_client
async def test_grpcio_may_cancel_at_any_time(started):
    for _ in range(50):
        call = started[0].stream_stream(PROCESS)()
        await call.write(b"x")
        call.cancel()
    call = started[0].stream_stream(PROCESS)(iter([b"after"]))
    assert [reply async for reply in call] == [b"re:after"]


@grpcio_client
async def test_grpcio_gets_the_statuses_of_what_is_not_served(started):
    async def code_of(path: str, request: bytes = b"", **options) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await started[0].unary_unary(path)(request, **options)
        return error.value.code()

    assert await code_of("/no.such.Service/Method") == grpc.StatusCode.UNIMPLEMENTED
    assert await code_of(HEALTH + "Check", b"\x0a\x05other") == grpc.StatusCode.NOT_FOUND
    call = started[0].stream_stream(PROCESS)(iter([bytes(2_000_000)]))
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@grpcio_client
async def test_grpcio_checks_and_watches_health(started):
    channel, serving = started
    check = channel.unary_unary(HEALTH + "Check")
    for service in (b"", b"perch", b"envoy.service.ext_proc.v3.ExternalProcessor"):
        assert await check(b"\x0a" + bytes([len(service)]) + service if service else b"") == b"\x08\x01"
    watch = channel.unary_stream(HEALTH + "Watch")(b"")
    assert await watch.read() == b"\x08\x01"
    serving[0] = False
    assert await asyncio.wait_for(watch.read(), 60) == b"\x08\x02"
    assert await check(b"") == b"\x08\x02"
    watch.cancel()
    unknown = channel.unary_stream(HEALTH + "Watch")(b"\x0a\x05other")
    assert await unknown.read() == b"\x08\x03"
    unknown.cancel()


# h2


class H2Client:
    """The h2 library as a client, with whatever settings a test wants."""

    def __init__(self, reader, writer, settings: dict) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self.h2.initiate_connection()
        self.events: list = []

    async def exchange(self, until) -> list:
        """Sends what is pending and reads until an event is wanted; gives back windows by a few bytes at a time."""
        self.writer.write(self.h2.data_to_send())
        async with asyncio.timeout(60):
            while not any(until(event) for event in self.events):
                data = await self.reader.read(65_536)
                assert data, f"closed after {self.events}"
                for event in self.h2.receive_data(data):
                    self.events.append(event)
                    if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.writer.write(self.h2.data_to_send())
        events, self.events = self.events, []
        return events


GRPC = [(":method", "POST"), (":scheme", "http"), (":path", PROCESS), (":authority", "x"), ("te", "trailers"),
        ("content-type", "application/grpc")]  # fmt: skip


@pytest.fixture
async def h2_client(serve):
    opened = []

    async def start(answer=lambda message: b"re:" + message, **settings) -> H2Client:
        served = await serve(answer)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.address.rpartition(":")[2]))
        opened.append(writer)
        codes = {getattr(h2.settings.SettingCodes, name.upper()): value for name, value in settings.items()}
        return H2Client(reader, writer, codes)

    yield start
    for writer in opened:
        writer.close()
        await writer.wait_closed()


def grpc_message(payload: bytes) -> bytes:
    return b"\0" + len(payload).to_bytes(4, "big") + payload


async def test_h2_speaks_and_ends_in_both_ways_with_its_dynamic_table(h2_client):
    client = await h2_client()
    for number in range(1, 60, 2):  # the first requests use the table, later ones must do without
        client.h2.send_headers(number, GRPC)
        client.h2.send_data(number, grpc_message(b"m%d" % number))
        data = await client.exchange(lambda event: isinstance(event, h2.events.DataReceived))
        assert [e.data for e in data if isinstance(e, h2.events.DataReceived)] == [grpc_message(b"re:m%d" % number)]
        if number % 4 == 1:
            client.h2.reset_stream(number)
            continue
        client.h2.end_stream(number)
        events = await client.exchange(lambda event: isinstance(event, h2.events.StreamEnded))
        (trailers,) = [event for event in events if isinstance(event, h2.events.TrailersReceived)]
        assert ("grpc-status", "0") in [tuple(header) for header in trailers.headers]


@pytest.mark.parametrize("window", [1, 7, 100])
async def test_h2_with_a_tiny_window_gets_the_whole_reply(window, h2_client):
    reply = bytes(range(256)) * 2
    client = await h2_client(lambda _message: reply, initial_window_size=window)
    client.h2.send_headers(1, GRPC)
    client.h2.send_data(1, grpc_message(b"x"), end_stream=True)
    events = await client.exchange(lambda event: isinstance(event, h2.events.StreamEnded))
    pieces = [event.data for event in events if isinstance(event, h2.events.DataReceived)]
    assert b"".join(pieces) == grpc_message(reply)
    assert max(map(len, pieces)) <= window


async def test_h2_changes_its_window_in_the_middle(h2_client):
    client = await h2_client(lambda _message: bytes(1000), initial_window_size=0)
    client.h2.send_headers(1, GRPC)
    client.h2.send_data(1, grpc_message(b"x"), end_stream=True)
    await client.exchange(lambda event: isinstance(event, h2.events.ResponseReceived))
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 50_000})
    events = await client.exchange(lambda event: isinstance(event, h2.events.StreamEnded))
    assert sum(len(event.data) for event in events if isinstance(event, h2.events.DataReceived)) == 1005


async def test_h2_sends_a_message_in_many_padded_frames(h2_client):
    client = await h2_client()
    message = bytes(range(200))
    client.h2.send_headers(1, GRPC, priority_weight=16, priority_depends_on=0)
    for byte in grpc_message(message):
        client.h2.send_data(1, bytes([byte]), pad_length=3)
    client.h2.end_stream(1)
    events = await client.exchange(lambda event: isinstance(event, h2.events.StreamEnded))
    pieces = [event.data for event in events if isinstance(event, h2.events.DataReceived)]
    assert b"".join(pieces) == grpc_message(b"re:" + message)


async def test_h2_sends_a_body_of_ten_megabytes_within_our_windows(h2_client):
    client = await h2_client()
    client.h2.send_headers(1, [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "x")])
    left = 10_000_000
    while left:
        room = min(left, client.h2.local_flow_control_window(1), client.h2.max_outbound_frame_size)
        if not room:
            await client.exchange(lambda event: isinstance(event, h2.events.WindowUpdated))
            continue
        client.h2.send_data(1, bytes(room))
        left -= room
    client.h2.end_stream(1)
    events = await client.exchange(lambda event: isinstance(event, h2.events.StreamEnded))
    (response,) = [event for event in events if isinstance(event, h2.events.ResponseReceived)]
    assert (":status", "415") in [tuple(header) for header in response.headers]


# Command-line clients


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode(errors="replace")


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not on PATH (Debian: nghttp2-client)")
async def test_h2load_gets_2000_grpc_answers_without_an_error(serve, tmp_path):
    served = await serve()
    body = tmp_path / "message"
    body.write_bytes(grpc_message(b"hello"))
    output = await run(
        "h2load", "-n2000", "-c4", "-m50", f"--data={body}", "-Hcontent-type: application/grpc", "-Hte: trailers",
        f"http://{served.address}{PROCESS}",
    )  # fmt: skip
    assert "2000 succeeded, 0 failed, 0 errored, 0 timeout" in output
    assert "2000 2xx" in output
    assert served.seen == [b"hello"] * 2000


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
async def test_curl_gets_a_proper_http_answer(serve):
    served = await serve()
    output = await run(
        "curl", "--silent", "--show-error", "--http2-prior-knowledge", "--write-out", "%{http_version} %{http_code}",
        "--data", "x" * 100_000, f"http://{served.address}/",
    )  # fmt: skip
    assert output.startswith("perch speaks gRPC only")
    assert output.endswith("2 415")

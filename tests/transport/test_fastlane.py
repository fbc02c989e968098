"""The fast lane on real sockets and both event loops: slow readers, endings, the health watch, the socket file."""

import asyncio
import socket
import stat

import pytest

from extproc.transport import fastlane
from extproc.transport.errors import ErrorCode, ListenError
from extproc.transport.fastlane import FastLane
from extproc.transport.limits import Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WATCH = "/grpc.health.v1.Health/Watch"


@pytest.fixture(autouse=True)
def lingering(monkeypatch):
    """A peer's last bytes are waited for as long as this process, which is both ends, may stand still."""
    monkeypatch.setattr(fastlane, "LINGER_S", 60.0)


async def greeted(connect, served, **options):
    client = await connect(served.address, **options)
    client.send(PREFACE, client.wire.settings(), client.wire.settings(flags=1))
    return client


def hello(wire, number: int = 1, *, end: bool = False) -> bytes:
    return wire.headers(number, wire.grpc_fields()) + wire.message(number, b"hello", end=end)


async def wait_for(condition, what: str, deadline_s: float = 60.0) -> None:
    """Lets the loop run until the condition holds."""
    try:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110  the condition is the server's, which has no event for tests
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"still not: {what}")


async def test_a_request_is_answered_over_tcp_and_over_a_unix_socket(serve, connect, tmp_path):
    for listen in ("127.0.0.1:0", f"unix:{tmp_path}/p.sock"):
        served = await serve(listen=listen)
        client = await greeted(connect, served)
        client.send(hello(client.wire, end=True))
        got = await client.read_until(lambda frame: frame.kind == "HEADERS" and frame.ends)
        assert [f.payload[5:] for f in got if f.kind == "DATA"] == [b"re:hello"]
        assert served.seen == [b"hello"]


async def test_the_replies_to_one_read_are_one_write(serve, connect):
    served = await serve()
    client = await greeted(connect, served)
    await client.read_until(lambda frame: frame.kind == "SETTINGS" and frame.flags == 1)
    (link,) = served.lane._links
    written = []
    transport = link._transport

    class Spy:
        is_closing = transport.is_closing

        def write(self, data):
            written.append(data)
            transport.write(data)

    link._transport = Spy()
    client.send(*(hello(client.wire, number, end=True) for number in range(1, 41, 2)))
    await client.read_until(lambda frame: frame.stream_id == 39 and frame.kind == "HEADERS" and frame.ends)
    link._transport = transport
    assert len(written) == 1


async def test_a_connection_error_is_read_by_the_peer_before_the_connection_ends(serve, connect):
    client = await greeted(connect, await serve())
    client.send(client.wire.data(1, b"idle stream"), *[client.wire.frame("DATA", 0, 1, bytes(16_000))] * 500)
    got = await client.read_to_end()
    assert (got[-1].kind, got[-1].code) == ("GOAWAY", ErrorCode.PROTOCOL_ERROR)


async def test_no_preface_but_rubbish_ends_the_connection(serve, connect):
    served = await serve()
    client = await connect(served.address)
    client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await client.read_to_end())[-1].kind == "GOAWAY"
    client.writer.close()
    await wait_for(lambda: served.lane.connections == 0, "the connection is forgotten")


async def test_a_peer_that_does_not_read_is_not_read_from_and_loses_nothing(serve, connect):
    """16 MB of replies to a peer that sleeps and sends: the server holds little, and then sends them all."""
    served = await serve(lambda _message: bytes(16_000), limits=Limits(write_buffer_bytes=100_000))
    client = await greeted(connect, served, receive_buffer=16_384)
    wire = client.wire
    client.send(wire.settings((4, 2**31 - 1)), wire.window_update(0, 2**30), wire.headers(1, wire.grpc_fields()))
    client.send(*[wire.message(1, b"x")] * 1000)
    (link,) = await _links(served, 1)
    await wait_for(lambda: link._paused_since_s is not None, "the server pauses")
    client.send(*[wire.frame(0xFF, 0, 0, bytes(16_000))] * 500)
    for _ in range(100):
        await asyncio.sleep(0.002)
        assert len(link._backlog) < 1_000_000
    client.send(wire.data(1, b"", end=True))
    got = await client.read_until(lambda frame: frame.kind == "HEADERS" and frame.ends)
    assert sum(len(f.payload) for f in got if f.kind == "DATA") == 1000 * 16_005


async def test_of_a_large_read_only_a_slice_is_answered_while_the_peer_does_not_read(serve, connect):
    served = await serve(lambda message: message * 1000, limits=Limits(write_buffer_bytes=100_000))
    client = await greeted(connect, served, receive_buffer=16_384)
    wire = client.wire
    client.send(wire.settings((4, 2**31 - 1)), wire.window_update(0, 2**30), wire.headers(1, wire.grpc_fields()))
    await client.read_until(lambda frame: frame.kind == "SETTINGS" and frame.payload == b"\0\1\0\0\0\0")
    (link,) = await _links(served, 1)
    link.data_received(b"".join(wire.message(1, b"%04d" % number) for number in range(5_000)))  # 20 MB of replies
    assert link._transport.get_write_buffer_size() < 8_500_000
    assert len(link._backlog) > 50_000
    got = await client.read_until(lambda frame: frame.payload.endswith(b"4999"))
    assert [int(f.payload[-4:]) for f in got if f.kind == "DATA"] == list(range(5_000))


async def test_a_peer_that_never_reads_is_cut_off(serve, connect):
    served = await serve(lambda _message: bytes(16_000), limits=Limits(write_buffer_bytes=50_000, stalled_s=25))
    client = await greeted(connect, served, receive_buffer=16_384)
    wire = client.wire
    client.send(wire.settings((4, 2**31 - 1)), wire.window_update(0, 2**30), wire.headers(1, wire.grpc_fields()))
    client.send(*[wire.message(1, b"x")] * 3000)
    (link,) = await _links(served, 1)
    await wait_for(lambda: link._paused_since_s is not None, "the server pauses")
    link.tick(link._paused_since_s + 24.9, 1.0)
    assert served.lane.connections == 1
    link.tick(link._paused_since_s + 25.0, 1.0)
    await wait_for(lambda: served.lane.connections == 0, "the connection is ended")


async def _links(served, count: int):
    await wait_for(lambda: served.lane.connections == count, f"{count} connections")
    return served.lane._links


async def test_a_watcher_hears_of_each_change_soon(serve, connect):
    served = await serve()
    client = await greeted(connect, served)
    wire = client.wire
    client.send(wire.headers(1, wire.grpc_fields(WATCH)), wire.message(1, b"", end=True))
    for reply, serving in ((b"\x08\x01", False), (b"\x08\x02", True), (b"\x08\x01", False)):
        got = await client.read_until(lambda frame: frame.kind == "DATA")
        assert [f.payload[5:] for f in got if f.kind == "DATA"] == [reply]
        served.serving = serving


async def test_health_is_looked_at_only_while_somebody_watches(connect):
    looked = []
    lane = FastLane(lambda message: message, lambda: bool(looked.append(1)) or True)
    client = await connect(await lane.start("127.0.0.1:0"))
    wire = client.wire
    try:
        client.send(PREFACE, wire.settings(), wire.settings(flags=1), hello(wire))
        await client.read_until(lambda frame: frame.kind == "DATA")
        assert not looked
        assert lane._watch_timer is None
        client.send(wire.headers(3, wire.grpc_fields(WATCH)), wire.message(3, b"", end=True))
        await wait_for(lambda: len(looked) >= 3, "looked again and again")
        client.send(wire.rst(3))
        await wait_for(lambda: lane._watch_timer is None, "no longer looked")
    finally:
        await lane.stop(0.1)  # or else uvloop waits for it for ever, and so does the run for a test that failed


async def test_stop_lets_open_requests_finish_and_then_closes(serve, connect):
    served = await serve()
    client = await greeted(connect, served)
    wire = client.wire
    client.send(wire.headers(1, wire.grpc_fields()))
    await client.read_until(lambda frame: frame.kind == "SETTINGS" and frame.payload)
    await _links(served, 1)
    stopping = asyncio.create_task(served.lane.stop(60))
    got = await client.read_until(lambda frame: frame.kind == "PING")
    assert [f.kind for f in got if f.kind == "GOAWAY"] == ["GOAWAY"]
    client.send(wire.frame("PING", 1, 0, got[-1].payload), hello(wire, 3), wire.message(1, b"late", end=True))
    got = await client.read_until(lambda frame: frame.stream_id == 1 and frame.kind == "HEADERS" and frame.ends)
    assert not stopping.done()
    assert [f.code for f in got if f.kind == "RST_STREAM"] == [ErrorCode.REFUSED_STREAM]
    await client.reader.read(-1)
    client.writer.close()
    await asyncio.wait_for(stopping, 60)


async def test_stop_does_not_wait_longer_than_its_grace(serve, connect):
    served = await serve()
    client = await greeted(connect, served)
    client.send(client.wire.headers(1, client.wire.grpc_fields()))
    await _links(served, 1)
    await asyncio.wait_for(served.lane.stop(0.05), 8)
    await wait_for(lambda: served.lane.connections == 0, "aborted")


async def test_while_stopping_the_health_check_says_not_serving(serve, connect):
    served = await serve()
    client = await greeted(connect, served)
    wire = client.wire
    client.send(wire.headers(1, wire.grpc_fields()))
    await client.read_until(lambda frame: frame.kind == "SETTINGS" and frame.payload)
    await _links(served, 1)
    stopping = asyncio.create_task(served.lane.stop(60))
    await client.read_until(lambda frame: frame.kind == "GOAWAY")
    client.send(wire.headers(3, wire.grpc_fields("/grpc.health.v1.Health/Check")), wire.message(3, b"", end=True))
    got = await client.read_until(lambda frame: frame.kind == "DATA")
    assert got[-1].payload[5:] == b"\x08\x02" or b"\x08\x02" in [f.payload[5:] for f in got]
    client.writer.close()
    await asyncio.wait_for(stopping, 60)


async def test_stop_takes_the_socket_file_away_and_start_works_again(tmp_path):
    lane = FastLane(lambda message: message, lambda: True)
    for _ in range(2):
        address = await lane.start(f"unix:{tmp_path}/run/p.sock")
        assert stat.S_IMODE((tmp_path / "run/p.sock").stat().st_mode) == 0o700
        await lane.stop(0.1)
        assert not (tmp_path / "run/p.sock").exists()
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
            late.connect(address.removeprefix("unix:"))


async def test_an_address_that_is_taken_is_a_clear_error(serve, tmp_path):
    served = await serve(listen=f"unix:{tmp_path}/p.sock")
    with pytest.raises(ListenError, match="another process serves there"):
        await FastLane(lambda message: message, lambda: True).start(served.address)


async def test_a_peer_that_vanishes_in_the_middle_of_anything_leaves_nothing(serve, connect):
    served = await serve()
    for piece in (b"PRI", PREFACE, PREFACE + b"\0\0", None):
        client = await connect(served.address)
        client.send(piece if piece is not None else PREFACE + client.wire.settings() + hello(client.wire)[:-3])
        await client.writer.drain()
        client.writer.transport.abort()
    await wait_for(lambda: served.lane.connections == 0, "all connections are forgotten")


async def test_a_read_larger_than_a_slice_is_answered_in_order(serve, connect):
    served = await serve(lambda message: message)
    client = await greeted(connect, served)
    wire = client.wire
    client.send(wire.settings((4, 2**31 - 1)), wire.window_update(0, 2**30))
    await client.read_until(lambda frame: frame.kind == "SETTINGS" and frame.flags == 1)
    (link,) = await _links(served, 1)
    body = [wire.message(1, b"%06d" % number) for number in range(20_000)]
    link.data_received(wire.headers(1, wire.grpc_fields()) + b"".join(body))
    got = await client.read_until(lambda frame: frame.kind == "DATA" and frame.payload.endswith(b"019999"))
    assert [int(f.payload[5:]) for f in got if f.kind == "DATA"] == list(range(20_000))

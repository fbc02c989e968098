"""The grpc.aio transport around the answer: streams, health, the socket, the end. A real gRPC client asks."""

import asyncio
import contextlib
import os
import socket
import stat

import grpc
import pytest

from extproc.core.exposure import parse_exposures
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.transport.grpcio import GrpcioTransport, free_socket
from extproc.wire.answer import Answerer, Published
from extproc.wire.replies import OTHER_PHASES, replies

MODELS = {"digits": "/v2/models/digits/"}
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
DEADLINE_S = 30


@pytest.fixture
def answer():
    """Answers by one flag that serves canary to everybody."""
    flags = parse(read_document(b"version: 1\nflags: {digits: {canary: 100}}\n"), MODELS).flags
    ruleset = compile_ruleset(flags, parse_exposures({"seq": 0, "flags": {}}), MODELS, version="v.0")
    return Answerer(Published(ruleset, replies(ruleset.choices, "v.0"), OTHER_PHASES))


class Serving:
    """A transport that listens; `up` is what its health says."""

    def __init__(self, answer, path):
        self.up = True
        self.path = path
        self.transport = GrpcioTransport(answer, lambda: self.up)


@pytest.fixture
async def serving(answer, tmp_path):
    made = Serving(answer, tmp_path / "s")
    assert await made.transport.start(f"unix:{made.path}") == f"unix:{made.path}"
    yield made
    await made.transport.stop(0)


@pytest.fixture
async def channel(serving):
    async with grpc.aio.insecure_channel(f"unix:{serving.path}") as opened:
        yield opened


async def gone(path) -> None:
    """Waits until nothing is at the path."""
    async with asyncio.timeout(DEADLINE_S):
        while path.exists():  # noqa: ASYNC110  the kernel has no event for this
            await asyncio.sleep(0.01)


def named(service: str) -> bytes:
    return b"\x0a" + bytes([len(service)]) + service.encode() if service else b""


async def test_each_message_of_a_stream_gets_one_reply_in_order(channel, service):
    call = channel.stream_stream(PROCESS)()
    good = service.request_bytes([(b"x-user-id", b"alice")])
    for message, what in ((good, ("canary", "SPLIT")), (b"\xff", ("stable", "ERROR")), (good, ("canary", "SPLIT"))):
        await call.write(message)
        assert service.decode(await call.read()).what == what
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_client_that_hangs_up_in_the_middle_leaves_a_server_that_answers(channel, service):
    message = service.request_bytes([(b"x-user-id", b"alice")])
    for _ in range(20):
        call = channel.stream_stream(PROCESS)()
        await call.write(message)
        call.cancel()
    call = channel.stream_stream(PROCESS)(iter([message]))
    assert service.decode(await call.read()).what == ("canary", "SPLIT")


async def test_two_hundred_streams_at_once_are_all_answered(channel, service):
    async def ask(i: int) -> str:
        call = channel.stream_stream(PROCESS)(iter([service.request_bytes([(b"x-user-id", b"u%d" % i)])]))
        return service.decode(await call.read()).cohort

    assert set(await asyncio.gather(*map(ask, range(200)))) == {"canary"}


@pytest.mark.parametrize("name", ["", "envoy.service.ext_proc.v3.ExternalProcessor", "perch"])
async def test_health_says_what_the_server_says_of_itself(serving, channel, name):
    check = channel.unary_unary(CHECK)
    assert await check(named(name)) == b"\x08\x01"
    serving.up = False
    assert await check(named(name)) == b"\x08\x02"
    serving.up = True
    assert await check(named(name)) == b"\x08\x01"


@pytest.mark.parametrize("request_bytes", [named("nobody"), b"\xff\xff", b"\x0a\x05ab", b"\x0a\xff\x01" + b"x" * 255])
async def test_the_health_of_a_service_that_is_not_there_is_not_found(channel, request_bytes):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary(CHECK)(request_bytes)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_health_watch_tells_the_state_and_each_change_of_it(serving, channel):
    watch = channel.unary_stream(WATCH)(named(""))
    async with asyncio.timeout(DEADLINE_S):
        assert await watch.read() == b"\x08\x01"
        serving.up = False
        assert await watch.read() == b"\x08\x02"
        serving.up = True
        assert await watch.read() == b"\x08\x01"
    watch.cancel()


async def test_a_health_watch_of_a_service_that_is_not_there_says_so_and_stays_open(channel):
    watch = channel.unary_stream(WATCH)(named("nobody"))
    async with asyncio.timeout(DEADLINE_S):
        assert await watch.read() == b"\x08\x03"
    assert not watch.done()
    watch.cancel()


async def test_a_call_of_something_else_is_unimplemented_and_harmless(channel, service):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary("/grpc.reflection.v1.ServerReflection/X")(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    call = channel.stream_stream(PROCESS)(iter([service.request_bytes()]))
    assert service.decode(await call.read()).what == ("canary", "NO_UNIT")


# The socket.


async def test_nobody_but_the_owner_may_connect(serving):
    assert stat.S_IMODE(serving.path.stat().st_mode) & 0o077 == 0
    mask = os.umask(0)
    os.umask(mask)
    assert mask != 0o077  # the process's own mask is as it was


async def test_a_stale_socket_is_replaced_and_a_used_one_is_named(answer, serving, channel, service, tmp_path):
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    second = GrpcioTransport(answer, lambda: True)
    await second.start(f"unix:{stale}")
    await second.stop(0)
    assert not stale.exists()
    third = GrpcioTransport(answer, lambda: True)
    with pytest.raises(OSError, match=str(serving.path)):
        await third.start(f"unix:{serving.path}")
    await third.stop(0)
    call = channel.stream_stream(PROCESS)(iter([service.request_bytes()]))
    assert service.decode(await call.read()).what == ("canary", "NO_UNIT")
    async with grpc.aio.insecure_channel(f"unix:{serving.path}") as fresh:
        assert await fresh.unary_unary(CHECK)(b"") == b"\x08\x01"


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.mkdir()], ids=["file", "folder"])
async def test_what_is_no_socket_is_never_removed(tmp_path, make):
    path = tmp_path / "precious"
    make(path)
    with pytest.raises(OSError, match=str(path)):
        free_socket(path)
    assert path.exists()


def test_a_socket_that_its_owner_removes_meanwhile_is_in_nobodys_way(tmp_path, monkeypatch):
    path = tmp_path / "draining"
    connect = socket.socket.connect

    def too_late(probe, address):
        path.unlink()
        connect(probe, address)

    with socket.create_server(str(path), family=socket.AF_UNIX):
        monkeypatch.setattr(socket.socket, "connect", too_late)
        free_socket(path)


async def test_a_folder_for_the_socket_is_made_for_the_owner_alone(answer, tmp_path):
    path = tmp_path / "run" / "perch" / "s"
    transport = GrpcioTransport(answer, lambda: True)
    await transport.start(f"unix:{path}")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await transport.stop(0)


async def test_port_zero_becomes_a_port_and_a_taken_port_is_named(answer):
    transport = GrpcioTransport(answer, lambda: True)
    address = await transport.start("127.0.0.1:0")
    assert int(address.rpartition(":")[2]) > 0
    async with grpc.aio.insecure_channel(address) as opened:
        assert await opened.unary_unary(CHECK)(b"") == b"\x08\x01"
    second = GrpcioTransport(answer, lambda: True)
    with pytest.raises(OSError, match=address):
        await second.start(address)
    await second.stop(0)
    await transport.stop(0)


# The end.


async def test_stopping_answers_what_is_under_way_and_takes_nothing_new(serving, channel, service):
    message = service.request_bytes([(b"x-user-id", b"alice")])
    call = channel.stream_stream(PROCESS)()
    await call.write(message)
    await call.read()
    stopping = asyncio.ensure_future(serving.transport.stop(DEADLINE_S))
    await gone(serving.path)
    await call.write(message)
    assert service.decode(await call.read()).what == ("canary", "SPLIT")
    assert not stopping.done()
    async with grpc.aio.insecure_channel(f"unix:{serving.path}") as late:
        with pytest.raises(grpc.aio.AioRpcError):
            await late.unary_unary(CHECK)(b"", timeout=5)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    async with asyncio.timeout(DEADLINE_S):
        await stopping


async def test_stopping_does_not_wait_for_ever_for_a_stream_that_never_ends(serving, channel, service):
    call = channel.stream_stream(PROCESS)()
    await call.write(service.request_bytes())
    await call.read()
    watch = channel.unary_stream(WATCH)(b"")
    await watch.read()
    async with asyncio.timeout(DEADLINE_S):
        await serving.transport.stop(0.2)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        assert await call.read() is grpc.aio.EOF
    assert not serving.path.exists()


async def test_a_watch_ends_when_the_server_stops(serving, channel):
    watch = channel.unary_stream(WATCH)(b"")
    assert await watch.read() == b"\x08\x01"
    async with asyncio.timeout(DEADLINE_S):
        await serving.transport.stop(DEADLINE_S / 2)
        assert await watch.read() in {b"\x08\x02", grpc.aio.EOF}
    watch.cancel()


async def test_an_old_server_that_still_drains_does_not_remove_the_socket_of_the_new_one(
    answer, serving, channel, service
):
    call = channel.stream_stream(PROCESS)()
    await call.write(service.request_bytes())
    await call.read()
    stopping = asyncio.ensure_future(serving.transport.stop(DEADLINE_S))
    await gone(serving.path)
    new = GrpcioTransport(answer, lambda: True)
    await new.start(f"unix:{serving.path}")
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await stopping
    assert serving.path.is_socket()
    async with grpc.aio.insecure_channel(f"unix:{serving.path}") as fresh:
        assert await fresh.unary_unary(CHECK)(b"") == b"\x08\x01"
    await new.stop(0)

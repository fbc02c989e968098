"""The access log service, asked by gRPC clients that behave like Envoys, and by some that do not."""

import asyncio
import contextlib
import itertools
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from extproc.accesslog import LARGEST_MESSAGE_BYTES, MOST_ENVOYS, SERVICE, SLICE, AccessLogService, StreamInfo
from extproc.wire.accesslog_pb2 import (
    AccessLogCommon,
    HTTPAccessLogEntry,
    HTTPResponseProperties,
    Interval,
    Node,
    StreamAccessLogsMessage,
)

DEADLINE_S = 30.0


def message(*ids, node=None):
    """One serialized message with an entry per request id."""
    entries = [
        HTTPAccessLogEntry(
            common_properties=AccessLogCommon(
                start_time=Interval(seconds=[1]),
                stream_id=[one.encode()],
                route_name=[b"digits.stable"],
                access_log_type=[6],
            ),
            response=HTTPResponseProperties(response_code=[b"\x08\xc8\x01"]),
        ).SerializeToString()
        for one in ids
    ]
    made = StreamAccessLogsMessage(http_logs=StreamAccessLogsMessage.HTTPAccessLogEntries(log_entry=entries))
    if node is not None:
        named = StreamAccessLogsMessage.Identifier(node=Node(id=node.encode()), log_name=b"perch")
        made.identifier.CopyFrom(named)
    return made.SerializeToString()


UNFINISHED = HTTPAccessLogEntry(common_properties=AccessLogCommon(access_log_type=[5])).SerializeToString()
INTERMEDIATE = StreamAccessLogsMessage(
    http_logs=StreamAccessLogsMessage.HTTPAccessLogEntries(log_entry=[UNFINISHED])
).SerializeToString()


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  what is waited for is the service's and signals nothing
            await asyncio.sleep(0.005)


class Envoy:
    """A client on a connection of its own."""

    def __init__(self, address):
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(address, options)

    def stream(self):
        """A new stream; `write` sends a message."""
        return self.channel.stream_unary(f"/{SERVICE}/StreamAccessLogs")()

    async def send(self, *messages):
        """A stream with these messages, ended by us."""
        stream = self.stream()
        for one in messages:
            await stream.write(one)
        await stream.done_writing()
        assert await stream == b""


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="perch-"))  # pytest's own folders are too long for a socket
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def log(folder):
    """A running service: what it took, its counts, its clock, and clients for it."""
    got = SimpleNamespace(now_s=100.0, batches=[], envoys=[])
    got.service = AccessLogService(lambda batch, stream: got.batches.append((batch, stream)), lambda: got.now_s)
    got.counts = got.service.counts
    got.path = folder / "als.sock"
    got.address = await got.service.start(f"unix:{got.path}")
    got.ids = lambda: [one.request_id for batch, _ in got.batches for one in batch.outcomes]

    def envoy():
        got.envoys.append(Envoy(got.address))
        return got.envoys[-1]

    got.envoy = envoy
    yield got
    for one in got.envoys:
        await one.channel.close()
    await got.service.stop(0)


async def test_every_entry_is_taken_once_in_its_order_with_the_stream_it_came_on(log):
    await log.envoy().send(message("a", "b", node="edge-1"), message("c"), message("d", "e"))
    assert log.ids() == ["a", "b", "c", "d", "e"]
    assert {stream for _, stream in log.batches} == {StreamInfo(1, "edge-1", "perch")}
    assert (log.counts.opened, log.counts.open, log.counts.messages, log.counts.entries) == (1, 0, 3, 5)
    assert (log.counts.unreadable, log.counts.unreadable_messages) == (0, 0)


async def test_an_envoy_has_a_stream_per_worker_thread_and_several_envoys_are_told_apart(log):
    envoy, other = log.envoy(), log.envoy()
    streams = [envoy.stream(), envoy.stream(), other.stream()]
    for one, node in zip(streams, ("edge-1", "edge-1", "edge-2"), strict=True):
        await one.write(message("a", node=node))
    await until(lambda: len(log.batches) == 3)
    log.now_s = 107.0
    await streams[0].write(message("b", "c"))
    await until(lambda: len(log.batches) == 4)
    seen = log.counts.envoys
    assert {node: (one.streams, one.entries, one.last_s) for node, one in seen.items()} == {
        "edge-1": (2, 4, 107.0),
        "edge-2": (1, 1, 100.0),
    }
    assert (log.counts.open, log.counts.opened) == (3, 3)
    assert {stream.number for _, stream in log.batches} == {1, 2, 3}
    for one in streams:
        await one.done_writing()
        await one
    assert {one.streams for one in seen.values()} == {0}


async def test_an_envoy_that_comes_again_is_the_same_envoy(log):
    for _ in range(3):
        await log.envoy().send(message("a", node="edge-1"))
    assert list(log.counts.envoys) == ["edge-1"]
    assert log.counts.envoys["edge-1"].entries == 3
    assert [stream.number for _, stream in log.batches] == [1, 2, 3]


async def test_a_stream_that_names_no_envoy_is_read_all_the_same(log):
    await log.envoy().send(message("a"), message("b"))
    assert [stream for _, stream in log.batches] == [StreamInfo(1, "", "")] * 2
    await log.envoy().send(message("c"), message("d", node="late"), message("e"))
    assert [stream.node for _, stream in log.batches[2:]] == ["", "late", "late"]
    assert {node: (one.streams, one.entries) for node, one in log.counts.envoys.items()} == {"": (0, 3), "late": (0, 2)}


async def test_a_message_that_cannot_be_read_is_counted_and_the_next_one_taken(log):
    await log.envoy().send(b"\x0a\xff", message("a", node="edge-1"), b"nonsense", message("b"), INTERMEDIATE)
    assert log.ids() == ["a", "b"]
    assert (log.counts.messages, log.counts.unreadable_messages, log.counts.unreadable) == (5, 2, 1)
    assert log.counts.envoys["edge-1"].streams == 0


async def test_a_message_too_large_ends_its_stream_alone(log):
    envoy, other = log.envoy(), log.envoy().stream()
    await other.write(message("a", node="edge-2"))
    stream = envoy.stream()
    await stream.write(message("b", node="edge-1"))
    await until(lambda: len(log.batches) == 2)
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stream.write(bytes(LARGEST_MESSAGE_BYTES + 1))
    assert await stream.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await other.write(message("c"))
    await until(lambda: len(log.batches) == 3)
    await until(lambda: log.counts.open == 1)
    assert log.counts.envoys["edge-1"].streams == 0


async def test_a_connection_that_is_lost_ends_its_streams(log):
    envoy = log.envoy()
    streams = [envoy.stream(), envoy.stream()]
    for one in streams:
        await one.write(message("a", node="edge-1"))
    await until(lambda: len(log.batches) == 2)
    await envoy.channel.close()
    await until(lambda: log.counts.open == 0)
    assert log.counts.envoys["edge-1"].streams == 0


async def test_a_huge_message_leaves_the_loop_to_others_again_and_again(log):
    turns, at = [0], []

    async def others():
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    log.service._take = lambda batch, _: at.append((turns[0], len(batch.outcomes)))
    others_turn = asyncio.create_task(others())
    await log.envoy().send(message(*(str(number) for number in range(10 * SLICE + 7)), node="edge-1"))
    others_turn.cancel()
    assert [size for _, size in at] == [SLICE] * 10 + [7]
    assert all(later > earlier for (earlier, _), (later, _) in itertools.pairwise(at))
    assert (log.counts.messages, log.counts.entries) == (1, 10 * SLICE + 7)


async def test_what_take_raises_ends_the_stream_and_not_the_service(log):
    def refuse(_batch, _stream):
        raise RuntimeError("a mistake of ours")

    take, log.service._take = log.service._take, refuse
    with pytest.raises(grpc.aio.AioRpcError):
        await log.envoy().send(message("a", node="edge-1"))
    log.service._take = take
    await log.envoy().send(message("b", node="edge-1"))
    assert log.ids() == ["b"]
    assert (log.counts.open, log.counts.opened) == (0, 2)


async def test_the_envoys_that_are_remembered_are_bounded(log):
    silent = log.envoy().stream()
    await silent.write(message("a", node="silent but here"))
    await until(lambda: log.batches)
    for number in range(MOST_ENVOYS + 20):
        log.now_s += 1
        await log.envoy().send(message("a", node=f"edge-{number}"))
    envoys = log.counts.envoys
    assert len(envoys) == MOST_ENVOYS
    assert {"silent but here", f"edge-{MOST_ENVOYS + 19}"} <= set(envoys)
    assert "edge-0" not in envoys


async def test_other_services_and_methods_are_not_there(log):
    envoy = log.envoy()
    for name in (f"/{SERVICE}/Other", "/grpc.health.v1.Health/Check", "/envoy.service.ext_proc.v3.ExternalProcessor/x"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await envoy.channel.unary_unary(name)(b"")
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_the_socket_is_the_owners_alone_and_goes_with_the_service(folder):
    service = AccessLogService(lambda *_: None, lambda: 0.0)
    path = folder / "new" / "als.sock"
    assert await service.start(f"unix:{path}") == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await service.stop(0)
    assert not path.exists()


async def test_a_socket_that_was_left_behind_is_replaced(folder, log):
    path = folder / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    service = AccessLogService(lambda *_: None, lambda: 0.0)
    envoy = Envoy(await service.start(f"unix:{path}"))
    await envoy.send(message("a", node="edge-1"))
    assert service.counts.entries == 1
    await envoy.channel.close()
    await service.stop(0)


async def test_an_address_that_is_taken_is_refused_in_one_line(folder, log):
    second = AccessLogService(lambda *_: None, lambda: 0.0)
    with pytest.raises(OSError, match="another process does"):
        await second.start(log.address)
    await second.stop(0)
    assert log.path.exists()
    (folder / "file").write_text("a file")
    third = AccessLogService(lambda *_: None, lambda: 0.0)
    with pytest.raises(OSError, match="no socket is there"):
        await third.start(f"unix:{folder / 'file'}")
    await third.stop(0)


async def test_it_listens_at_a_port_as_well(log):
    service = AccessLogService(lambda *_: None, lambda: 0.0)
    address = await service.start("127.0.0.1:0")
    assert address.startswith("127.0.0.1:")
    assert not address.endswith(":0")
    with pytest.raises(OSError, match=address):
        await AccessLogService(lambda *_: None, lambda: 0.0).start(address)
    envoy = Envoy(address)
    await envoy.send(message("a", node="edge-1"))
    assert service.counts.entries == 1
    await envoy.channel.close()
    await service.stop(0)


async def test_streams_under_way_may_end_in_the_time_that_stop_gives(log):
    stream = log.envoy().stream()
    await stream.write(message("a", node="edge-1"))
    await until(lambda: log.batches)
    stopping = asyncio.create_task(log.service.stop(DEADLINE_S))
    await until(lambda: not log.path.exists())
    await stream.write(message("b"))
    await stream.done_writing()
    await stream
    await stopping
    assert log.ids() == ["a", "b"]


async def test_a_stream_that_never_ends_does_not_hold_up_the_stop(log):
    stream = log.envoy().stream()
    await stream.write(message("a", node="edge-1"))
    await until(lambda: log.batches)
    async with asyncio.timeout(DEADLINE_S):
        await log.service.stop(0.1)
    await until(lambda: log.counts.open == 0)

"""Peers that mean harm: each flood ends in GOAWAY ENHANCE_YOUR_CALM, and memory stays under a measured ceiling."""

import gc
import struct
import tracemalloc

import pytest

from extproc.transport.connection import Connection
from extproc.transport.errors import ErrorCode
from extproc.transport.limits import Limits

CEILING_BYTES = 9 * 1024 * 1024
"""For one connection with the default limits, whatever its peer does."""
MANY = 200_000


def endless(pieces):
    """Chunks of about 60 KiB, as a socket would bring them, from an endless iterator of frames."""
    chunk = bytearray()
    for piece in pieces:
        chunk += piece
        if len(chunk) > 60_000:
            yield bytes(chunk)
            chunk.clear()


def ids():
    number = -1
    while True:
        number += 2
        yield number


def rapid_reset(w):
    yield from (w.headers(n, w.grpc_fields()) + w.rst(n) for n in ids())


def rapid_refusals(w):
    """Streams that we reset, since each is malformed."""
    yield from (w.headers(n, [*w.grpc_fields(), ("connection", "x")]) for n in ids())


def pings(w):
    while True:
        yield w.frame("PING", 0, 0, bytes(8))


def settings(w):
    while True:
        yield w.settings((4, 1000))


def one_huge_settings(w):
    while True:
        yield w.settings(*[(4, 1000)] * 2700)


def settings_acks(w):
    while True:
        yield w.settings(flags=1)


def continuations(w):
    yield w.frame("HEADERS", 0, 1, w.block(w.grpc_fields()))
    while True:
        yield w.frame("CONTINUATION", 0, 1, b"\x00\x01a\x01b" * 100)


def empty_continuations(w):
    yield w.frame("HEADERS", 0, 1)
    while True:
        yield w.frame("CONTINUATION", 0, 1)


def empty_data(w):
    yield w.headers(1, w.grpc_fields())
    while True:
        yield w.data(1, b"")


def padding_only(w):
    yield w.headers(1, w.grpc_fields())
    while True:
        yield w.frame("DATA", 8, 1, b"\x00")


def priorities(w):
    yield from (w.frame("PRIORITY", 0, n, bytes(5)) for n in ids())


def unknown_frames(w):
    while True:
        yield w.frame(0xBB, 0, 0, b"")


def useless_window_updates(w):
    yield w.headers(1, w.grpc_fields())
    while True:
        yield w.window_update(1, 1)


def data_after_our_reset(w):
    yield w.headers(1, [*w.grpc_fields(), ("connection", "x")])
    while True:
        yield w.data(1, b"x")


def header_bomb(w):
    """One table entry of 4 KB, referred to again and again: 1 byte becomes 4 KB."""
    yield w.frame("HEADERS", 5, 1, b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 12_000)


def window_starvation(w):
    """Requests without end on a stream whose replies may not be sent."""
    yield w.settings((4, 0)) + w.headers(1, w.grpc_fields())
    while True:
        yield w.message(1, bytes(1000))


FLOODS = [
    rapid_reset, rapid_refusals, pings, settings, one_huge_settings, settings_acks, continuations, empty_continuations,
    empty_data, padding_only, priorities, unknown_frames, useless_window_updates, data_after_our_reset, header_bomb,
    window_starvation,
]  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
def test_a_flood_ends_in_enhance_your_calm_within_bounded_memory(flood, new_peer):
    peer = new_peer()
    pieces = flood(peer.wire)
    if flood is header_bomb:
        pieces = [*pieces, bytes(60_000)]
    gc.collect()
    tracemalloc.start()
    try:
        for count, chunk in enumerate(endless(pieces)):
            data = peer.connection.receive(chunk)
            if peer.connection.closing:
                break
            assert count < 200, "never told to calm down"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    last = peer.wire.read(data)[-1]
    assert (last.kind, last.code) == ("GOAWAY", ErrorCode.ENHANCE_YOUR_CALM)
    assert peak < CEILING_BYTES


def test_the_budget_comes_back_with_time_and_with_work(new_peer):
    peer = new_peer()
    wire = peer.wire
    ping = wire.frame("PING", 0, 0, bytes(8))
    for second in range(60):  # 99 pings a second are fine for ever
        peer.send(ping * 99)
        peer.connection.tick(float(second), 1.0)
    peer.send(wire.headers(1, wire.grpc_fields()))
    for _ in range(3000):  # and a ping with each request
        peer.send(ping, wire.message(1, b"x"), wire.window_update(0, 100), wire.window_update(1, 100))
    assert not peer.connection.closing


def test_a_reset_after_the_answer_is_free_since_envoy_ends_streams_that_way(new_peer):
    peer = new_peer()
    wire = peer.wire
    block, message = wire.block(wire.grpc_fields()), wire.message(1, b"x")[9:]
    peer.send(wire.window_update(0, 2**30))
    for number in range(1, 2 * 5_000, 2):
        peer.connection.receive(
            wire.frame("HEADERS", 4, number, block) + wire.frame("DATA", 0, number, message) + wire.rst(number)
        )
    assert not peer.connection.closing
    assert peer.connection.open_streams == 0


def filled_with_idle_streams(connection: Connection, wire) -> None:
    """As many streams as are allowed, each with as much of a message as fits."""
    limits = Limits()
    share = limits.partial_bytes // limits.max_concurrent_streams - 16
    start = b"\0" + struct.pack(">I", 100_000) + bytes(share - 5)
    for number in range(1, 2 * limits.max_concurrent_streams, 2):
        connection.receive(wire.headers(number, wire.grpc_fields()) + wire.data(number, start))
    assert connection.open_streams == limits.max_concurrent_streams


def filled_with_blocked_replies(connection: Connection, wire) -> None:
    """As many streams as are allowed, each with a reply that may not be sent."""
    connection.receive(wire.settings((4, 0)))
    for number in range(1, 2 * Limits().max_concurrent_streams, 2):
        connection.receive(wire.headers(number, wire.grpc_fields()) + wire.message(number, bytes(900)))


def filled_with_closed_streams(connection: Connection, wire) -> None:
    connection.receive(wire.window_update(0, 2**30))
    for number in range(1, 6_000, 2):
        connection.receive(wire.headers(number, wire.plain_fields(), end=True))


def filled_with_different_heads(connection: Connection, wire) -> None:
    connection.receive(wire.headers(1, wire.grpc_fields()) + wire.settings(flags=1))
    connection.receive(wire.frame("HEADERS", 5, 3, b"\x20" + wire.block(wire.grpc_fields())))
    for number in range(5, 2_000, 2):
        connection.receive(wire.headers(number, wire.grpc_fields(x=f"{number}" + "v" * 900), end=True))


@pytest.mark.parametrize(
    "fill",
    [filled_with_idle_streams, filled_with_blocked_replies, filled_with_closed_streams, filled_with_different_heads],
    ids=lambda fill: fill.__name__,
)
def test_what_a_connection_holds_stays_under_the_ceiling(fill, new_peer):
    peer = new_peer()
    gc.collect()
    tracemalloc.start()
    try:
        fill(peer.connection, peer.wire)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not peer.connection.closing
    assert peak < CEILING_BYTES


def test_unfinished_messages_above_the_bound_cost_the_stream_that_exceeds_it(new_peer):
    peer = new_peer(limits=Limits(partial_bytes=10_000))
    wire = peer.wire
    start = b"\0" + struct.pack(">I", 100_000) + bytes(4_000)
    for number in (1, 3):
        assert "RST_STREAM" not in [
            f.kind for f in peer.send(wire.headers(number, wire.grpc_fields()), wire.data(number, start))
        ]
    refused = peer.send(wire.headers(5, wire.grpc_fields()), wire.data(5, start))
    assert [f.headers.get("grpc-status") for f in refused if f.kind == "HEADERS"] == ["8"]
    assert peer.connection._streams.partial_bytes == 8_010


def test_resets_leave_no_stream_behind(new_peer):
    """100,000 streams that were opened and reset; what leaks one object for each shows in the count of all objects."""
    peer = new_peer(limits=Limits(allowance=10**9))
    wire = peer.wire
    block = wire.block(wire.grpc_fields())
    peer.send(wire.headers(1, wire.grpc_fields()), wire.settings(flags=1), wire.frame("HEADERS", 4, 3, b"\x20" + block))

    def reset(first: int, count: int) -> int:
        for number in range(first, first + 2 * count, 2):
            peer.connection.receive(wire.frame("HEADERS", 4, number, block) + wire.rst(number))
        gc.collect()
        return len(gc.get_objects())

    before = reset(5, 5_000)
    after = reset(10_005, 100_000)
    assert peer.connection.open_streams == 2
    assert after - before < 100

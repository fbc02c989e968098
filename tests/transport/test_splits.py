"""Any split of the same bytes gives the same answers; random frames never raise and never hold more than is allowed."""

import struct

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from extproc.transport.connection import Connection
from extproc.transport.limits import Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GRPC = (
    b"\x83\x86\x00\x05:path\x34/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    b"\x00\x0ccontent-type\x10application/grpc"
)
BLOCKS = [
    GRPC,
    b"\x20" + GRPC,
    GRPC.replace(b"ExternalProcessor/Process", b"ExternalProcessor/Unknown"),
    b"\x83\x86\x00\x05:path\x1c/grpc.health.v1.Health/Watch\x00\x0ccontent-type\x10application/grpc",
    b"\x82\x86\x84",
    b"\x40\x01a\x01b\x82\x86\x84",
    b"\x82\x86\x84\xbe",
    b"",
    b"\xff\xff",
]
SMALL = Limits(
    max_concurrent_streams=5, max_message_bytes=500, partial_bytes=1_000, queued_bytes=2_000, allowance=500,
    connection_window_bytes=65_535,
)  # fmt: skip

payloads = st.one_of(
    st.sampled_from(BLOCKS),
    st.binary(max_size=20),
    st.builds(lambda body: b"\0" + struct.pack(">I", len(body)) + body, st.binary(max_size=60)),
    st.builds(lambda size: b"\0" + struct.pack(">I", size), st.integers(0, 1000)),
    st.builds(lambda value: struct.pack(">I", value), st.sampled_from([0, 1, 1000, 2**31 - 1])),
    st.builds(lambda name, value: struct.pack(">HI", name, value), st.integers(1, 6), st.integers(0, 70_000)),
)


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


any_frame = st.builds(frame, st.integers(0, 10), st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 255]),
                      st.integers(0, 9), payloads)  # fmt: skip
good_frame = st.one_of(
    st.builds(
        frame, st.just(1), st.sampled_from([4, 5]), st.sampled_from([1, 3, 5, 7, 9, 11]), st.sampled_from(BLOCKS[:5])
    ),
    st.builds(frame, st.just(0), st.sampled_from([0, 1]), st.sampled_from([1, 3, 5, 7, 9, 11]), payloads),
    st.builds(frame, st.just(8), st.just(0), st.sampled_from([0, 1, 3]), st.just(struct.pack(">I", 50))),
    st.builds(
        frame, st.just(4), st.just(0), st.just(0), st.builds(lambda n: struct.pack(">HI", 4, n), st.integers(0, 300))
    ),
    st.just(frame(4, 1, 0, b"")),
    st.builds(frame, st.just(3), st.just(0), st.sampled_from([1, 3, 5]), st.just(bytes(4))),
)
sessions = st.lists(st.one_of(good_frame, good_frame, good_frame, any_frame), max_size=30).map(b"".join)
cuts = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def run(pieces: list[bytes], limits: Limits = SMALL) -> bytes:
    """All that a connection sends for these pieces."""
    connection = Connection(lambda message: b"re:" + message, lambda: True, limits)
    sent = connection.open()
    for piece in pieces:
        sent += connection.receive(piece)
        streams = connection._streams
        assert len(streams.open) <= limits.max_concurrent_streams
        assert streams.partial_bytes <= limits.partial_bytes
        assert streams.queued_bytes <= limits.queued_bytes or connection.closing
        assert streams.partial_bytes == sum(len(s.partial) for s in streams.open.values() if s.partial is not None)
        assert streams.queued_bytes == sum(len(s.queue) for s in streams.open.values() if s.queue is not None)
        assert streams.blocked.keys() == {s.id for s in streams.open.values() if s.queue is not None}
        assert streams.watchers.keys() <= streams.open.keys()
        assert len(connection._tail) <= 9 + 16_384 or connection.closing
    return sent


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """The data in pieces of these sizes, again and again."""
    pieces, place, turn = [], 0, 0
    while place < len(data):
        size = sizes[turn % len(sizes)]
        pieces.append(data[place : place + size])
        place, turn = place + size, turn + 1
    return pieces


@given(session=sessions, sizes=cuts)
@example(session=frame(7, 0, 0, bytes(8)) + frame(1, 4, 1, GRPC), sizes=[1])
@example(session=frame(1, 4, 1, GRPC) + frame(0, 1, 1, b"\0\0\0\0\x01x"), sizes=[1])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_split_of_the_same_bytes_gives_the_same_answers(session, sizes):
    data = PREFACE + frame(4, 0, 0, b"") + session
    assert run(cut(data, sizes)) == run([data])


@given(pieces=st.lists(st.one_of(any_frame, st.binary(max_size=60)), max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_frames_and_rubbish_never_raise_and_stay_within_the_limits(pieces):
    run([PREFACE + frame(4, 0, 0, b""), *pieces])


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_rubbish_instead_of_a_preface_never_raises(data):
    run([data])

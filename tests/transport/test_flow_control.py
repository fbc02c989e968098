"""Flow control in both directions: RFC 9113 sections 5.2 and 6.9."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.transport.errors import ErrorCode
from extproc.transport.limits import Limits

WINDOW = 4  # SETTINGS_INITIAL_WINDOW_SIZE
REPLY = bytes(range(200))
FRAMED = b"\0" + struct.pack(">I", len(REPLY)) + REPLY


def body(received, number=1) -> bytes:
    return b"".join(frame.payload for frame in received if frame.kind == "DATA" and frame.stream_id == number)


def small_peer(new_peer, window: int):
    """A client whose streams have a window of so many bytes; every answer is REPLY."""
    peer = new_peer(lambda _message: REPLY, greet=False)
    peer.greet((WINDOW, window))
    return peer


def test_a_reply_is_cut_to_the_streams_window_and_goes_on_with_each_update(new_peer):
    peer = small_peer(new_peer, 1)
    wire = peer.wire
    got = body(peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x")))
    assert got == FRAMED[:1]
    for _ in range(len(FRAMED) - 1):
        piece = body(peer.send(wire.window_update(1, 1)))
        assert len(piece) == 1
        got += piece
    assert got == FRAMED
    assert peer.send(wire.window_update(1, 1)) == []


def test_a_window_of_zero_lets_headers_through_but_no_data(new_peer):
    peer = small_peer(new_peer, 0)
    wire = peer.wire
    received = peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x"))
    assert [f.kind for f in received if f.stream_id == 1] == ["HEADERS"]


def test_trailers_wait_behind_the_reply_they_follow(new_peer):
    peer = small_peer(new_peer, 0)
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x", end=True))
    assert [f.kind for f in peer.send(wire.window_update(1, 100))] == ["DATA"]
    assert [(f.kind, f.ends) for f in peer.send(wire.window_update(1, 200))] == [("DATA", False), ("HEADERS", True)]
    assert peer.connection.open_streams == 0


def test_the_connections_window_holds_back_all_streams_and_frees_the_oldest_first(new_peer):
    peer = new_peer(lambda _message: bytes(30_000))
    wire = peer.wire
    received = []
    for number in (1, 3, 5):
        received += peer.send(wire.headers(number, wire.grpc_fields()), wire.message(number, b"x"))
    assert sum(len(f.payload) for f in received if f.kind == "DATA") == 65_535
    assert (len(body(received, 3)), len(body(received, 5))) == (30_005, 65_535 - 60_010)
    more = peer.send(wire.window_update(0, 100_000))
    assert len(body(received, 5)) + len(body(more, 5)) == 30_005


def test_a_smaller_initial_window_takes_from_open_streams_even_below_zero(new_peer):
    peer = small_peer(new_peer, 100)
    wire = peer.wire
    assert len(body(peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x")))) == 100
    peer.send(wire.settings((WINDOW, 40)))  # now at -60
    assert body(peer.send(wire.window_update(1, 60))) == b""
    assert len(body(peer.send(wire.window_update(1, 3)))) == 3


def test_a_larger_initial_window_frees_open_streams(new_peer):
    peer = small_peer(new_peer, 0)
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x"))
    assert len(body(peer.send(wire.settings((WINDOW, 1))))) == 1
    assert len(body(peer.send(wire.settings((WINDOW, 65_535))))) == len(FRAMED) - 1


def test_data_that_a_larger_initial_window_frees_comes_after_the_acknowledgment(new_peer):
    """Only the acknowledgment tells the peer from which byte on it must count with the new window."""
    peer = small_peer(new_peer, 0)
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x"))
    assert [f.kind for f in peer.send(wire.settings((WINDOW, 65_535)))] == ["SETTINGS", "DATA"]


def test_of_several_values_in_one_settings_frame_the_last_counts(new_peer):
    peer = new_peer(lambda _message: REPLY)
    wire = peer.wire
    peer.send(wire.settings((WINDOW, 100), (WINDOW, 1)))
    assert len(body(peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x")))) == 1


def test_the_body_of_an_http_answer_obeys_the_window_too(new_peer):
    peer = small_peer(new_peer, 3)
    wire = peer.wire
    first = peer.send(wire.headers(1, wire.plain_fields(), end=True))
    assert [(f.kind, len(f.payload), f.ends) for f in first][1:] == [("DATA", 3, False)]
    peer.send(wire.settings((WINDOW, 2)))
    (second,) = peer.send(wire.window_update(1, 2))
    assert len(second.payload) == 1
    (rest,) = peer.send(wire.window_update(1, 1000))
    assert rest.ends


def test_no_frame_is_larger_than_the_peer_takes(new_peer):
    peer = new_peer(lambda _message: bytes(40_000), greet=False)
    peer.greet((WINDOW, 100_000), (5, 20_000))
    wire = peer.wire
    received = peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x"))
    assert [len(f.payload) for f in received if f.kind == "DATA"] == [20_000, 20_000, 5]


def test_a_reset_frees_what_was_queued(new_peer):
    peer = small_peer(new_peer, 0)
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.message(1, b"x"))
    assert peer.connection._streams.queued_bytes == len(FRAMED)
    peer.send(wire.rst(1))
    assert peer.connection._streams.queued_bytes == 0
    assert not peer.connection._streams.blocked


def test_the_window_we_announced_is_given_back_as_data_is_read(peer):
    wire = peer.wire
    wide = [f for f in peer.opening if f.kind == "WINDOW_UPDATE"]
    announced = 65_535 + struct.unpack(">I", wide[0].payload)[0]
    assert announced == Limits().connection_window_bytes
    peer.send(wire.headers(1, wire.plain_fields("POST")))
    given = {0: announced, 1: 65_535}
    sent = 0
    while sent < 3 * announced:
        size = min(16_384, *given.values())
        assert size > 0, "the server let a window run dry"
        for frame in peer.send(wire.data(1, bytes(size))):
            given[frame.stream_id] += struct.unpack(">I", frame.payload)[0]
        given = {key: value - size for key, value in given.items()}
        sent += size


def test_data_above_the_streams_window_is_a_stream_error(new_peer):
    peer = new_peer()
    wire = peer.wire
    peer.send(wire.headers(1, wire.plain_fields("POST")))
    peer.connection._open[1].credit = 100  # as if the rest of the window were in flight
    (reset,) = peer.send(wire.data(1, bytes(101)))
    assert (reset.kind, reset.code) == ("RST_STREAM", ErrorCode.FLOW_CONTROL_ERROR)


def test_data_above_the_connections_window_is_a_connection_error(new_peer):
    peer = new_peer()
    wire = peer.wire
    peer.send(wire.headers(1, wire.plain_fields("POST")))
    peer.connection._credit = 100
    (last,) = peer.send(wire.data(1, bytes(101)))
    assert (last.kind, last.code) == ("GOAWAY", ErrorCode.FLOW_CONTROL_ERROR)


def test_padding_counts_against_the_window_and_is_given_back(peer):
    wire = peer.wire
    peer.send(wire.headers(1, wire.plain_fields("POST")))
    before = peer.connection._credit
    peer.send(wire.frame("DATA", 8, 1, b"\xc8x" + bytes(200)))
    assert before - peer.connection._credit == 202


def test_data_for_a_stream_we_reset_still_counts_against_the_connection(peer):
    wire = peer.wire
    peer.send(wire.headers(1, [*wire.grpc_fields(), ("connection", "close")]))
    before = peer.connection._credit
    assert peer.send(wire.data(1, bytes(1000))) == []
    assert before - peer.connection._credit == 1000


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("window"), st.integers(0, 400)),
        st.tuples(st.just("link"), st.integers(1, 500)),
        st.tuples(st.just("stream"), st.integers(1, 300)),
        st.tuples(st.just("ask"), st.integers(1, 3)),
    ),
    max_size=25,
)


@pytest.mark.parametrize("graceful", [True, False])
@given(steps=STEPS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_peer_does_with_its_windows_we_stay_within_them_and_lose_nothing(graceful, steps, new_peer):
    peer = new_peer(lambda _message: REPLY, greet=False)
    peer.greet((WINDOW, 0))
    wire = peer.wire
    initial, link, streams, got = 0, 65_535, {}, {}
    for what, value in [*steps, ("window", 100_000), ("link", 100_000)]:
        match what:
            case "window":
                streams = {key: room + value - initial for key, room in streams.items()}
                initial = value
                received = peer.send(wire.settings((WINDOW, value)))
            case "link":
                link += value
                received = peer.send(wire.window_update(0, value))
            case "stream" if streams:
                number = min(streams)
                streams[number] += value
                received = peer.send(wire.window_update(number, value))
            case _:
                number = 1 + 2 * len(got)
                streams[number], got[number] = initial, b""
                received = peer.send(wire.headers(number, wire.grpc_fields()), wire.message(number, b"x", end=graceful))
        for frame in received:
            if frame.kind == "DATA":
                streams[frame.stream_id] -= len(frame.payload)
                link -= len(frame.payload)
                got[frame.stream_id] += frame.payload
                assert streams[frame.stream_id] >= 0
                assert link >= 0
    assert set(got.values()) <= {FRAMED}
    assert peer.connection._streams.queued_bytes == 0
    assert (peer.connection.open_streams == 0) == (graceful or not got)

"""What silence leads to. Time is an argument, so nothing here waits."""

from extproc.transport.errors import ErrorCode
from extproc.transport.limits import Limits

LIMITS = Limits(first_frame_s=10, idle_s=900, ping_after_s=30, ping_timeout_s=20)


def tick(peer, now_s: float):
    return peer.wire.read(peer.connection.tick(now_s, 1.0))


def test_a_peer_that_never_sends_its_preface_is_cut_off(new_peer):
    peer = new_peer(greet=False, limits=LIMITS)
    assert tick(peer, 100.0) == []
    assert tick(peer, 109.0) == []
    assert [(f.kind, f.code) for f in tick(peer, 110.0)] == [("GOAWAY", ErrorCode.SETTINGS_TIMEOUT)]
    assert peer.connection.closing


def test_a_peer_that_never_acknowledges_our_settings_is_cut_off(new_peer):
    peer = new_peer(greet=False, limits=LIMITS)
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", peer.wire.settings())
    tick(peer, 0.5)
    assert [f.code for f in tick(peer, 10.5)] == [ErrorCode.SETTINGS_TIMEOUT]


def test_a_header_block_must_end_in_time(new_peer):
    peer = new_peer(limits=LIMITS)
    peer.send(peer.wire.frame("HEADERS", 0, 1, b"\x82"))
    tick(peer, 1.0)
    assert [f.kind for f in tick(peer, 11.0)] == ["GOAWAY"]


def test_a_silent_peer_is_pinged_and_stays_if_it_answers(new_peer):
    peer = new_peer(limits=LIMITS)
    peer.send(peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.settings(flags=1))
    now_s = 1.0
    for _ in range(5):
        assert tick(peer, now_s) == []
        assert tick(peer, now_s + 29) == []
        (ping,) = tick(peer, now_s + 30)
        assert (ping.kind, ping.flags) == ("PING", 0)
        peer.send(peer.wire.frame("PING", 1, 0, ping.payload))
        now_s += 31


def test_a_silent_peer_that_does_not_answer_the_ping_is_cut_off(new_peer):
    peer = new_peer(limits=LIMITS)
    peer.send(peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.settings(flags=1))
    tick(peer, 1.0)
    assert [f.kind for f in tick(peer, 31.0)] == ["PING"]
    assert tick(peer, 50.0) == []
    assert [f.kind for f in tick(peer, 51.0)] == ["GOAWAY"]


def test_a_connection_without_streams_ends_after_the_idle_time(new_peer):
    peer = new_peer(limits=LIMITS)
    for second in range(1, 900, 20):
        tick(peer, float(second))
        peer.send(peer.wire.frame("PING", 1, 0, bytes(8)))
        assert not peer.connection.closing
    goaway, ping = tick(peer, 901.0)
    assert (goaway.kind, goaway.code, ping.kind) == ("GOAWAY", ErrorCode.NO_ERROR, "PING")
    assert tick(peer, 902.0) == []
    peer.send(peer.wire.frame("PING", 1, 0, ping.payload))
    assert peer.connection.closing


def test_a_connection_with_short_streams_between_the_ticks_is_never_idle(new_peer):
    peer = new_peer(limits=LIMITS)
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields(), end=True), wire.settings(flags=1))
    for number in range(1, 40):
        tick(peer, 100.0 * number)
        peer.send(wire.frame("HEADERS", 5, 1 + 2 * number, b"\x20" + wire.block(wire.grpc_fields())))
        assert peer.connection.open_streams == 0
    assert not peer.connection.closing
    assert not peer.connection._control.draining


def test_a_connection_with_an_open_stream_is_never_idle(new_peer):
    peer = new_peer(limits=LIMITS)
    peer.send(peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.settings(flags=1))
    for second in range(1, 4_000, 20):
        tick(peer, float(second))
        peer.send(peer.wire.frame("PING", 1, 0, bytes(8)))
    assert not peer.connection.closing

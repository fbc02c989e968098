"""Every frame in every life of a stream, through a real Connection, against the table it is said to follow."""

import itertools

import pytest

from extproc.transport import frames
from extproc.transport.errors import ErrorCode, Http2ConnectionError, Http2StreamError
from extproc.transport.states import TABLE, Action, Life, judge

STREAM = 1
KINDS = {
    "DATA": frames.DATA,
    "HEADERS": frames.HEADERS,
    "PRIORITY": frames.PRIORITY,
    "RST_STREAM": frames.RST_STREAM,
    "SETTINGS": frames.SETTINGS,
    "PUSH_PROMISE": frames.PUSH_PROMISE,
    "PING": frames.PING,
    "GOAWAY": frames.GOAWAY,
    "WINDOW_UPDATE": frames.WINDOW_UPDATE,
    "CONTINUATION": frames.CONTINUATION,
}
PAIRS = list(itertools.product(Life, KINDS))


def bring_to(life: Life, peer) -> None:
    """A stream in that life, by ordinary frames."""
    wire = peer.wire
    match life:
        case Life.IDLE:
            return
        case Life.OPEN:
            peer.send(wire.headers(STREAM, wire.grpc_fields()))
        case Life.CLIENT_DONE:  # the answer is complete but waits for a window
            peer.send(wire.settings((frames.INITIAL_WINDOW_SIZE, 0)))
            peer.send(wire.headers(STREAM, wire.plain_fields(), end=True))
        case Life.ENDED:
            peer.send(wire.headers(STREAM, wire.plain_fields(), end=True))
        case Life.RESET_BY_CLIENT:
            peer.send(wire.headers(STREAM, wire.grpc_fields()), wire.rst(STREAM))
        case Life.RESET_BY_US:
            peer.send(wire.headers(STREAM, [*wire.grpc_fields(), ("connection", "close")]))
        case Life.FORGOTTEN:
            peer.send(wire.headers(STREAM + 4, wire.grpc_fields()))


def a_frame(kind: str, wire) -> bytes:
    """A frame of that type which is well formed in itself."""
    match kind:
        case "DATA":
            return wire.message(STREAM, b"hello")
        case "HEADERS":
            return wire.headers(STREAM, [("x-trailer", "1")], end=True)
        case "WINDOW_UPDATE":
            return wire.window_update(STREAM, 5)
        case "RST_STREAM":
            return wire.rst(STREAM)
        case "PRIORITY":
            return wire.frame("PRIORITY", 0, STREAM, bytes(5))
        case "SETTINGS":
            return wire.frame("SETTINGS", 0, STREAM)
        case "PING" | "GOAWAY":
            return wire.frame(kind, 0, STREAM, bytes(8))
        case _:
            return wire.frame(kind, 4, STREAM, bytes(4))


def outcome(peer, received: list) -> tuple[str, int | None]:
    """What the peer saw: ("goaway", code), ("reset", code) or ("fine", None)."""
    for frame in received:
        if frame.kind == "GOAWAY":
            return "goaway", frame.code
        if frame.kind == "RST_STREAM" and frame.stream_id == STREAM:
            return "reset", frame.code
    return "fine", None


EXPECTED = {
    Action.ACCEPT: ("fine", None),
    Action.IGNORE: ("fine", None),
    Action.DISCARD: ("fine", None),
    Action.STREAM_CLOSED: ("reset", ErrorCode.STREAM_CLOSED),
    Action.LINK_CLOSED: ("goaway", ErrorCode.STREAM_CLOSED),
    Action.PROTOCOL_ERROR: ("goaway", ErrorCode.PROTOCOL_ERROR),
}


@pytest.mark.parametrize(("life", "kind"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_every_frame_in_every_life_does_what_the_table_says(life, kind, peer):
    bring_to(life, peer)
    assert peer.connection._streams.life(STREAM) is life
    action = TABLE[life][KINDS[kind]]
    if (life, kind) == (Life.IDLE, "HEADERS"):
        received = peer.send(peer.wire.headers(STREAM, peer.wire.grpc_fields()))
    else:
        received = peer.send(a_frame(kind, peer.wire))
    assert outcome(peer, received) == EXPECTED[action]
    assert peer.connection.closing == (EXPECTED[action][0] == "goaway")


HARMLESS = [(life, kind) for life, kind in PAIRS if EXPECTED[TABLE[life][KINDS[kind]]][0] != "goaway"]


@pytest.mark.parametrize(("life", "kind"), HARMLESS, ids=lambda value: getattr(value, "name", value))
def test_a_harmless_frame_leaves_the_connection_able_to_serve(life, kind, peer):
    bring_to(life, peer)
    peer.send(a_frame(kind, peer.wire) if life is not Life.IDLE or kind != "HEADERS" else b"")
    wire = peer.wire
    received = peer.send(
        wire.settings((frames.INITIAL_WINDOW_SIZE, 1000)),
        wire.headers(101, wire.grpc_fields()), wire.message(101, b"still there", end=True),
    )  # fmt: skip
    bodies = [frame.payload[5:] for frame in received if frame.kind == "DATA" and frame.stream_id == 101]
    assert bodies == [b"re:still there"]


@pytest.mark.parametrize(("life", "kind"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_judge_raises_exactly_for_the_errors_of_the_table(life, kind):
    action = TABLE[life][KINDS[kind]]
    match EXPECTED[action]:
        case ("fine", _):
            assert judge(life, KINDS[kind], STREAM) is action
        case ("reset", code):
            with pytest.raises(Http2StreamError) as stream_error:
                judge(life, KINDS[kind], STREAM)
            assert (stream_error.value.stream_id, stream_error.value.code) == (STREAM, code)
        case (_, code):
            with pytest.raises(Http2ConnectionError) as connection_error:
                judge(life, KINDS[kind], STREAM)
            assert connection_error.value.code == code


def test_the_table_has_every_life_and_every_frame_type():
    assert TABLE.keys() == set(Life)
    assert all(row.keys() == set(KINDS.values()) for row in TABLE.values())


def test_an_unknown_frame_type_is_ignored_in_every_life(new_peer):
    for life in Life:
        peer = new_peer()
        bring_to(life, peer)
        assert outcome(peer, peer.send(peer.wire.frame(0x77, 0xFF, STREAM, b"whatever"))) == ("fine", None)

"""gRPC on a Connection: Process, Check, Watch, and what this server does not know or does not take."""

import pytest

from extproc.transport.errors import ErrorCode
from extproc.transport.limits import Limits

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"


def call(peer, number, path, *messages, end=True):
    wire = peer.wire
    pieces = [wire.headers(number, wire.grpc_fields(path))]
    pieces += [wire.message(number, message) for message in messages]
    received = peer.send(*pieces, *([wire.data(number, b"", end=True)] if end else []))
    return [frame for frame in received if frame.stream_id == number]


def replies(received) -> list[bytes]:
    """The messages in DATA frames that hold one each."""
    found = [frame.payload for frame in received if frame.kind == "DATA"]
    assert all(int.from_bytes(one[1:5], "big") == len(one) - 5 and one[0] == 0 for one in found)
    return [one[5:] for one in found]


def status(received) -> str:
    """grpc-status of the last HEADERS, which must end the stream."""
    last = [frame for frame in received if frame.kind == "HEADERS"][-1]
    assert last.ends
    return last.headers["grpc-status"]


def test_each_message_gets_one_reply_and_the_half_close_gets_the_status(peer):
    received = call(peer, 1, PROCESS, b"a", b"", b"ccc")
    assert [frame.kind for frame in received] == ["HEADERS", "DATA", "DATA", "DATA", "HEADERS"]
    assert received[0].headers == {":status": "200", "content-type": "application/grpc"}
    assert replies(received) == [b"re:a", b"re:", b"re:ccc"]
    assert status(received) == "0"
    assert peer.connection.open_streams == 0


def test_a_stream_without_a_message_ends_cleanly(peer):
    (only,) = call(peer, 1, PROCESS)
    assert only.headers == {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}
    assert only.ends


def test_headers_that_end_the_stream_are_an_empty_stream(peer):
    received = peer.send(peer.wire.headers(1, peer.wire.grpc_fields(), end=True))
    assert [frame.headers.get("grpc-status") for frame in received if frame.kind == "HEADERS"] == ["0"]


def test_trailers_end_the_request_like_an_empty_data_frame(peer):
    wire = peer.wire
    received = peer.send(
        wire.headers(1, wire.grpc_fields()), wire.message(1, b"a"), wire.headers(1, [("x", "y")], end=True)
    )
    assert replies(received) == [b"re:a"]
    assert status(received) == "0"


def test_a_reset_stream_is_forgotten_without_an_answer(peer):
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.data(1, b"\0\0\0\0\x09half"))
    assert peer.send(wire.rst(1)) == []
    assert peer.connection.open_streams == 0
    assert peer.connection._streams.partial_bytes == 0


def test_a_message_may_be_split_over_frames_anywhere(new_peer):
    whole = b"\0\0\0\0\x05hello\0\0\0\0\x00\0\0\0\0\x03abc"
    for first in range(1, len(whole)):
        for second in range(first, len(whole)):
            peer = new_peer()
            wire = peer.wire
            pieces = [whole[:first], whole[first:second], whole[second:]]
            received = peer.send(wire.headers(1, wire.grpc_fields()), *(wire.data(1, p) for p in pieces if p))
            assert replies(received) == [b"re:hello", b"re:", b"re:abc"]


def test_several_messages_in_one_frame_are_all_answered_in_order(peer):
    messages = [b"%d" % number for number in range(50)]
    body = b"".join(b"\0" + len(one).to_bytes(4, "big") + one for one in messages)
    received = peer.send(peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.data(1, body, end=True))
    assert replies(received) == [b"re:" + one for one in messages]
    assert status(received) == "0"


def test_many_streams_at_once_each_get_their_own_answer(peer):
    wire = peer.wire
    numbers = range(1, 401, 2)
    opened = [wire.headers(number, wire.grpc_fields()) for number in numbers]
    received = peer.send(*opened, *(wire.message(number, b"%d" % number) for number in reversed(numbers)))
    assert {f.stream_id: f.payload[5:] for f in received if f.kind == "DATA"} == {n: b"re:%d" % n for n in numbers}


@pytest.mark.parametrize(
    "path", ["/a.B/c", "/", "/envoy.service.ext_proc.v3.ExternalProcessor/Other", "/grpc.health.v1.Health/List"]
)
def test_an_unknown_method_is_unimplemented_at_once(path, peer):
    received = call(peer, 1, path, end=False)
    assert status(received) == "12"
    assert (received[-1].kind, received[-1].code) == ("RST_STREAM", ErrorCode.NO_ERROR)
    assert peer.send(peer.wire.message(1, b"was on its way", end=True)) == []


@pytest.mark.parametrize("kind", ["application/json", "application/grpc-web", "application/grpcx", "text/plain", ""])
def test_another_content_type_gets_http_415(kind, peer):
    fields = [(name, kind if name == "content-type" else value) for name, value in peer.wire.grpc_fields()]
    head, body = peer.send(peer.wire.headers(1, fields, end=True))
    assert head.headers[":status"] == "415"
    assert body.ends


@pytest.mark.parametrize("kind", ["application/grpc+proto", "application/grpc; charset=utf-8", "Application/gRPC"])
def test_every_spelling_of_the_grpc_content_type_is_taken(kind, peer):
    fields = [(name, kind if name == "content-type" else value) for name, value in peer.wire.grpc_fields()]
    received = peer.send(peer.wire.headers(1, fields), peer.wire.message(1, b"x"))
    assert replies(received) == [b"re:x"]


def test_a_compressed_message_is_unimplemented_and_the_client_learns_what_is_accepted(peer):
    wire = peer.wire
    received = peer.send(wire.headers(1, wire.grpc_fields(grpc_encoding="gzip")), wire.data(1, b"\x01\0\0\0\x02zz"))
    assert status(received[1:]) == "12"
    assert received[1].headers["grpc-accept-encoding"] == "identity"


def test_an_unknown_compression_flag_is_an_internal_error(peer):
    received = peer.send(peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.data(1, b"\x07\0\0\0\x02zz"))
    assert status(received[1:]) == "13"


def test_a_request_that_ends_within_a_message_is_an_internal_error(peer):
    received = peer.send(
        peer.wire.headers(1, peer.wire.grpc_fields()), peer.wire.data(1, b"\0\0\0\0\x09half", end=True)
    )
    assert status(received[1:]) == "13"


def test_a_message_above_the_limit_is_refused_by_its_length_alone(new_peer):
    peer = new_peer(limits=Limits(max_message_bytes=1000))
    wire = peer.wire
    received = peer.send(
        wire.headers(1, wire.grpc_fields()), wire.message(1, bytes(1000)), wire.data(1, b"\0\0\0\x03\xe9")
    )
    assert replies(received) == [b"re:" + bytes(1000)]
    assert status(received) == "8"
    assert peer.send(wire.data(1, bytes(500))) == []


def test_a_message_of_exactly_the_limit_in_many_frames_is_answered(new_peer):
    peer = new_peer(lambda message: b"%d" % len(message), limits=Limits(max_message_bytes=50_000))
    wire = peer.wire
    body = b"\0" + (50_000).to_bytes(4, "big") + bytes(50_000)
    peer.send(wire.headers(1, wire.grpc_fields()))
    received = [f for at in range(0, len(body), 7_000) for f in peer.send(wire.data(1, body[at : at + 7_000]))]
    assert replies(received) == [b"50000"]


def test_an_answer_that_raises_costs_its_stream_only(new_peer, caplog):
    def answer(message: bytes) -> bytes:
        if message == b"bad":
            raise ValueError(message)
        return message

    peer = new_peer(answer)
    assert status(call(peer, 1, PROCESS, b"bad")) == "13"
    assert replies(call(peer, 3, PROCESS, b"good")) == [b"good"]
    assert "failed" in caplog.text


def test_the_answer_is_looked_up_for_every_request(new_peer):
    current = [b"one"]
    peer = new_peer(lambda _message: current[0])
    assert replies(call(peer, 1, PROCESS, b"x")) == [b"one"]
    current[0] = b"two"
    assert replies(call(peer, 3, PROCESS, b"x")) == [b"two"]


# Health


@pytest.mark.parametrize("service", ["", "perch", "envoy.service.ext_proc.v3.ExternalProcessor"])
@pytest.mark.parametrize(("serving", "reply"), [(True, b"\x08\x01"), (False, b"\x08\x02")])
def test_check_says_whether_we_serve(service, serving, reply, new_peer):
    peer = new_peer(serving=lambda: serving)
    request = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    received = call(peer, 1, CHECK, request)
    assert replies(received) == [reply]
    assert status(received) == "0"


def test_check_of_an_unknown_service_is_not_found(peer):
    received = call(peer, 1, CHECK, b"\x0a\x05other")
    assert status(received) == "5"
    assert replies(received) == []


@pytest.mark.parametrize("request_", [b"\x0a\x05ab", b"\x0a", b"\xff" * 12, b"\x0f", b"\x00\x00"])
def test_check_that_cannot_be_decoded_is_an_internal_error(request_, peer):
    assert status(call(peer, 1, CHECK, request_)) == "13"


def test_unknown_fields_of_a_health_request_are_skipped(peer):
    extra = b"\x10\x96\x01" + b"\x1d" + bytes(4) + b"\x21" + bytes(8) + b"\x2a\x03abc"
    assert replies(call(peer, 1, CHECK, extra + b"\x0a\x05perch" + extra)) == [b"\x08\x01"]


@pytest.mark.parametrize("messages", [(), (b"", b"")])
def test_check_takes_exactly_one_message(messages, peer):
    assert status(call(peer, 1, CHECK, *messages)) == "13"


def test_watch_tells_the_status_and_then_each_change_once(new_peer):
    serving = [True]
    peer = new_peer(serving=lambda: serving[0])
    assert replies(call(peer, 1, WATCH, b"")) == [b"\x08\x01"]
    assert peer.connection.watched
    assert peer.connection.tell_watchers() == b""
    serving[0] = False
    assert replies(peer.wire.read(peer.connection.tell_watchers())) == [b"\x08\x02"]
    assert peer.connection.tell_watchers() == b""
    peer.send(peer.wire.rst(1))
    assert not peer.connection.watched


def test_watch_of_an_unknown_service_stays_open_and_says_so(peer):
    received = call(peer, 1, WATCH, b"\x0a\x05other")
    assert replies(received) == [b"\x08\x03"]
    assert peer.connection.open_streams == 1
    assert peer.connection.tell_watchers() == b""


# The end of the server


def test_drain_serves_what_is_open_and_what_crosses_the_goaway_and_refuses_later_streams(peer):
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()))
    first, ping = wire.read(peer.connection.drain())
    assert (first.kind, first.code, first.payload[:4]) == ("GOAWAY", ErrorCode.NO_ERROR, b"\x7f\xff\xff\xff")
    assert replies(call(peer, 3, PROCESS, b"crossed it", end=False)) == [b"re:crossed it"]
    (last,) = peer.send(wire.frame("PING", 1, 0, ping.payload))
    assert (last.kind, last.payload[:4]) == ("GOAWAY", b"\0\0\0\x03")
    (refused,) = peer.send(wire.headers(5, wire.grpc_fields()))
    assert (refused.kind, refused.code) == ("RST_STREAM", ErrorCode.REFUSED_STREAM)
    assert not peer.connection.closing
    assert replies(peer.send(wire.message(1, b"late", end=True), wire.data(3, b"", end=True))) == [b"re:late"]
    assert peer.connection.closing


def test_drain_ends_watchers_with_not_serving_and_unavailable(peer):
    call(peer, 1, WATCH, b"")
    received = peer.wire.read(peer.connection.drain())
    assert replies(received) == [b"\x08\x02"]
    assert status(received) == "14"
    assert not peer.connection.watched


def test_drain_of_a_connection_that_said_nothing_ends_it(new_peer):
    peer = new_peer(greet=False)
    peer.connection.drain()
    assert peer.connection.closing

"""The requirements of RFC 9113 as a table: bytes that break one -> the error it asks for. Sections as in the RFC.

`breach` builds the bytes, with what must come before. Expected is a connection error (GOAWAY, then the end) or a
stream error (RST_STREAM, while the connection goes on).
"""
# ruff: noqa: E501  a row of a table is one line

import struct
from dataclasses import dataclass

import pytest

from extproc.transport.errors import ErrorCode
from extproc.transport.limits import Limits

E = ErrorCode
POST = "POST"


@dataclass(frozen=True)
class Row:
    """One requirement: `breach(wire)` builds the bytes."""

    name: str
    breach: object
    error: str
    code: ErrorCode


def link(name, code, breach) -> Row:
    return Row(name, breach, "connection", code)


def stream(name, code, breach) -> Row:
    return Row(name, breach, "stream", code)


def get(w, number=1, *, end=True) -> bytes:
    return w.headers(number, w.plain_fields(), end=end)


def post(w, number=1, *, end=False, **more) -> bytes:
    return w.headers(number, w.plain_fields(POST, **more), end=end)


def begun(w) -> bytes:
    """A HEADERS frame whose block goes on."""
    return w.frame("HEADERS", 1, 1, w.block(w.plain_fields()))


def with_fields(*fields, base=None):
    """A GET whose fields are `base` (all pseudo-header fields by default) and then `fields`."""
    return lambda w: w.headers(1, [*(w.plain_fields() if base is None else base), *fields], end=True)


def pseudo(**changes):
    """The pseudo-header fields of a GET with some changed or, as None, left out."""
    fields = {":method": "GET", ":scheme": "http", ":path": "/", ":authority": "perch"}
    fields |= {f":{name}": value for name, value in changes.items()}
    return [(name, value) for name, value in fields.items() if value is not None]


ROWS = [
    # 4.1, 4.2 frame format and size
    link("4.2 DATA larger than the maximum", E.FRAME_SIZE_ERROR, lambda w: post(w) + w.data(1, bytes(16_385))),
    link("4.2 HEADERS larger than the maximum", E.FRAME_SIZE_ERROR, lambda w: w.frame("HEADERS", 5, 1, bytes(16_385))),
    link("4.2 unknown frame larger than the maximum", E.FRAME_SIZE_ERROR, lambda w: w.frame(0x55, 0, 0, bytes(16_385))),
    # 4.3 header compression
    link("4.3 header block that cannot be decoded", E.COMPRESSION_ERROR, lambda w: w.frame("HEADERS", 5, 1, b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x9c\x48\xac\x49\xff")),
    link("4.3 PRIORITY within a header block", E.PROTOCOL_ERROR, lambda w: begun(w) + w.frame("PRIORITY", 0, 1, bytes(5))),
    link("4.3 HEADERS of another stream within a header block", E.PROTOCOL_ERROR, lambda w: begun(w) + get(w, 3)),
    link("4.3 PING within a header block", E.PROTOCOL_ERROR, lambda w: begun(w) + w.frame("PING", 0, 0, bytes(8))),
    # 5.1 stream states
    link("5.1 idle: DATA", E.PROTOCOL_ERROR, lambda w: w.data(1, b"test", end=True)),
    link("5.1 idle: RST_STREAM", E.PROTOCOL_ERROR, lambda w: w.rst(1)),
    link("5.1 idle: WINDOW_UPDATE", E.PROTOCOL_ERROR, lambda w: w.window_update(1, 100)),
    link("5.1 idle: CONTINUATION", E.PROTOCOL_ERROR, lambda w: w.frame("CONTINUATION", 4, 1, w.block(w.plain_fields()))),
    stream("5.1 half-closed (remote): DATA", E.STREAM_CLOSED, lambda w: w.settings((4, 0)) + get(w) + w.data(1, b"test", end=True)),
    stream("5.1 half-closed (remote): HEADERS", E.STREAM_CLOSED, lambda w: w.settings((4, 0)) + get(w) + get(w)),
    link("5.1 half-closed (remote): CONTINUATION", E.PROTOCOL_ERROR, lambda w: w.settings((4, 0)) + get(w) + w.frame("CONTINUATION", 4, 1)),
    stream("5.1 closed by RST_STREAM: DATA", E.STREAM_CLOSED, lambda w: post(w) + w.rst(1) + w.data(1, b"test", end=True)),
    stream("5.1 closed by RST_STREAM: HEADERS", E.STREAM_CLOSED, lambda w: post(w) + w.rst(1) + get(w)),
    link("5.1 closed by RST_STREAM: CONTINUATION", E.PROTOCOL_ERROR, lambda w: post(w) + w.rst(1) + w.frame("CONTINUATION", 4, 1)),
    link("5.1 closed by END_STREAM: DATA", E.STREAM_CLOSED, lambda w: get(w) + w.data(1, b"test", end=True)),
    link("5.1 closed by END_STREAM: HEADERS", E.STREAM_CLOSED, lambda w: get(w) + get(w)),
    link("5.1 closed by END_STREAM: CONTINUATION", E.PROTOCOL_ERROR, lambda w: get(w) + w.frame("CONTINUATION", 4, 1)),
    # 5.1.1 identifiers
    link("5.1.1 even stream identifier", E.PROTOCOL_ERROR, lambda w: get(w, 2)),
    link("5.1.1 identifier below an earlier one", E.PROTOCOL_ERROR, lambda w: get(w, 5) + get(w, 3)),
    # 5.3.1 of RFC 7540 (priorities are deprecated, but a stream still cannot depend on itself)
    stream("5.3.1 HEADERS that depend on their own stream", E.PROTOCOL_ERROR, lambda w: w.frame("HEADERS", 0x25, 1, struct.pack(">IB", 1, 255) + w.block(w.plain_fields()))),
    link("5.3.1 PRIORITY of an idle stream on itself", E.PROTOCOL_ERROR, lambda w: w.frame("PRIORITY", 0, 1, struct.pack(">IB", 1, 255))),
    stream("5.3.1 PRIORITY of an open stream on itself", E.PROTOCOL_ERROR, lambda w: post(w) + w.frame("PRIORITY", 0, 1, struct.pack(">IB", 1, 255))),
    # 5.5 extensions
    link("5.5 unknown frame within a header block", E.PROTOCOL_ERROR, lambda w: begun(w) + w.frame(0x66, 0, 0, b"x")),
    # 6.1 DATA
    link("6.1 DATA on stream 0", E.PROTOCOL_ERROR, lambda w: w.data(0, b"test")),
    link("6.1 padding as long as the frame", E.PROTOCOL_ERROR, lambda w: post(w) + w.frame("DATA", 9, 1, b"\x05test")),
    link("6.1 padded DATA without the length of its padding", E.FRAME_SIZE_ERROR, lambda w: post(w) + w.frame("DATA", 9, 1)),
    # 6.2 HEADERS
    link("6.2 HEADERS on stream 0", E.PROTOCOL_ERROR, lambda w: get(w, 0)),
    link("6.2 padding longer than the frame", E.PROTOCOL_ERROR, lambda w: w.frame("HEADERS", 0xD, 1, b"\xff" + w.block(w.plain_fields()))),
    link("6.2 padding that eats the priority", E.PROTOCOL_ERROR, lambda w: w.frame("HEADERS", 0x2D, 1, b"\x04" + bytes(6))),
    link("6.2 too short for its priority", E.FRAME_SIZE_ERROR, lambda w: w.frame("HEADERS", 0x25, 1, b"\0\0\0")),
    # 6.3 PRIORITY
    link("6.3 PRIORITY on stream 0", E.PROTOCOL_ERROR, lambda w: w.frame("PRIORITY", 0, 0, bytes(5))),
    stream("6.3 PRIORITY of the wrong length on a closed stream", E.FRAME_SIZE_ERROR, lambda w: get(w) + w.frame("PRIORITY", 0, 1, bytes(4))),
    link("6.3 PRIORITY of the wrong length on an idle stream", E.FRAME_SIZE_ERROR, lambda w: w.frame("PRIORITY", 0, 1, bytes(4))),
    stream("6.3 PRIORITY of the wrong length", E.FRAME_SIZE_ERROR, lambda w: post(w) + w.frame("PRIORITY", 0, 1, bytes(4))),
    # 6.4 RST_STREAM
    link("6.4 RST_STREAM on stream 0", E.PROTOCOL_ERROR, lambda w: w.rst(0)),
    link("6.4 RST_STREAM of the wrong length", E.FRAME_SIZE_ERROR, lambda w: post(w) + w.frame("RST_STREAM", 0, 1, bytes(3))),
    # 6.5 SETTINGS
    link("6.5 acknowledgment with a payload", E.FRAME_SIZE_ERROR, lambda w: w.frame("SETTINGS", 1, 0, bytes(6))),
    link("6.5 SETTINGS on a stream", E.PROTOCOL_ERROR, lambda w: w.frame("SETTINGS", 0, 1)),
    link("6.5 length not a multiple of 6", E.FRAME_SIZE_ERROR, lambda w: w.frame("SETTINGS", 0, 0, bytes(3))),
    link("6.5.2 ENABLE_PUSH neither 0 nor 1", E.PROTOCOL_ERROR, lambda w: w.settings((2, 2))),
    link("6.5.2 INITIAL_WINDOW_SIZE above 2^31-1", E.FLOW_CONTROL_ERROR, lambda w: w.settings((4, 2**31))),
    link("6.5.2 MAX_FRAME_SIZE below the minimum", E.PROTOCOL_ERROR, lambda w: w.settings((5, 16_383))),
    link("6.5.2 MAX_FRAME_SIZE above the maximum", E.PROTOCOL_ERROR, lambda w: w.settings((5, 2**24))),
    # 6.6 PUSH_PROMISE
    link("6.6 a client cannot push", E.PROTOCOL_ERROR, lambda w: post(w) + w.frame("PUSH_PROMISE", 4, 1, struct.pack(">I", 2) + w.block(w.plain_fields()))),
    # 6.7 PING
    link("6.7 PING on a stream", E.PROTOCOL_ERROR, lambda w: w.frame("PING", 0, 1, bytes(8))),
    link("6.7 PING of the wrong length", E.FRAME_SIZE_ERROR, lambda w: w.frame("PING", 0, 0, bytes(6))),
    # 6.8 GOAWAY
    link("6.8 GOAWAY on a stream", E.PROTOCOL_ERROR, lambda w: w.frame("GOAWAY", 0, 1, bytes(8))),
    link("6.8 GOAWAY too short", E.FRAME_SIZE_ERROR, lambda w: w.frame("GOAWAY", 0, 0, bytes(7))),
    # 6.9 WINDOW_UPDATE
    link("6.9 increment 0 on the connection", E.PROTOCOL_ERROR, lambda w: w.window_update(0, 0)),
    stream("6.9 increment 0 on a stream", E.PROTOCOL_ERROR, lambda w: post(w) + w.window_update(1, 0)),
    link("6.9 wrong length", E.FRAME_SIZE_ERROR, lambda w: w.frame("WINDOW_UPDATE", 0, 0, bytes(3))),
    link("6.9.1 connection window above 2^31-1", E.FLOW_CONTROL_ERROR, lambda w: w.window_update(0, 2**31 - 1) * 2),
    stream("6.9.1 stream window above 2^31-1", E.FLOW_CONTROL_ERROR, lambda w: post(w) + w.window_update(1, 2**31 - 1) * 2),
    link("6.9.2 initial window lifts a stream above 2^31-1", E.FLOW_CONTROL_ERROR, lambda w: post(w) + w.window_update(1, 2**31 - 70_000) + w.settings((4, 2**31 - 1))),
    # 6.10 CONTINUATION
    link("6.10 CONTINUATION on stream 0", E.PROTOCOL_ERROR, lambda w: begun(w) + w.frame("CONTINUATION", 4, 0)),
    link("6.10 CONTINUATION of another stream", E.PROTOCOL_ERROR, lambda w: begun(w) + w.frame("CONTINUATION", 4, 3)),
    link("6.10 CONTINUATION after END_HEADERS", E.PROTOCOL_ERROR, lambda w: post(w) + w.frame("CONTINUATION", 4, 1)),
    link("6.10 CONTINUATION after END_HEADERS of a CONTINUATION", E.PROTOCOL_ERROR, lambda w: w.frame("HEADERS", 0, 1, w.block(w.plain_fields(POST))) + w.frame("CONTINUATION", 4, 1) + w.frame("CONTINUATION", 4, 1)),
    link("6.10 CONTINUATION after DATA", E.PROTOCOL_ERROR, lambda w: post(w) + w.data(1, b"test") + w.frame("CONTINUATION", 4, 1)),
    # 8.1 message exchange
    stream("8.1 second HEADERS without END_STREAM", E.PROTOCOL_ERROR, lambda w: post(w) + w.data(1, b"test") + w.headers(1, [("x-test", "ok")])),
    # 8.2.1, 8.2.2 field validity
    stream("8.2.1 upper-case name", E.PROTOCOL_ERROR, with_fields(("X-TEST", "ok"))),
    stream("8.2.1 space in a name", E.PROTOCOL_ERROR, with_fields(("x test", "ok"))),
    stream("8.2.1 colon within a name", E.PROTOCOL_ERROR, with_fields(("x:test", "ok"))),
    stream("8.2.1 empty name", E.PROTOCOL_ERROR, with_fields(("", "ok"))),
    stream("8.2.1 line feed in a value", E.PROTOCOL_ERROR, with_fields(("x-test", "a\nb"))),
    stream("8.2.1 NUL in a value", E.PROTOCOL_ERROR, with_fields(("x-test", "a\0b"))),
    stream("8.2.1 value begins with a space", E.PROTOCOL_ERROR, with_fields(("x-test", " a"))),
    stream("8.2.2 connection", E.PROTOCOL_ERROR, with_fields(("connection", "keep-alive"))),
    stream("8.2.2 keep-alive", E.PROTOCOL_ERROR, with_fields(("keep-alive", "5"))),
    stream("8.2.2 proxy-connection", E.PROTOCOL_ERROR, with_fields(("proxy-connection", "keep-alive"))),
    stream("8.2.2 transfer-encoding", E.PROTOCOL_ERROR, with_fields(("transfer-encoding", "chunked"))),
    stream("8.2.2 upgrade", E.PROTOCOL_ERROR, with_fields(("upgrade", "h2c"))),
    stream("8.2.2 te other than trailers", E.PROTOCOL_ERROR, with_fields(("te", "trailers, deflate"))),
    # 8.3 pseudo-header fields
    stream("8.3 unknown pseudo-header field", E.PROTOCOL_ERROR, with_fields((":test", "ok"))),
    stream("8.3 pseudo-header field of responses", E.PROTOCOL_ERROR, with_fields((":status", "200"))),
    stream("8.3 pseudo-header field in trailers", E.PROTOCOL_ERROR, lambda w: post(w) + w.headers(1, [(":method", "GET")], end=True)),
    stream("8.3 pseudo-header field after a regular one", E.PROTOCOL_ERROR, with_fields((":path", "/"), base=[*pseudo(path=None), ("x-test", "ok")])),
    stream("8.3.1 empty :path", E.PROTOCOL_ERROR, with_fields(base=pseudo(path=""))),
    stream("8.3.1 no :method", E.PROTOCOL_ERROR, with_fields(base=pseudo(method=None))),
    stream("8.3.1 no :scheme", E.PROTOCOL_ERROR, with_fields(base=pseudo(scheme=None))),
    stream("8.3.1 no :path", E.PROTOCOL_ERROR, with_fields(base=pseudo(path=None))),
    stream("8.3.1 :method twice", E.PROTOCOL_ERROR, with_fields((":method", "GET"))),
    stream("8.3.1 :scheme twice", E.PROTOCOL_ERROR, with_fields((":scheme", "http"))),
    stream("8.3.1 :path twice", E.PROTOCOL_ERROR, with_fields((":path", "/"))),
    stream("8.5 CONNECT with a path", E.PROTOCOL_ERROR, with_fields(base=pseudo(method="CONNECT"))),
    # 8.1.1 malformed messages
    stream("8.1.1 content-length not met by one DATA", E.PROTOCOL_ERROR, lambda w: post(w, content_length="1") + w.data(1, b"test", end=True)),
    stream("8.1.1 content-length exceeded before the end", E.PROTOCOL_ERROR, lambda w: post(w, content_length="1") + w.data(1, b"test")),
    stream("8.1.1 content-length not met by several DATA", E.PROTOCOL_ERROR, lambda w: post(w, content_length="9") + w.data(1, b"test") + w.data(1, b"test", end=True)),
    stream("8.1.1 content-length without a body", E.PROTOCOL_ERROR, lambda w: post(w, content_length="1", end=True)),
    stream("8.1.1 content-length not met before trailers", E.PROTOCOL_ERROR, lambda w: post(w, content_length="9") + w.data(1, b"test") + w.headers(1, [("x-t", "1")], end=True)),
    stream("8.1.1 content-length that is no number", E.PROTOCOL_ERROR, lambda w: post(w, content_length="4x")),
    stream("8.1.1 content-lengths that differ", E.PROTOCOL_ERROR, with_fields(("content-length", "0"), ("content-length", "1"))),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_breach_gets_the_error_that_the_rfc_asks_for(row, peer):
    received = peer.send(row.breach(peer.wire))
    last = received[-1]
    if row.error == "connection":
        assert (last.kind, last.code) == ("GOAWAY", row.code)
        assert peer.connection.closing
        assert peer.send(peer.wire.frame("PING", 0, 0, bytes(8))) == []
    else:
        assert (last.kind, last.stream_id, last.code) == ("RST_STREAM", 1, row.code)
        assert [frame.kind for frame in peer.send(peer.wire.frame("PING", 0, 0, bytes(8)))] == ["PING"]
        _assert_that_the_next_request_is_served(peer)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_breach_gets_the_same_error_when_its_bytes_come_one_by_one(row, new_peer):
    whole, piecewise = new_peer(), new_peer()
    breach = row.breach(whole.wire)
    expected = [(frame.kind, frame.payload) for frame in whole.send(breach)]
    got = [(f.kind, f.payload) for place in range(len(breach)) for f in piecewise.send(breach[place : place + 1])]
    assert got == expected


def _assert_that_the_next_request_is_served(peer, number: int = 101) -> None:
    wire = peer.wire
    received = peer.send(wire.settings((4, 65_535)), get(wire, number))
    assert [(f.kind, f.ends) for f in received if f.stream_id == number] == [("HEADERS", False), ("DATA", True)]


# 3.4 the preface


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"INVALID CONNECTION PREFACE\r\n\r\n", b"\0" * 30])
def test_anything_but_the_preface_ends_the_connection(first, new_peer):
    peer = new_peer(greet=False)
    assert [(f.kind, f.code) for f in peer.send(first)] == [("GOAWAY", E.PROTOCOL_ERROR)]


def test_the_preface_must_go_on_with_settings(new_peer):
    peer = new_peer(greet=False)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert [f.code for f in peer.send(preface, get(peer.wire))] == [E.PROTOCOL_ERROR]


def test_the_first_frame_we_send_is_settings_without_ack(new_peer):
    first = new_peer(greet=False).opening[0]
    assert (first.kind, first.flags, first.stream_id) == ("SETTINGS", 0, 0)


# What must be accepted.

ACCEPTED = {
    "4.1 undefined flags": lambda w: w.frame("PING", 0xFE, 0, bytes(8)),
    "4.1 reserved bit of the stream identifier": lambda w: w.frame("PING", 0, 2**31, bytes(8)),
    "4.1 unknown frame type": lambda w: w.frame(0xFA, 0, 0, bytes(8)),
    "4.2 the largest frame": lambda w: post(w) + w.data(1, bytes(16_384)),
    "5.1 PRIORITY of a closed stream on itself": lambda w: get(w) + w.frame("PRIORITY", 0, 1, struct.pack(">IB", 1, 255)),
    "6.3 PRIORITY on an idle stream, then a request on a lower one": lambda w: w.frame("PRIORITY", 0, 3, bytes(5)) + get(w),
    "5.1 PRIORITY on an idle stream": lambda w: w.frame("PRIORITY", 0, 1, bytes(5)),
    "5.1 PRIORITY on a closed stream": lambda w: get(w) + w.frame("PRIORITY", 0, 1, bytes(5)),
    "5.1 WINDOW_UPDATE on a closed stream": lambda w: get(w) + w.window_update(1, 5),
    "5.1 RST_STREAM on a closed stream": lambda w: get(w) + w.rst(1),
    "6.1 padded DATA": lambda w: post(w) + w.frame("DATA", 8, 1, b"\x03test\0\0\0"),
    "6.1 DATA that is only padding": lambda w: post(w) + w.frame("DATA", 8, 1, b"\x03\0\0\0"),
    "6.2 HEADERS with padding and priority": lambda w: w.frame("HEADERS", 0x2D, 1, b"\x02" + struct.pack(">IB", 0, 1) + w.block(w.plain_fields()) + b"\0\0"),
    "6.5 an unknown setting": lambda w: w.settings((0xFF, 1)),
    "6.5 settings for what we never do": lambda w: w.settings((1, 0), (2, 0), (3, 0), (6, 10)),
    "6.8 GOAWAY with an unknown code and debug data": lambda w: post(w) + w.frame("GOAWAY", 0, 0, struct.pack(">II", 0, 0xFF) + b"bye"),
    "6.10 several CONTINUATIONs": lambda w: w.frame("HEADERS", 1, 1, (b := w.block(w.plain_fields()))[:3]) + w.frame("CONTINUATION", 0, 1, b[3:5]) + w.frame("CONTINUATION", 0, 1) + w.frame("CONTINUATION", 4, 1, b[5:]),
    "7 RST_STREAM with an unknown code": lambda w: post(w) + w.rst(1, 0xFF),
    "8.1 trailers": lambda w: post(w) + w.data(1, b"test") + w.headers(1, [("x-test", "ok")], end=True),
    "8.1.1 content-length met": lambda w: post(w, content_length="4") + w.frame("DATA", 9, 1, b"\x03test\0\0\0"),
    "8.2.2 te: trailers": with_fields(("te", "trailers")),
    "8.5 CONNECT": with_fields(base=[(":method", "CONNECT"), (":authority", "a:1")]),
    "two equal content-lengths": with_fields(("content-length", "0"), ("content-length", "0")),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_rfc_allows_is_accepted(name, peer):
    received = peer.send(ACCEPTED[name](peer.wire), peer.wire.frame("PING", 0, 0, b"afterall"))
    assert not [frame for frame in received if frame.kind in ("GOAWAY", "RST_STREAM")]
    assert received[-1].kind == "PING"
    assert received[-1].payload == b"afterall"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_a_request_that_is_not_grpc_gets_a_whole_http_answer(method, peer):
    head, body = peer.send(peer.wire.headers(1, peer.wire.plain_fields(method), end=True))
    assert (head.headers[":status"], head.headers["content-length"]) == ("415", str(len(body.payload)))
    assert body.ends
    assert b"gRPC" in body.payload


def test_a_post_is_answered_when_its_body_is_complete(peer):
    assert peer.send(post(peer.wire), peer.wire.data(1, b"test")) == []
    assert [frame.kind for frame in peer.send(peer.wire.data(1, b"", end=True))] == ["HEADERS", "DATA"]


def test_a_head_request_is_answered_without_a_body(peer):
    (head,) = peer.send(peer.wire.headers(1, peer.wire.plain_fields("HEAD"), end=True))
    assert head.ends
    assert head.headers[":status"] == "415"


def test_grpc_by_another_method_than_post_is_answered_with_405(peer):
    fields = [(name, "GET" if name == ":method" else value) for name, value in peer.wire.grpc_fields()]
    head, _ = peer.send(peer.wire.headers(1, fields, end=True))
    assert head.headers[":status"] == "405"


def test_ping_is_answered_with_the_same_bytes_and_an_ack_is_not(peer):
    (pong,) = peer.send(peer.wire.frame("PING", 0, 0, b"12345678"))
    assert (pong.kind, pong.flags, pong.payload) == ("PING", 1, b"12345678")
    assert peer.send(peer.wire.frame("PING", 1, 0, b"12345678")) == []


def test_settings_are_acknowledged_once_each(peer):
    received = peer.send(peer.wire.settings((4, 100), (4, 1)), peer.wire.settings())
    assert [(f.kind, f.flags, f.payload) for f in received] == [("SETTINGS", 1, b"")] * 2


def test_the_stream_above_the_announced_limit_is_refused_and_the_others_go_on(new_peer):
    peer = new_peer(limits=Limits(max_concurrent_streams=10))
    announced = struct.unpack(">HI", peer.opening[0].payload[:6])
    assert announced == (3, 10)
    opened = b"".join(peer.wire.headers(number, peer.wire.grpc_fields()) for number in range(1, 23, 2))
    refused = [frame for frame in peer.send(opened) if frame.kind == "RST_STREAM"]
    assert [(frame.stream_id, frame.code) for frame in refused] == [(21, E.REFUSED_STREAM)]
    peer.send(peer.wire.rst(1))
    served = peer.send(peer.wire.headers(23, peer.wire.grpc_fields()), peer.wire.message(23, b"x"))
    assert [frame.kind for frame in served] == ["HEADERS", "DATA"]


def test_after_goaway_from_the_peer_open_streams_are_served_and_then_the_connection_ends(peer):
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.frame("GOAWAY", 0, 0, bytes(8)))
    assert not peer.connection.closing
    received = peer.send(wire.message(1, b"last", end=True))
    assert [frame.kind for frame in received] == ["HEADERS", "DATA", "HEADERS", "GOAWAY"]
    assert peer.connection.closing


def test_a_malformed_head_still_changes_the_header_table(new_peer):
    """The next block refers to an entry that the refused one put into the table."""
    peer = new_peer()
    malformed = b"\x82\x86\x84" + b"\x40\x06x-name\x05value" + b"\x00\x0aconnection\x05close"
    assert [f.kind for f in peer.send(peer.wire.frame("HEADERS", 5, 1, malformed))] == ["RST_STREAM"]
    received = peer.send(peer.wire.frame("HEADERS", 5, 3, b"\x82\x86\x84\xbe"))
    assert received[0].headers[":status"] == "415"

"""The short way for ordinary exchanges sends the bytes of the long way, and keeps no more than the client may."""

import random
import struct
from dataclasses import replace
from itertools import pairwise

import pytest

from extproc.transport.connection import Connection
from extproc.transport.limits import Limits

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GRPC = (
    b"\x83\x86\x00\x05:path\x34/envoy.service.ext_proc.v3.ExternalProcessor/Process"
    b"\x00\x0ccontent-type\x10application/grpc"
)
WITH_LENGTH = GRPC + b"\x00\x0econtent-length\x018"
BLOCKS = [GRPC, WITH_LENGTH, b"\x20" + GRPC, b"\x82\x86\x84"]
FIRST_FREE = 7
HEADERS, DATA, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 1, 0, 3, 4, 6, 7, 8


class LongWay(Connection):
    """Reads every frame by itself, as if none of them were ordinary."""

    __slots__ = ()

    def _ordinary(self, data: bytes, place: int) -> int:  # noqa: ARG002  the signature of the class
        return place


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream_id) + payload


def message(body: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(body)) + body


def request(stream_id: int, body: bytes, block: bytes = GRPC) -> bytes:
    return frame(HEADERS, 4, stream_id, block) + frame(DATA, 0, stream_id, message(body))


def end(stream_id: int) -> bytes:
    return frame(DATA, 1, stream_id)


OPENING = (
    PREFACE + frame(SETTINGS, 0, 0) + request(1, b"a") + frame(SETTINGS, 1, 0) * 2 + request(3, b"b", b"\x20" + GRPC)
    + request(5, b"c") + end(1) + end(3) + end(5)
)  # fmt: skip
"""After it the client has no header table, and its block is one that was seen before."""

SMALL = Limits(max_concurrent_streams=6, max_message_bytes=300, queued_bytes=20_000, allowance=2_000)
LIMITS = [SMALL, Limits(), replace(SMALL, max_message_bytes=12_000, connection_window_bytes=65_535)]


def session(chance: random.Random) -> bytes:
    """Mostly ordinary exchanges, with streams that go on, end otherwise, or should not be there."""
    frames: list[bytes] = []
    free, opened = FIRST_FREE, [1]
    weights = chance.choice([(50, 35, 4, 12, 0.5), (40, 20, 30, 2, 0), (50, 35, 0, 0, 6)])
    bodies = chance.choice([[b"x", b"y" * 30], [b"x", b"#", b"##", b"!bad", bytes(250), bytes(11_000)]])
    for _ in range(chance.randrange(60)):
        number = chance.choice(opened)
        match chance.choices(["request", "end", "reset", "unusual", "wrong"], weights)[0]:
            case "request":
                frames.append(request(free, chance.choice(bodies), chance.choices(BLOCKS, [20, 1, 1, 1])[0]))
                opened = [*opened[-7:], free]
                free += 2
            case "end":
                frames.append(end(number))
            case "reset":
                frames.append(frame(RST_STREAM, 0, number, bytes(4)))
            case "unusual":
                frames.append(unusual(number, chance))
            case "wrong":
                frames.append(wrong(chance.choice([number, free]), chance))
    return b"".join(frames)


def unusual(number: int, chance: random.Random) -> bytes:
    """What a client may do, but Envoy does not."""
    more = struct.pack(">I", chance.choice([1, 50, 9_000]))
    return chance.choice(
        [
            frame(DATA, 0, number, message(chance.choice([b"", b"again", b"#", bytes(11_000)]))),
            frame(DATA, 0, number, message(bytes(11_000))) * 3,
            frame(DATA, 1, number, message(b"the last")),
            frame(DATA, 0, number, message(b"in two")[:7]) + frame(DATA, 1, number, message(b"in two")[7:]),
            frame(DATA, 9, number, b"\x03pad"),
            frame(HEADERS, 5, number, b"\x00\x01a\x01b"),
            frame(HEADERS, 0, number, GRPC[:20]) + frame(9, 4, number, GRPC[20:]),
            frame(WINDOW_UPDATE, 0, chance.choice([0, number]), more),
            frame(SETTINGS, 0, 0, struct.pack(">HI", 4, chance.choice([0, 20, 40, 65_535]))),
            frame(PING, 0, 0, b"8 bytes."),
            frame(2, 0, number, bytes(5)),
            frame(99, 0, 0, b"unknown"),
            frame(GOAWAY, 0, 0, bytes(8)),
        ]
    )


def wrong(number: int, chance: random.Random) -> bytes:
    """What no client may do."""
    return chance.choice(
        [
            request(number, b"used before"),
            request(number + 1, b"even"),
            request(number | 1 << 31, b"reserved"),
            frame(DATA, 1, number | 1 << 31),
            frame(RST_STREAM, 0, number, bytes(5)),
            b"\x01\x00\x00" + end(number)[3:] + bytes(1 << 16),
            b"\x01\x00\x04" + frame(RST_STREAM, 0, number)[3:] + bytes((1 << 16) + 4),
            frame(WINDOW_UPDATE, 0, number, bytes(4)),
            frame(HEADERS, 0, number | 4096, GRPC[:20]) + end(number),
            b"\xff" * 9,
        ]
    )


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(8)))
    return [data[a:b] for a, b in pairwise([0, *places, len(data)])]


def answer(body: bytes) -> bytes:
    if body[:1] == b"!":
        raise ValueError("a broken promise")
    return bytes(len(body) * 9_000) if body in (b"#", b"##") else b"re:" + body


def sent_by(kind: type[Connection], pieces: list[bytes], limits: Limits) -> list[bytes]:
    connection = kind(answer, lambda: True, limits)
    sent = [connection.open() + connection.receive(OPENING)]
    for piece in pieces:
        sent.append(connection.receive(piece))
        streams = connection._streams
        assert streams.open.keys().isdisjoint(streams.brief)
        assert streams.under_way == connection.open_streams <= limits.max_concurrent_streams
    return [*sent, connection.drain()]


@pytest.mark.parametrize("limits", LIMITS, ids=["few streams", "defaults", "small window"])
def test_the_short_way_sends_what_the_long_way_sends(limits):
    for seed in range(1_500):
        chance = random.Random(seed)
        pieces = cut(session(chance), chance)
        assert sent_by(Connection, pieces, limits) == sent_by(LongWay, pieces, limits), seed


def test_an_answered_exchange_is_two_numbers_until_its_client_ends_it():
    connection = Connection(answer, lambda: True, Limits())
    connection.open()
    connection.receive(OPENING)
    connection.receive(b"".join(request(number, b"x") for number in range(7, 2007, 2)))
    assert (len(connection._streams.open), len(connection._streams.brief)) == (0, 1000)
    connection.receive(b"".join(end(number) for number in range(7, 2007, 2)))
    assert connection.open_streams == 0


def test_a_long_read_gives_back_the_window_as_often_as_it_must():
    """Ten connection windows in one read: each answer comes, and WINDOW_UPDATEs for nearly all that was used."""
    limits = replace(Limits(), connection_window_bytes=65_535)
    connection = Connection(answer, lambda: True, limits)
    connection.open()
    connection.receive(OPENING)
    body = bytes(6_000)
    rounds = [request(number, body) + end(number) for number in range(7, 227, 2)]
    sent = connection.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**20)) + b"".join(rounds))
    assert not connection.closing
    assert sent.count(b"re:" + body) == len(rounds)
    head = b"\x00\x00\x04\x08\x00\x00\x00\x00\x00"
    updates = [int.from_bytes(part[:4], "big") for part in sent.split(head)[1:]]
    assert len(rounds) * 6_005 - sum(updates) <= 65_535


def test_an_answer_that_fails_costs_its_stream_alone():
    connection = Connection(answer, lambda: True, Limits())
    connection.open()
    connection.receive(OPENING)
    sent = connection.receive(request(7, b"good") + request(9, b"!bad") + request(11, b"good"))
    assert sent.count(b"re:good") == 2
    assert b"the answer failed" in sent
    assert connection.open_streams == 2


def test_a_client_that_says_goodbye_is_let_go_with_its_last_exchange():
    for kind in (Connection, LongWay):
        connection = kind(answer, lambda: True, Limits())
        connection.open()
        connection.receive(OPENING + request(7, b"x") + request(9, b"y") + frame(GOAWAY, 0, 0, bytes(8)) + end(9))
        assert not connection.closing
        assert b"\x07\x00" in connection.receive(end(7))
        assert connection.closing


@pytest.mark.parametrize("count", [1_100, 2_045, 2_060, 2_500])
def test_how_an_old_stream_ended_is_forgotten_when_it_would_be_on_the_long_way(count):
    """Whatever was read at once: a late frame for an old stream costs the same."""
    data = b"".join(request(number, b"x") + end(number) for number in range(7, 7 + 2 * count, 2))
    late = frame(DATA, 1, 801, b"late")
    ping = frame(PING, 0, 0, b"8 bytes.")
    ways = [sent_by(kind, [data, ping, late], Limits())[-2] for kind in (Connection, LongWay)]
    cut_small = [data[at : at + 1_000] for at in range(0, len(data), 1_000)]
    ways.append(sent_by(Connection, [*cut_small, ping, late], Limits())[-2])
    assert ways[0] == ways[1] == ways[2]

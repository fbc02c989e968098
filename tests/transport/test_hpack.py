"""Header compression: the requirements of RFC 7541, giving up the dynamic table (RFC 9113 4.3.1), and the cache."""

import pytest
from hpack import Encoder

from extproc.transport.errors import ErrorCode

GET = b"\x82\x86\x84"  # :method GET, :scheme http, :path /

BROKEN = {
    "2.3.3 index above the static and dynamic table": b"\xff\x00" + GET,
    "2.3.3 name index above the tables": GET + b"\x7f\x0f\x01x",
    "4.2 table size update at the end of a block": GET + b"\x21",
    "5.1 integer without an end": GET + b"\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "5.2 string longer than its block": GET + b"\x00\x01x\x7f\x10value",
    "5.2 Huffman padding longer than 7 bits": GET + b"\x00\x85\xf2\xb2\x4a\x84\xff\x87\x49\x51\x71\x0b\xb4\xff\xff",
    "5.2 Huffman padding of zeroes": GET + b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90",
    "5.2 Huffman with the end-of-string symbol": GET + b"\x00\x85\xf2\xb2\x4a\x84\xff\x85\xff\xff\xff\xff\xfc",
    "6.1 index 0": GET + b"\x80",
    "6.3 table size update above the setting": b"\x3f\xe2\x1f" + GET,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_block_that_cannot_be_decoded_is_a_compression_error_of_the_connection(name, peer):
    (last,) = peer.send(peer.wire.frame("HEADERS", 5, 1, BROKEN[name]))
    assert (last.kind, last.code) == ("GOAWAY", ErrorCode.COMPRESSION_ERROR)


ALLOWED = {
    "6.1 indexed": GET + b"\xba",  # user-agent of the static table
    "6.2.1 incremental indexing, name indexed": GET + b"\x7a\x06h2test",
    "6.2.1 incremental indexing, new name": GET + b"\x40\x06x-test\x06h2test",
    "6.2.1 incremental indexing, Huffman": GET + b"\x40\x85\xf2\xb2\x4a\x84\xff\x84\x9c\x48\xac\xa4",
    "6.2.2 without indexing": GET + b"\x00\x06x-test\x06h2test",
    "6.2.3 never indexed": GET + b"\x10\x06x-test\x06h2test",
    "6.3 table size update": b"\x20" + GET,
    "4.2 two table size updates": b"\x20\x3f\xe1\x1f" + GET,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_every_representation_is_understood(name, peer):
    assert peer.send(peer.wire.frame("HEADERS", 5, 1, ALLOWED[name]))[0].headers[":status"] == "415"


def block_of(encoder: Encoder, wire) -> bytes:
    return encoder.encode(wire.grpc_fields())


def test_the_first_grpc_request_is_answered_with_the_wish_for_no_table_and_a_probe_is_not(new_peer):
    probe, grpc = new_peer(), new_peer()
    assert "SETTINGS" not in [f.kind for f in probe.send(probe.wire.headers(1, probe.wire.plain_fields(), end=True))]
    (wish,) = grpc.send(grpc.wire.headers(1, grpc.wire.grpc_fields()))
    assert (wish.kind, wish.flags, wish.payload) == ("SETTINGS", 0, b"\x00\x01\x00\x00\x00\x00")
    assert grpc.send(grpc.wire.headers(3, grpc.wire.grpc_fields())) == []


def test_a_peer_may_use_its_table_until_it_acknowledges_and_must_shrink_it_then(new_peer):
    peer, encoder = new_peer(), Encoder()
    wire = peer.wire
    for number in (1, 3, 5):  # the second and third refer to the table that the first filled
        received = peer.send(wire.frame("HEADERS", 4, number, block_of(encoder, wire)), wire.message(number, b"x"))
        assert [f.kind for f in received if f.stream_id == number] == ["HEADERS", "DATA"]
    encoder.header_table_size = 0
    shrunk = block_of(encoder, wire)
    assert shrunk.startswith(b"\x20")
    received = peer.send(wire.settings(flags=1), wire.frame("HEADERS", 4, 7, shrunk), wire.message(7, b"x"))
    assert [f.kind for f in received] == ["HEADERS", "DATA"]


def test_a_peer_that_acknowledges_and_does_not_shrink_its_table_is_cut_off(new_peer):
    peer, encoder = new_peer(), Encoder()
    wire = peer.wire
    peer.send(wire.frame("HEADERS", 4, 1, block_of(encoder, wire)), wire.settings(flags=1))
    (last,) = peer.send(wire.frame("HEADERS", 4, 3, block_of(encoder, wire)))
    assert (last.kind, last.code) == ("GOAWAY", ErrorCode.COMPRESSION_ERROR)


def test_a_table_that_was_given_up_cannot_be_taken_back(new_peer):
    peer = new_peer()
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.settings(flags=1))
    peer.send(wire.frame("HEADERS", 4, 3, b"\x20" + wire.block(wire.grpc_fields())))
    (last,) = peer.send(wire.frame("HEADERS", 4, 5, b"\x3f\xe1\x1f" + wire.block(wire.grpc_fields())))
    assert (last.kind, last.code) == ("GOAWAY", ErrorCode.COMPRESSION_ERROR)


def stateless(peer) -> None:
    """Through the steps after which blocks may be remembered."""
    wire = peer.wire
    peer.send(wire.headers(1, wire.grpc_fields()), wire.settings(flags=1), wire.rst(1))
    peer.send(wire.frame("HEADERS", 4, 3, b"\x20" + wire.block(wire.grpc_fields())), wire.rst(3))


def test_a_block_is_remembered_only_once_the_table_is_gone(new_peer):
    peer = new_peer()
    wire, heads = peer.wire, peer.connection._heads
    for number in (1, 3, 5):
        peer.send(wire.headers(number, wire.grpc_fields()), wire.rst(number))
        assert not heads.known
    peer.send(wire.settings(flags=1), wire.frame("HEADERS", 4, 7, b"\x20" + wire.block(wire.grpc_fields())))
    peer.send(wire.headers(9, wire.grpc_fields()))
    assert wire.block(wire.grpc_fields()) in heads.known


def test_a_remembered_block_means_the_same_as_a_decoded_one(new_peer):
    peer = new_peer()
    stateless(peer)
    wire, number = peer.wire, 3
    for fields in (wire.grpc_fields(), wire.plain_fields(), wire.grpc_fields("/a/b")):
        seen = []
        for _ in range(3):
            number += 2
            received = peer.send(wire.headers(number, fields), wire.data(number, b"\0\0\0\0\x01m", end=True))
            seen.append([(f.kind, f.headers) for f in received if f.stream_id == number])
        assert seen[0]
        assert seen == [seen[0]] * 3


def test_a_block_with_a_fault_is_remembered_with_its_fault(new_peer):
    peer = new_peer()
    stateless(peer)
    wire = peer.wire
    for number in (5, 7, 9):
        (reset,) = peer.send(wire.headers(number, [*wire.grpc_fields(), ("connection", "close")]))
        assert (reset.kind, reset.code) == ("RST_STREAM", ErrorCode.PROTOCOL_ERROR)


def test_the_memory_of_blocks_is_bounded_in_number_and_size(new_peer):
    peer = new_peer()
    stateless(peer)
    wire, known = peer.wire, peer.connection._heads.known
    for number in range(600):
        peer.send(wire.headers(5 + 2 * number, wire.grpc_fields(x_n=str(number))), wire.rst(5 + 2 * number))
        assert len(known) <= 256
    peer.send(wire.headers(9001, wire.grpc_fields(x_long="v" * 5000)))
    assert max(map(len, known)) <= 1024

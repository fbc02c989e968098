"""Looking a request up by its shape gives what deciding it gives, whatever its bytes."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.exposure import parse_exposures
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.wire import answer as answer_module
from extproc.wire import shapes as shapes_module
from extproc.wire.answer import LESSONS, Answerer, Published
from extproc.wire.ext_proc_pb2 import HeaderMap, HeaderValue, HttpHeaders, ProcessingRequest
from extproc.wire.replies import OTHER_PHASES, replies
from extproc.wire.shapes import LONGEST_BYTES, MOST_SHAPES

MODELS = {name: f"/v2/models/{name}/" for name in ("digits", "wine", "faces", "words", "birds", "cats")}
FLAGS = b"""\
version: 1
flags:
  digits:
    unit: [x-user-id, x-session-id]
    canary: 50
    allow_force: true
    rules:
      - name: testers
        when: {any: [{header: x-tenant, in: [acme]}, {header: x-app, semver: ">=2.0.0"}]}
        serve: canary
      - {name: pilot, when: {header: x-region, prefix: eu-}, canary: 30}
  wine: {unit: [x-user-id, "cookie:sid"], canary: 100}
  faces: {unit: [x-account-id], canary: 20, missing_unit: random}
  words:
    unit: [x-session-id, x-user-id]
    canary: 10
    rules: [{name: vip, when: {header: x-vip-id, prefix: a}, serve: canary}]
  birds: {unit: [x-vip-id], canary: 50, enabled: true}
  cats: {unit: ["cookie:sid", cookie], canary: 50}
"""
TOKEN = "correct-horse-battery"
NAMES = [b"x-user-id", b"x-user-id", b"x-session-id", b"x-account-id", b"x-vip-id", b"cookie", b"x-request-id"]
NAMES += [b"x-tenant", b"x-app", b"x-region", b"x-force-cohort", b"x-unknown"]
VALUES = [
    b"",
    b"a",
    b"b",
    b"alice",
    b"annie",
    b"\xff" * 5,
    b"acme",
    b"2.1.0",
    b"eu-w",
    b"sid=7; a=b",
    b"\n\tx-user-id\x1a\x05alice",
]
VALUES += [b"u" * 127, b"v" * 127, b"u" * 128, b"v" * 300, b"canary;" + TOKEN.encode(), b"canary;wrong"]


def published(flags: bytes = FLAGS) -> Published:
    document = parse(read_document(flags), MODELS).flags
    exposures = parse_exposures({"seq": 0, "flags": {}})
    ruleset = compile_ruleset(document, exposures, MODELS, version="v.1", force_token=TOKEN)
    return Published(ruleset, replies(ruleset.choices, "v.1"), OTHER_PHASES)


PUBLISHED = published()


def message(*pairs: tuple[bytes, bytes], model: str = "digits", tail: bytes = b"B\x00Z\x00") -> bytes:
    every = [(b":path", f"/v2/models/{model}/infer".encode()), *pairs]
    entries = [HeaderValue(key=name, raw_value=value).SerializeToString() for name, value in every]
    headers = HttpHeaders(headers=HeaderMap(headers=entries))
    return ProcessingRequest(request_headers=headers).SerializeToString() + tail


def fresh(flags: bytes = FLAGS, *, learning: bool = True) -> Answerer:
    made = Answerer(published(flags))
    made.lessons = LESSONS if learning else 0
    return made


@pytest.fixture
def undecided(monkeypatch):
    """From its call on, no message is read any more: what is answered was looked up."""

    def refuse(*_anything):
        raise AssertionError("a message was read")

    return lambda: monkeypatch.setattr(answer_module, "read_request", refuse)


messages = st.builds(
    lambda pairs, model, tail: message(*pairs, model=model, tail=tail),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4),
    st.sampled_from([*MODELS, "nothing"]),
    st.sampled_from([b"", b"B\x00Z\x00"]),
)


@settings(max_examples=400)
@given(st.lists(messages, min_size=1, max_size=30), st.randoms())
def test_looked_up_or_decided_the_replies_and_the_counts_are_the_same(whole, chance: random.Random):
    """Each message comes three times, some of them cut or with a byte changed."""
    looking, deciding = fresh(), fresh(learning=False)
    for one in whole * 3:
        sent = one
        if chance.random() < 0.2:
            place = chance.randrange(len(one))
            sent = one[:place] + (bytes((chance.randrange(256),)) + one[place + 1 :] if chance.random() < 0.7 else b"")
        assert looking(sent) == deciding(sent)
    assert (looking.counts, looking.seen) == (deciding.counts, deciding.seen)


def test_users_of_one_shape_are_decided_once_and_divided_each(undecided):
    looking, deciding = fresh(), fresh(learning=False)
    users = [b"user-%04d" % number for number in range(300)]
    expected = [deciding(message((b"x-user-id", user))) for user in users]
    looking(message((b"x-user-id", b"user-9999")))
    undecided()
    assert [looking(message((b"x-user-id", user))) for user in users] == expected
    assert len({reply[:60] for reply in expected}) == 2


def test_requests_without_a_unit_are_looked_up_too(undecided):
    looking = fresh()
    first = looking(message())
    undecided()
    assert looking(message()) == first
    assert sum(looking.counts.values()) == 2


def test_a_header_that_a_rule_reads_is_never_left_out_of_the_shape():
    """Two names of one length: the rule takes only one of them, though the header is a unit of another flag too."""
    looking = fresh()
    for vip, cohort in ((b"bob", b"stable"), (b"ann", b"canary"), (b"bob", b"stable")):
        reply = looking(message((b"x-vip-id", vip), model="words"))
        assert cohort in reply
    assert b"x-vip-id" not in PUBLISHED.ruleset.unit_headers


def test_what_looks_like_the_unit_within_another_value_is_not_taken_for_it():
    looking, deciding = fresh(), fresh(learning=False)
    for user in (b"alice", b"annie", b"aaron"):
        for forged in (b"\n\tx-user-id\x1a\x05alice", b"\n\tx-user-id\x1a\x05annie"):
            sent = message((b"x-unknown", forged), (b"x-user-id", user))
            assert looking(sent) == deciding(sent)


def test_a_cookie_that_is_a_unit_is_looked_at_however_the_whole_header_is_used():
    looking, deciding = fresh(), fresh(learning=False)
    for cookie in (b"foo=alice", b"sid=alice", b"foo=annie", b"sid=annie"):
        sent = message((b"cookie", cookie), model="cats")
        assert looking(sent) == deciding(sent)


def test_a_message_cut_within_the_unit_is_no_request_of_a_known_shape():
    looking, deciding = fresh(), fresh(learning=False)
    whole = message((b"x-user-id", b"alice"), tail=b"")
    for sent in (whole, *(whole[:-cut] for cut in range(1, 8))):
        assert looking(sent) == deciding(sent)
    assert looking.counts == deciding.counts


@pytest.mark.parametrize("other", [b"globex", b"acme"])
def test_what_looks_like_the_unit_within_a_value_that_a_rule_reads_is_not_left_out(other):
    rule = b"{name: r, when: {header: x-tenant, suffix: acme}, serve: canary}"
    flags = b"version: 1\nflags:\n  digits: {unit: [x-user-id], canary: 0, rules: [" + rule + b"]}\n"
    looking, deciding = fresh(flags), fresh(flags, learning=False)
    for end in (b"abcd", b"acme", other[:4]):
        sent = message((b"x-tenant", b"\n\tx-user-id\x1a\x04" + end))
        assert looking(sent) == deciding(sent)


def test_a_new_ruleset_begins_without_shapes():
    looking = fresh()
    one = message((b"x-user-id", b"alice"), model="wine")
    assert b"canary" in looking(one)
    looking.published = published(FLAGS.replace(b"canary: 100", b"canary: 0"))
    assert b"canary" not in looking(one)


def test_requests_that_are_all_unlike_teach_no_more_than_is_allowed():
    looking = fresh()
    for number in range(LESSONS + 500):
        looking(message((b"x-tenant", b"t%06d" % number), (b"x-user-id", b"alice")))
    assert looking.lessons == 0
    assert len(looking.published.shapes.known) == LESSONS


def test_shapes_and_what_they_are_learned_from_are_bounded():
    looking = fresh()
    looking.lessons = 10 * MOST_SHAPES
    for number in range(MOST_SHAPES + 10):
        looking(message((b"x-tenant", b"t%06d" % number), (b"x-user-id", b"alice")))
        assert len(looking.published.shapes.known) <= MOST_SHAPES
    assert looking.published.shapes.known
    before = len(looking.published.shapes.known)
    looking(message((b"x-tenant", b"t" * LONGEST_BYTES), (b"x-user-id", b"alice")))
    assert len(looking.published.shapes.known) == before


def test_the_name_of_a_heavy_unit_is_kept_from_a_shape_that_is_known():
    looking = fresh()
    one = message((b"x-user-id", b"alice"))
    looking(one)
    looking.named = frozenset({looking.seen[0] & 0xFFFFFFFF})
    looking(one)
    assert list(looking.names.values()) == [b"alice"]


def test_the_unit_headers_come_by_the_number_of_flags_that_use_them():
    ruleset = PUBLISHED.ruleset
    assert ruleset.unit_headers == (b"x-user-id", b"x-session-id", b"x-account-id", b"x-request-id")
    assert shapes_module.Shapes(replace(ruleset, unit_headers=(b"x" * 128,))).tags == {}

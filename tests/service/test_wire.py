"""Bytes to bytes: what Envoy may send, what it must never get back, and that nothing else comes out."""

import random
import struct

import pytest
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderMap,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from envoy_data_plane.google.protobuf import Struct, Value
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.exposure import parse_exposures
from extproc.core.flags import Arm
from extproc.core.ruleset import Choice, Reason, compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import read_document
from extproc.wire import ext_proc_pb2
from extproc.wire.answer import Answerer, Published
from extproc.wire.replies import HASHED, OTHER_PHASES, replies, reply
from extproc.wire.requests import read_headers

MODELS = {"digits": "/v2/models/digits/", "wine": "/v2/models/wine/"}
FLAGS = b"""\
version: 1
flags:
  digits: {canary: 50, unit: [x-user-id, "cookie:sid"], allow_force: true}
  wine: {canary: 100}
"""
DIGITS, WINE, ELSEWHERE = b"/v2/models/digits/infer", b"/v2/models/wine/infer", b"/metrics"


def answerer(content: bytes = FLAGS, version: str = "abc.1", **flags: dict) -> Answerer:
    exposures = parse_exposures({"seq": 1, "flags": flags})
    flags = parse(read_document(content), MODELS).flags
    ruleset = compile_ruleset(flags, exposures, MODELS, version=version, force_token="correct-horse-battery")
    return Answerer(Published(ruleset, replies(ruleset.choices, version), OTHER_PHASES))


ANSWER = answerer()


def field(number: int, content: bytes, wire_type: int = 2) -> bytes:
    """One protobuf field, written by hand."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    return varint(number << 3 | wire_type) + (varint(len(content)) if wire_type == 2 else b"") + content


def header(name: bytes, value: bytes, *, raw: bool = True) -> bytes:
    """A HeaderValue by hand: its name need not be text."""
    return field(1, field(1, name) + field(3 if raw else 2, value))


def headers_request(*headers: bytes) -> bytes:
    return field(2, field(1, b"".join(headers)))


def user_request(path: bytes, *pairs: tuple[bytes, bytes]) -> bytes:
    return headers_request(header(b":path", path), *(header(*pair) for pair in pairs))


# What comes out.


def test_the_reply_sets_the_cohort_in_raw_value_and_has_the_route_picked_again(service, murmur3):
    for i in range(200):
        user = b"user-%d" % i
        got = service.decode(ANSWER(user_request(DIGITS, (b"x-user-id", user))))
        unit_hash = murmur3(b"digits:" + user, 0)
        assert got.cohort == ("canary" if unit_hash * 100_000 >> 32 < 50_000 else "stable")
        assert got.clears_route_cache
        assert got.metadata == {
            "flag": "digits", "model": "digits", "cohort": got.cohort, "reason": "SPLIT", "version": "abc.1",
            "hash": unit_hash,
        }  # fmt: skip


def test_a_reply_without_a_unit_has_no_hash_and_no_empty_entries(service):
    got = service.decode(ANSWER(user_request(ELSEWHERE)))
    assert got.metadata == {"cohort": "stable", "reason": "DEFAULT", "version": "abc.1"}
    got = service.decode(ANSWER(user_request(WINE)))
    assert got.metadata == {
        "flag": "wine", "model": "wine", "cohort": "canary", "reason": "NO_UNIT", "version": "abc.1",
    }  # fmt: skip


def whole_message(choice: Choice, version: str, unit_hash: int | None) -> bytes:
    """The same reply, built at once with envoy-data-plane's types."""
    texts = {
        "flag": choice.flag, "model": choice.model, "cohort": choice.cohort.value, "reason": choice.reason.value,
        "rule": choice.rule, "version": version,
    }  # fmt: skip
    fields = {key: Value(string_value=text) for key, text in texts.items() if text}
    if unit_hash is not None:
        fields["hash"] = Value(number_value=float(unit_hash))
    option = HeaderValueOption(
        header=HeaderValue(key="x-model-cohort", raw_value=choice.cohort.value.encode()),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    change = CommonResponse(header_mutation=HeaderMutation(set_headers=[option]), clear_route_cache=True)
    return bytes(
        ProcessingResponse(
            request_headers=HeadersResponse(response=change),
            dynamic_metadata=Struct(fields={"perch": Value(struct_value=Struct(fields=fields))}),
        )
    )


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@settings(max_examples=200, deadline=None)
@given(
    choice=st.builds(
        Choice, index=st.just(0), flag=TEXTS, model=TEXTS, cohort=st.sampled_from(Arm), reason=st.sampled_from(Reason),
        rule=TEXTS,
    ),
    version=TEXTS,
    unit_hash=st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_joined_pieces_are_the_message_that_the_types_build_whole(choice, version, unit_hash):
    hashed = choice.reason in HASHED
    joined = reply(choice, version) + (struct.pack("<d", unit_hash) if hashed else b"")
    whole = whole_message(choice, version, unit_hash if hashed else None)
    assert ProcessingResponse.parse(joined) == ProcessingResponse.parse(whole)
    assert len(joined) < 16_384 + len(whole)


@pytest.mark.parametrize("unit_hash", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 4_294_967_291])
def test_the_hash_goes_into_its_slot_exactly(service, unit_hash):
    choice = Choice(0, "digits", "digits", Arm.CANARY, Reason.SPLIT)
    got = service.decode(reply(choice, "v") + struct.pack("<d", unit_hash))
    assert got.metadata["hash"] == unit_hash


def test_every_choice_has_the_reply_of_its_own_index(service):
    ruleset = ANSWER.published.ruleset
    assert len(ANSWER.published.replies) == len(ruleset.choices)
    for choice, start in zip(ruleset.choices, ANSWER.published.replies, strict=True):
        hashed = choice.reason in HASHED
        metadata = service.decode(start + struct.pack("<d", 7) * hashed).metadata
        assert (metadata["cohort"], metadata["reason"]) == (choice.cohort.value, choice.reason.value)
        assert (metadata.get("flag", ""), metadata.get("model", "")) == (choice.flag, choice.model)
        assert ("hash" in metadata) == hashed


# What comes in: messages as Envoy's types build them.


def test_values_are_read_from_raw_value_and_from_value(service):
    """Envoy fills raw_value; older ones filled value."""
    by_raw, by_value = (
        headers_request(header(b":path", DIGITS, raw=raw), header(b"x-user-id", b"alice", raw=raw))
        for raw in (True, False)
    )
    assert service.decode(ANSWER(by_raw)) == service.decode(ANSWER(by_value))
    assert service.decode(ANSWER(by_raw)).what[1] == "SPLIT"


def test_a_message_as_envoys_types_build_it_is_understood_whole(service):
    headers = [
        HeaderValue(key=":path", raw_value=DIGITS),
        HeaderValue(key="x-user-id", raw_value=b"alice"),
        HeaderValue(key="x-empty", raw_value=b""),
    ]
    message = ProcessingRequest(
        request_headers=HttpHeaders(headers=HeaderMap(headers=headers), end_of_stream=True),
        attributes={"envoy.filters.http.ext_proc": Struct(fields={"a": Value(number_value=1.0)})},
        observability_mode=True,
    )
    expected = service.decode(ANSWER(user_request(DIGITS, (b"x-user-id", b"alice"))))
    assert service.decode(ANSWER(bytes(message))) == expected


def read_as_the_runtime_does(entry):
    try:
        parsed = ext_proc_pb2.HeaderValue.FromString(entry)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_headers([entry])
        return
    assert read_headers([entry]).headers == {parsed.key: parsed.raw_value or parsed.value}


texts = st.one_of(st.binary(max_size=20), st.sampled_from([b"", b"x" * 127, b"y" * 128, b"z" * 300, b"\n\x1a"]))


@given(st.lists(st.tuples(texts, texts, st.sampled_from(["key", "value", "raw_value"])), max_size=4), st.randoms())
def test_a_header_is_read_as_its_bytes_say_whatever_their_order_and_length(fields, chance):
    """Against the C runtime, field by field, over cut, mutated, repeated and reversed fields."""
    plain = {"key": b"x-user-id", "raw_value": b"".join(text for _, text, _ in fields)}
    parts = [{name: text} for text, _, name in fields] + [plain]
    entry = b"".join(ext_proc_pb2.HeaderValue(**part).SerializeToString() for part in parts)
    if chance.random() < 0.5:
        place = chance.randrange(len(entry))
        entry = entry[:place] + bytes((chance.randrange(256),)) + entry[place + chance.randrange(2) :]
    read_as_the_runtime_does(entry)


@pytest.mark.parametrize("entry", [b"", b"\n", b"\n\x01", b"\n\x01a", b"\n\x01a\x1a", b"\n\x00\x1a\x00", b"\x1a\x01a"])
def test_a_header_of_a_few_bytes_is_read_or_refused_like_any_other(entry):
    read_as_the_runtime_does(entry)


PHASES = {
    "response_headers": ProcessingRequest(response_headers=HttpHeaders()),
    "request_body": ProcessingRequest(request_body=HttpBody(body=b"\xff" * 100, end_of_stream=True)),
    "response_body": ProcessingRequest(response_body=HttpBody()),
    "request_trailers": ProcessingRequest(request_trailers=HttpTrailers()),
    "response_trailers": ProcessingRequest(response_trailers=HttpTrailers()),
}


@pytest.mark.parametrize("phase", PHASES)
def test_another_phase_gets_its_own_kind_of_reply_which_changes_nothing(phase):
    before = dict(ANSWER.counts) if isinstance(ANSWER.counts, dict) else list(ANSWER.counts)
    got = ProcessingResponse.parse(ANSWER(bytes(PHASES[phase])))
    assert getattr(got, phase) is not None
    assert got.request_headers is None
    assert got.dynamic_metadata is None
    assert bytes(getattr(got, phase)) == b""
    assert ANSWER.counts == before


# What comes in: anything.


def one_reply(service, message: bytes):
    """The reply, which is one whole ProcessingResponse of a kind that Envoy knows."""
    got = ANSWER(message)
    assert got
    parsed = ProcessingResponse.parse(got)
    kinds = ["request_headers", *OTHER_PHASES]
    assert sum(getattr(parsed, kind) is not None for kind in kinds) == 1
    return service.decode(got) if parsed.request_headers is not None else None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_gets_one_reply_that_is_never_canary(service, message):
    got = one_reply(service, message)
    assert got is None or got.cohort == "stable"


def test_an_empty_message_gets_stable_and_error(service):
    assert one_reply(service, b"").what == ("stable", "ERROR")


def test_a_message_cut_at_any_length_gets_the_right_cohort_or_stable(service):
    for user in (b"alice", b"bob", b"carol", b"dave"):
        message = user_request(DIGITS, (b"x-user-id", user), (b"cookie", b"sid=1"))
        right = service.decode(ANSWER(message)).cohort
        for length in range(len(message)):
            assert one_reply(service, message[:length]).cohort in {"stable", right}


def test_a_message_with_any_byte_changed_gets_one_reply(service):
    message = user_request(DIGITS, (b"x-user-id", b"alice"), (b"x-force-cohort", b"canary;wrong"))
    for i in range(len(message)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, message[i] ^ 0x08):
            one_reply(service, message[:i] + bytes([value]) + message[i + 1 :])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b":path", b"x-user-id", b"cookie", b"x-force-cohort"]) | st.binary(max_size=20),
            st.binary(max_size=60) | st.sampled_from([DIGITS, WINE, b"", b"alice"]),
        ),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_fields_that_perch_does_not_know_change_nothing(service, pairs, chance):
    """Unknown fields are sprinkled over every level, as a newer Envoy would."""

    def noise() -> bytes:
        number = chance.choice([19, 500, 20_000, 536_870_911])
        kind = chance.choice([0, 1, 2, 5])
        size = {0: 1, 1: 8, 2: chance.randrange(30), 5: 4}[kind]
        content = bytes(chance.randrange(128) for _ in range(size))
        return field(number, content, kind) * chance.randrange(2)

    plain = headers_request(*(header(*pair) for pair in pairs))
    noisy_headers = b"".join(
        noise() + field(1, noise() + field(1, name) + noise() + field(3, value) + noise()) for name, value in pairs
    )
    noisy = noise() + field(2, noise() + field(1, noisy_headers + noise()) + noise()) + noise()
    assert ANSWER(noisy) == ANSWER(plain)


def test_a_field_of_the_wrong_type_is_skipped_like_an_unknown_one(service):
    good = user_request(DIGITS, (b"x-user-id", b"alice"))
    for wrong in (field(2, b"\x05", 0), field(2, b"\0" * 8, 1), field(2, b"\0" * 4, 5), field(9, b"\0" * 4, 5)):
        assert ANSWER(wrong + good) == ANSWER(good + wrong) == ANSWER(good)


def test_of_two_phases_in_one_message_the_last_one_counts_and_gets_the_one_reply(service):
    headers, body = user_request(DIGITS, (b"x-user-id", b"alice")), bytes(PHASES["request_body"])
    assert ANSWER(body + headers) == ANSWER(headers)
    assert ANSWER(headers + body) == ANSWER(body)


def test_a_phase_that_is_not_known_yet_gets_stable_and_error(service):
    assert one_reply(service, field(99, b"future")).what == ("stable", "ERROR")


def test_headers_in_two_pieces_are_one_request(service):
    pieces = headers_request(header(b":path", DIGITS)) + headers_request(header(b"x-user-id", b"alice"))
    assert ANSWER(pieces) == ANSWER(user_request(DIGITS, (b"x-user-id", b"alice")))


def test_groups_nested_without_end_are_unreadable_and_nothing_worse(service):
    assert one_reply(service, b"\x0b" * 100_000).what == ("stable", "ERROR")
    assert one_reply(service, b"\x0b" * 40 + b"\x0c" * 40).what == ("stable", "ERROR")


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 65_536, 900_000])
def test_a_header_of_any_size_is_hashed_whole(service, murmur3, size):
    unit = random.Random(size).randbytes(size)
    got = service.decode(ANSWER(user_request(DIGITS, (b"x-user-id", unit))))
    if size == 0:
        assert got.what == ("stable", "NO_UNIT")
    else:
        assert got.metadata["hash"] == murmur3(b"digits:" + unit, 0)


def test_duplicate_empty_and_non_utf_8_units_get_what_the_contract_says(service, murmur3):
    cases = {
        ((b"x-user-id", b"a"), (b"x-user-id", b"a")): "AMBIGUOUS_UNIT",
        ((b"x-user-id", b""), (b"x-user-id", b"b")): "AMBIGUOUS_UNIT",
        ((b"x-user-id", b""),): "NO_UNIT",
        ((b"x-user-id", b""), (b"x-user-id", b"")): "NO_UNIT",
        ((b"x-user-id", b""), (b"cookie", b"sid=\xff\xfe")): "SPLIT",
        ((b"x-user-id", b"\xff\xfe\x00"),): "SPLIT",
    }
    for pairs, reason in cases.items():
        got = service.decode(ANSWER(user_request(DIGITS, *pairs)))
        assert got.what[1] == reason, pairs
        assert got.cohort == "stable" or reason == "SPLIT"
    unit = b"\xff\xfe\x00"
    assert service.decode(ANSWER(user_request(DIGITS, (b"x-user-id", unit)))).metadata["hash"] == murmur3(
        b"digits:" + unit, 0
    )


def test_names_of_headers_that_are_no_text_disturb_nobody(service):
    message = user_request(DIGITS, (b"\xff\xfe", b"x"), (b"x-user-id", b"alice"), (b"", b""), (b"\x00", b"\x00"))
    assert ANSWER(message) == ANSWER(user_request(DIGITS, (b"x-user-id", b"alice")))


def test_ten_thousand_headers_are_read(service):
    noise = [(b"x-noise-%d" % i, b"v") for i in range(10_000)]
    message = user_request(DIGITS, *noise, (b"x-user-id", b"alice"))
    assert ANSWER(message) == ANSWER(user_request(DIGITS, (b"x-user-id", b"alice")))


# Publishing.


def test_the_next_request_is_answered_by_what_was_published_last(service):
    answer = answerer()
    message = user_request(WINE, (b"x-user-id", b"alice"))
    assert service.decode(answer(message)).what == ("canary", "SPLIT")
    answer.published = answerer(version="abc.2", wine={"salt": "wine", "cap": 0}).published
    got = service.decode(answer(message))
    assert got.what == ("stable", "HELD")
    assert got.metadata["version"] == "abc.2"


def test_every_answer_is_counted_once_under_its_own_choice():
    answer = answerer()
    messages = {
        "SPLIT": user_request(DIGITS, (b"x-user-id", b"alice")),
        "NO_UNIT": user_request(WINE),
        "DEFAULT": user_request(ELSEWHERE),
        "ERROR": b"\xff",
    }
    for n, message in enumerate(messages.values(), start=1):
        for _ in range(n):
            answer(message)
    counts = answer.counts.items() if isinstance(answer.counts, dict) else enumerate(answer.counts)
    choices = answer.published.ruleset.choices
    assert {choices[i].reason.value: n for i, n in counts if n} == {"SPLIT": 1, "NO_UNIT": 2, "DEFAULT": 3, "ERROR": 4}

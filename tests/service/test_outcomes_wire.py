"""What perch reads out of Envoy's access log messages, which an independent serializer makes here."""

import contextlib
import datetime as dt
import itertools
import struct

import pytest
from envoy_data_plane.envoy.config.core.v3 import Metadata, Node
from envoy_data_plane.envoy.data.accesslog.v3 import (
    AccessLogCommon,
    AccessLogType,
    HttpAccessLogEntry,
    HttpResponseProperties,
    ResponseFlags,
)
from envoy_data_plane.envoy.service.accesslog import v3 as service
from envoy_data_plane.google.protobuf import Struct, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.outcomes import Assignment, Outcome
from extproc.wire import columns
from extproc.wire import outcomes as wire
from extproc.wire.accesslog_pb2 import StreamAccessLogsMessage
from extproc.wire.columns import ColumnReader
from extproc.wire.outcomes import Batch, UnreadableLogError, read_outcomes, read_slices

PERCH = {"flag": "digits", "model": "digits", "cohort": "canary", "reason": "SPLIT", "version": "0123456789ab.7"}
ASSIGNMENT = Assignment("digits", "digits", "canary", "SPLIT", "", "0123456789ab.7")
HASH = 4_294_967_291
BEGAN = dt.datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=dt.UTC)


def ms(number):
    return dt.timedelta(milliseconds=number)


def flags(*names):
    return ResponseFlags(**dict.fromkeys(names, True))


def metadata(number=HASH, **change):
    """What perch writes; `number` None for no hash."""
    said = {name: Value(string_value=text) for name, text in (PERCH | change).items() if text is not None}
    if number is not None:
        said["hash"] = Value(number_value=number)
    return Metadata(filter_metadata={"perch": Struct(fields=said)})


NORMAL = {
    "start_time": BEGAN,
    "time_to_first_upstream_tx_byte": ms(2),
    "time_to_last_upstream_tx_byte": ms(3),
    "time_to_first_upstream_rx_byte": ms(10),
    "time_to_last_upstream_rx_byte": ms(11.5),
    "duration": ms(1012),
    "metadata": metadata(),
    "route_name": "digits.canary",
    "custom_tags": {"cohort": "canary", "served": "canary", "failed_open": "0"},
    "upstream_request_attempt_count": 1,
    "stream_id": "6f1f4f62-6b0c-4a3e-9d0f-0c9a0f6e8f11",
    "access_log_type": AccessLogType.DownstreamEnd,
}
HEADERS = {"x-model-version": "2-mlp", "x-model-prediction": "7,3", "x-model-prediction-count": "2"}
OUTCOME = Outcome(
    assignment=ASSIGNMENT,
    hash=HASH,
    model="digits",
    arm="canary",
    served="canary",
    inference=True,
    failed_open=False,
    status=200,
    attempts=1,
    deadline=False,
    aborted=False,
    upstream_ms=pytest.approx(8.5),
    total_ms=pytest.approx(1012),
    model_version="2-mlp",
    predictions="7,3",
    prediction_count=2,
    request_id="6f1f4f62-6b0c-4a3e-9d0f-0c9a0f6e8f11",
    ended_s=pytest.approx(BEGAN.timestamp() + 1.012, abs=1e-6),
)


def entry(status=200, headers=None, **change):
    """An entry; a field of None is left out."""
    common = {name: value for name, value in (NORMAL | change).items() if value is not None}
    response = HttpResponseProperties(response_code=status, response_headers=HEADERS if headers is None else headers)
    return HttpAccessLogEntry(common_properties=AccessLogCommon(**common), response=response)


def message(*entries, node=None):
    logs = service.StreamAccessLogsMessageHttpAccessLogEntries(log_entry=list(entries))
    named = node and service.StreamAccessLogsMessageIdentifier(node=Node(id=node, cluster="perch"), log_name="perch")
    return bytes(service.StreamAccessLogsMessage(identifier=named or None, http_logs=logs))


def read(*args, **change):
    (outcome,) = read_outcomes(message(entry(*args, **change))).outcomes
    return outcome


def refused(**change):
    """The entry does not count, and says so; its neighbours do."""
    batch = read_outcomes(message(entry(), entry(**change), entry()))
    return batch.unreadable == 1 and batch.outcomes == [OUTCOME, OUTCOME]


def field(number, content):
    """A length-delimited field of up to 127 bytes, by hand."""
    return bytes([number << 3 | 2, len(content)]) + content


def test_every_field_of_an_outcome_is_read():
    assert read() == OUTCOME
    assert read_outcomes(message(entry(), entry(), node="edge-1")) == Batch("edge-1", "perch", [OUTCOME] * 2, 0)


def test_a_message_without_identifier_names_no_node_and_an_empty_one_says_nothing():
    assert read_outcomes(message(entry())) == Batch(None, "", [OUTCOME], 0)
    assert read_outcomes(b"") == Batch(None, "", [], 0)
    assert read_outcomes(message(node="edge-1")) == Batch("edge-1", "perch", [], 0)


@pytest.mark.parametrize(
    ("route", "model", "arm", "inference"),
    [
        ("digits.canary", "digits", "canary", True),
        ("digits.stable", "digits", "stable", True),
        ("digits.health", "digits", "", False),
        ("server.health", "", "", False),
        ("server.stable", "server", "stable", True),
        ("livez", "", "", False),
        ("not_found", "", "", False),
        ("", "", "", False),
        (None, "", "", False),
    ],
)
def test_the_route_tells_the_model_the_arm_and_whether_it_was_inference(route, model, arm, inference):
    outcome = read(route_name=route)
    assert (outcome.model, outcome.arm, outcome.inference) == (model, arm, inference)


@pytest.mark.parametrize(
    ("names", "deadline", "aborted"),
    [
        ([], False, False),
        (["upstream_request_timeout"], True, False),
        (["upstream_max_stream_duration_reached"], True, False),
        (["duration_timeout"], True, False),
        (["stream_idle_timeout"], True, False),
        (["downstream_connection_termination"], False, True),
        (["downstream_remote_reset"], False, True),
        (["downstream_remote_reset", "upstream_request_timeout"], True, True),
        (["upstream_connection_failure", "upstream_retry_limit_exceeded"], False, False),
    ],
)
def test_the_flags_tell_deadlines_and_clients_that_went_away(names, deadline, aborted):
    outcome = read(503, response_flags=flags(*names))
    assert (outcome.deadline, outcome.aborted) == (deadline, aborted)


def test_a_stalled_upload_is_no_deadline_of_the_model():
    never_sent = {"time_to_last_upstream_tx_byte": None, "time_to_last_upstream_rx_byte": None}
    outcome = read(408, response_flags=flags("stream_idle_timeout"), time_to_first_upstream_rx_byte=None, **never_sent)
    assert (outcome.status, outcome.deadline, outcome.error) == (408, False, "")


def test_who_did_not_answer_did_not_serve():
    outcome = read(504, time_to_first_upstream_rx_byte=None, time_to_last_upstream_rx_byte=None)
    assert (outcome.served, outcome.upstream_ms, outcome.status) == ("", None, 504)


def test_an_answer_that_broke_off_is_no_answer():
    outcome = read(200, time_to_last_upstream_rx_byte=None)
    assert (outcome.served, outcome.upstream_ms, outcome.status, outcome.error) == ("canary", None, 0, "no_answer")
    assert read(502, time_to_last_upstream_rx_byte=None).status == 502
    gone = read(200, time_to_last_upstream_rx_byte=None, response_flags=flags("downstream_connection_termination"))
    assert (gone.status, gone.error) == (200, "")


def test_an_answer_before_the_whole_request_was_sent_is_timed_from_the_requests_first_byte():
    assert read(413, time_to_last_upstream_tx_byte=None).upstream_ms == pytest.approx(9.5)
    assert read(413, time_to_last_upstream_tx_byte=ms(50)).upstream_ms == 0.0


def test_a_fall_back_is_told_by_the_host_that_served():
    outcome = read(custom_tags={"cohort": "canary", "served": "stable", "failed_open": "0"})
    assert (outcome.arm, outcome.served, outcome.fell_back) == ("canary", "stable", True)


def test_without_metadata_there_is_no_assignment():
    others = Metadata(filter_metadata={"envoy.lb": Struct(fields={"perch": Value(string_value="x")})})
    tags = {"served": "stable", "failed_open": "1"}
    for absent in (None, Metadata(), others, Metadata(filter_metadata={"perch": Struct()})):
        outcome = read(metadata=absent, custom_tags=tags)
        assert (outcome.assignment, outcome.hash, outcome.failed_open) == (None, None, True)


def test_an_assignment_without_a_hash_has_none_and_a_rule_is_read():
    outcome = read(metadata=metadata(None, reason="FORCED", rule="testers"))
    assert outcome.hash is None
    assert outcome.assignment == ASSIGNMENT._replace(reason="FORCED", rule="testers")


def test_the_model_version_is_the_headers_or_the_hidden_one():
    hidden = {"served": "canary", "failed_open": "0", "model_version": "3-hidden"}
    assert read(headers={}, custom_tags=hidden).model_version == "3-hidden"
    assert read(custom_tags=hidden).model_version == "2-mlp"
    assert read(headers={}).model_version == ""


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("64", 64), ("", None), ("-1", None), ("1e3", None), ("٣", None)]
)
def test_a_prediction_count_is_a_whole_number_or_none(text, count):
    assert read(headers={"x-model-prediction-count": text}).prediction_count == count
    assert read(headers={"x-model-prediction-count": "9" * 4999}).prediction_count is None


def test_predictions_are_the_header_as_it_came():
    for text in ("", "7", " 7 , 8 ", "Ωmega", "x" * 5000, "nan,inf"):
        assert read(headers={"x-model-prediction": text}).predictions == text
    assert read(headers={}).prediction_count is None


def test_no_answer_at_all_is_status_0():
    assert read(None, headers={}).status == 0


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**32 - 1])
def test_a_hash_is_any_32_bits(number):
    assert read(metadata=metadata(number)).hash == number


@pytest.mark.parametrize("number", [-1, 2**32, 0.5, 17.25, float("nan"), float("inf"), float("-inf"), 1e300])
def test_a_hash_that_is_none_makes_the_entry_unreadable(number):
    for _ in range(2):  # looked up the second time
        assert refused(metadata=metadata(number))


@pytest.mark.parametrize("other", [None, *(one for one in AccessLogType if one != AccessLogType.DownstreamEnd)])
def test_an_entry_that_tells_of_no_requests_end_is_not_an_outcome(other):
    assert refused(access_log_type=other)


def test_times_that_cannot_be_make_the_entry_unreadable():
    assert refused(start_time=None)
    assert refused(start_time=dt.datetime(1969, 1, 1, tzinfo=dt.UTC))
    assert refused(duration=ms(-1500))


def test_broken_bytes_within_an_entry_cost_that_entry_alone():
    whole = message(entry(), entry(stream_id="broken"), entry())
    at = whole.index(b"version", whole.index(b"canary")) - 4  # the first entry's metadata
    broken = whole[:at] + b"\x0f" + whole[at + 1 :]
    batch = read_outcomes(broken)
    assert (len(batch.outcomes), batch.unreadable) == (2, 1)
    assert batch.outcomes[1] == OUTCOME


def test_a_request_id_that_is_no_text_is_kept_as_far_as_it_is_one():
    batch = read_outcomes(message(entry(stream_id="broken"), entry()).replace(b"broken", b"\xff\xfeoken"))
    assert ([one.request_id for one in batch.outcomes], batch.unreadable) == (
        ["\ufffd\ufffdoken", OUTCOME.request_id],
        0,
    )


def test_entries_with_a_part_that_cannot_be_read_do_not_have_the_others_read_again(monkeypatch):
    reads = []
    monkeypatch.setattr(
        ColumnReader, "read", lambda self, entries, real=ColumnReader.read: reads.append(1) or real(self, entries)
    )
    bad = entry(metadata=metadata(number=0.5))
    batch = read_outcomes(message(*[bad, entry()] * 50))
    assert (len(batch.outcomes), batch.unreadable, len(reads)) == (50, 50, 1)


def test_the_fields_of_the_metadata_may_come_in_any_order():
    fields = {name: Value(string_value=text) for name, text in PERCH.items()} | {"hash": Value(number_value=HASH)}
    for order in itertools.permutations(fields):
        said = Struct(fields={name: fields[name] for name in order})
        bare = bytes(Metadata(filter_metadata={"perch": said}))
        assert wire._assigned(bare) == (ASSIGNMENT, HASH)
        assert wire._assigned(bare.replace(struct.pack("<d", HASH), struct.pack("<d", 5.0))) == (ASSIGNMENT, 5)


def test_the_namespace_of_perch_may_come_before_and_after_others():
    response = {"perch.response": Struct(fields={"model_version": Value(string_value="2"), "hash": Value()})}
    perch = metadata().filter_metadata
    for both in (perch | response, response | perch):
        assert wire._assigned(bytes(Metadata(filter_metadata=both))) == (ASSIGNMENT, HASH)


def test_a_text_that_looks_like_the_hash_is_not_taken_for_it():
    forged = "\n\x04hash\x12\t\x11" + "\0" * 6 + "@@"
    for name in ("rule", "flag", "version"):
        wanted = ASSIGNMENT._replace(**{name: forged})
        for number in (7, None):
            for _ in range(2):
                assert wire._assigned(bytes(metadata(number, **{name: forged}))) == (wanted, number)


def test_a_hash_that_is_said_twice_counts_as_the_last():
    twice = b"".join(field(1, field(1, b"hash") + field(2, b"\x11" + struct.pack("<d", number))) for number in (3, 4))
    perch = field(1, field(1, b"perch") + field(2, twice))
    assert wire._assigned(perch)[1] == 4
    assert wire._assigned(perch)[1] == 4


def test_what_was_read_once_is_kept_but_neither_much_nor_anything_long():
    asked = []
    known = wire._Known(lambda key: asked.append(key) or len(key), 3)
    assert [known[bytes(size)] for size in (1, 2, 3, 1, 2, 3)] == [1, 2, 3, 1, 2, 3]
    assert len(asked) == 3
    assert known[bytes(4)] == 4
    assert len(known) == 1
    assert [known[bytes(5000)], known[bytes(400), bytes(400)], known[(b"",) * 1000]] == [5000, 2, 1000]
    assert len(known) == 1


def test_equal_assignments_are_one():
    first, second = read(), read(metadata=metadata(5))
    assert first.assignment is second.assignment


@given(st.integers(0, 30), st.integers(1, 7))
def test_slices_are_the_message_in_parts(count, at_most):
    whole = message(*(entry(stream_id=str(number)) for number in range(count)), node="edge-1")
    parts = list(read_slices(whole, at_most))
    assert [one.request_id for part in parts for one in part.outcomes] == [str(number) for number in range(count)]
    assert all(len(part.outcomes) <= at_most and part.node == "edge-1" for part in parts)
    assert len(parts) == max(-(-count // at_most), 1)


ODD = [
    entry(),
    entry(None, headers={}),
    entry(504, headers={}, time_to_first_upstream_rx_byte=None, time_to_last_upstream_rx_byte=None),
    entry(413, time_to_last_upstream_tx_byte=None, response_flags=flags("stream_idle_timeout")),
    entry(time_to_last_upstream_rx_byte=ms(2000), duration=ms(3000), upstream_request_attempt_count=2),
    entry(headers=HEADERS | {"x-other": "1"}, custom_tags=NORMAL["custom_tags"] | {"model_version": "3"}),
    entry(headers={"x-model-prediction": "1"}, custom_tags={"served": "stable"}),
    entry(metadata=None, route_name="livez", custom_tags=None),
    entry(metadata=metadata(None, rule="testers"), upstream_request_attempt_count=None, stream_id=None),
    entry(metadata=metadata(0.5)),
    entry(access_log_type=None),
    entry(start_time=None),
    HttpAccessLogEntry(),
]


def framed(*entries):
    """A message of entries whose bytes may be anything."""
    return StreamAccessLogsMessage(http_logs={"log_entry": entries}).SerializeToString()


def alone(entries):
    """Outcomes of entries of which each is read from a message of its own, and the number of those without one."""
    batches = [read_outcomes(framed(one)) for one in entries]
    return [one for batch in batches for one in batch.outcomes], sum(batch.unreadable for batch in batches)


def together(entries):
    batch = read_outcomes(framed(*entries))
    return batch.outcomes, batch.unreadable


@given(st.lists(st.sampled_from([bytes(one) for one in ODD]) | st.just(bytes(entry())), max_size=30))
def test_entries_read_together_are_what_each_of_them_is_alone(entries):
    assert together(entries) == alone(entries)


def test_an_entry_that_is_cut_costs_at_most_itself():
    whole = bytes(entry())
    for cut in range(len(whole)):
        entries = [whole, whole[:cut], bytes(ODD[1]), whole]
        assert together(entries) == alone(entries)
        assert together(entries)[0][-1] == OUTCOME


def test_an_entry_that_takes_the_mark_after_it_for_its_own_is_found_out():
    whole = bytes(entry())
    mark = b"".join(one.entry for one in columns._OFTEN)
    greedy = whole + field(5, mark)[: -len(mark)]  # announces as many bytes as a mark has
    with pytest.raises(ValueError, match="ends within the next one"):
        ColumnReader().read([greedy, whole])
    assert together([whole, greedy, whole]) == ([OUTCOME, OUTCOME], 1)


def test_which_fields_some_entries_lack_is_remembered_for_a_while():
    reader, regular = ColumnReader(), [bytes(entry())] * 3
    assert reader.read([*regular, bytes(ODD[2])]).received_ns[-2:] == [11_500_000, 0]
    marked = set(reader._marked)
    assert marked
    reader.read(regular)
    assert reader._marked == marked
    for _ in range(100):
        assert reader.read(regular).received_ns == [11_500_000] * 3
    assert not reader._marked


TEXT = st.text(max_size=20)
TIMES = st.integers(0, 10**7).map(lambda number: dt.timedelta(microseconds=number))


@given(
    st.fixed_dictionaries(dict.fromkeys(Assignment._fields, TEXT)),
    st.none() | st.integers(0, 2**32 - 1),
    st.sampled_from([None, 200, 404, 500, 599]),
    TEXT,
    st.lists(TIMES, min_size=4, max_size=4).map(sorted),
)
def test_whatever_is_written_is_read(said, number, status, prediction, times):
    sent, first, last, total = (one + ms(1) for one in times)
    outcome = read(
        status,
        {"x-model-prediction": prediction},
        metadata=metadata(number, **said),
        time_to_last_upstream_tx_byte=sent,
        time_to_first_upstream_rx_byte=first,
        time_to_last_upstream_rx_byte=last,
        duration=total,
    )
    assert (outcome.assignment, outcome.hash) == (Assignment(**said), number)
    assert (outcome.status, outcome.predictions) == (status or 0, prediction)
    assert outcome.upstream_ms == pytest.approx((last - sent) / ms(1), abs=1e-6)
    assert outcome.total_ms == pytest.approx(total / ms(1), abs=1e-6)


SAMPLES = [
    message(entry(), entry(metadata=None), entry(response_flags=flags("stream_idle_timeout")), node="edge-1"),
    message(entry(metadata=metadata(None, rule="r")), entry(None, headers={}, route_name="livez", custom_tags={})),
]


@given(st.sampled_from(SAMPLES), st.data())
@settings(max_examples=1500, deadline=None)
def test_mutated_messages_are_read_or_refused_and_nothing_else(sample, data):
    raw = bytearray(sample)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw)
    try:
        batch = read_outcomes(cut)
    except UnreadableLogError:
        return
    for one in batch.outcomes:
        assert one.hash is None or 0 <= one.hash < 2**32
        assert one.total_ms >= 0
        assert one.upstream_ms is None or one.upstream_ms >= 0
        assert one.ended_s > 0
        assert isinstance(one.error, str)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(raw):
    with contextlib.suppress(UnreadableLogError):
        read_outcomes(raw)

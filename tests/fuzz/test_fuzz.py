"""No document, however random, makes the loader raise anything but FlagFileError, and no request stays unanswered."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.document import FlagFileError
from extproc.flagread import flags_in
from extproc.flagyaml import MAX_BYTES, read_document

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("perch_fuzz", ROOT / "bench" / "fuzz.py")
fuzzing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzzing)

YAMLISH = st.lists(
    st.sampled_from(fuzzing.WORDS) | st.text(max_size=5) | st.sampled_from(["\n", "  ", "\n  ", "\n    ", ": ", "- "]),
    max_size=60,
).map("".join)


def problems_of(read, content):
    """What is wrong with it; None if nothing is. Any other exception goes through."""
    try:
        read(content)
    except FlagFileError as error:
        return error.problems
    return None


KEYS = (
    "version flags segments digits canary rollout rules steps when header all any not segment name serve unit salt",
    "guardrails errors in path",
)


_END = b"  s3000: {header: a, exists: true}\nflags: {}\n"


def chained(count, line):
    """Segments that name the next one each."""
    return b"version: 1\nsegments:\n" + b"".join(
        line.replace(b"I", b"%d" % i).replace(b"J", b"%d" % (i + 1)) for i in range(count)
    )


def test_the_short_run_of_the_fuzzer_breaks_nothing():
    results = fuzzing.fuzz(800, seed=7)
    assert results.total() == 800
    assert results["good"] > 20
    assert results["refused"] > 100


def test_the_fuzzer_notices_a_loader_that_raises_something_else(monkeypatch):
    def broken(content):
        raise KeyError(content)

    monkeypatch.setattr(fuzzing, "scan_document", broken)
    with pytest.raises(AssertionError, match="this input breaks it"):
        fuzzing.fuzz(1, seed=0)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300) | YAMLISH.map(lambda text: text.encode(errors="replace")))
def test_any_bytes_are_flags_or_a_list_of_problems(content):
    for read in (read_document, lambda content: flags_in(content, None)):
        problems = problems_of(read, content)
        assert problems is None or (problems and all(str(problem).isprintable() for problem in problems))


@settings(max_examples=150, deadline=None)
@given(
    data=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=4)
        | st.sampled_from(["canary", "x-user-id", "1.5"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(" ".join(KEYS).split()) | st.text(max_size=3),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )
)
def test_any_data_in_the_place_of_flags_is_flags_or_a_list_of_problems(data):
    """Data of every shape where the schema and the checks between keys look: nothing trips over a wrong type."""
    import json

    for document in (data, {"version": 1, "segments": data, "flags": {"digits": data}}):
        content = json.dumps(document, ensure_ascii=False).encode(errors="replace")
        assert problems_of(lambda content: flags_in(content, {"digits": "/"}), content) != ()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"{a: " * 50_000,
        b"- " * 50_000,
        b"? " * 50_000,
        b"a: &a [*a, *a]",
        b"\xff" * 1000,
        b"\xef\xbb\xbf",
        b"%" * 1000,
        b"!" * 1000,
        b"&" * 10_000,
        b"9" * 100_000,
        b"version: 1\nflags: {digits: {canary: " + b"9" * 5000 + b"}}",
        b"version: 1\nflags: {digits: {canary: 1e99999999}}",
        b"version: 1\nflags: {digits: {canary: 5, expires: 99999999999999999999-01-01}}",
        b"version: 1\nflags: {digits: {rollout: {steps: [{canary: 5, soak: " + b"9" * 400 + b"d}]}}}",
        b'version: 1\nflags: {digits: {canary: 5, owner: "\\uD800"}}',
        b"a" * (MAX_BYTES + 1),
        chained(20_000, b"  sI: {segment: sJ}\n") + b"flags: {}\n",
        chained(20_000, b"  sI: {segment: sJ}\n") + b"  s20000: {segment: s7}\nflags: {}\n",
        chained(3_000, b"  sI: {any: [{segment: sJ}, {segment: sJ}]}\n") + _END,
        b"version: 1\nflags:\n" + b"".join(b"  f%d:\n" % i for i in range(20_000)),
    ],
    ids=lambda content: repr(content[:30]),
)  # fmt: skip
def test_what_would_exhaust_a_careless_reader_is_refused(content):
    with pytest.raises(FlagFileError) as caught:
        flags_in(content, None)
    assert len(caught.value.problems) <= 201

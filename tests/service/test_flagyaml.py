"""The YAML reader: strict about what readers silently accept, and bounded whatever the bytes."""

import re
from decimal import Decimal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.document import FlagFileError
from extproc.flagyaml import MAX_BYTES, read_document


def problems(content: str | bytes) -> list[str]:
    data = content.encode() if isinstance(content, str) else content
    with pytest.raises(FlagFileError) as refused:
        read_document(data)
    return [str(problem) for problem in refused.value.problems]


def read(content: str):
    return read_document(content.encode()).data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-3", -3), ("0", 0), ("5.0", Decimal("5.0")), (".5", Decimal("0.5")), ("5.", Decimal(5)),
        ("0.001", Decimal("0.001")), ("1e2", Decimal(100)), ("true", True), ("False", False), ("~", None), ("", None),
        ("null", None), ("yes", "yes"), ("on", "on"), ("no", "no"), ("010", "010"), ("+49", "+49"), ("-0", "-0"),
        ("00.5", "00.5"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("0x10", "0x10"), ("0o7", "0o7"),
        ("1_000", "1_000"), ("12:30", "12:30"), ("2027-03-01", "2027-03-01"), ("'5'", "5"), ('"true"', "true"),
        ("!!str 5", "5"), ("eu-", "eu-"), ("=", "="), ("5m", "5m"), ("1.2x", "1.2x"),
        ("- 1", [1]), ("[a, b]", ["a", "b"]), ("{a: 1}", {"a": 1}), ("|\n  a\n  b\n", "a\nb\n"),
    ],
)  # fmt: skip
def test_a_scalar_is_what_it_looks_like(text, value):
    got = read(f"k: {text}\n" if not text.startswith("- ") else f"k:\n{text}\n")["k"]
    assert got == value
    assert type(got) is type(value)


def test_decimals_stay_exact():
    assert str(read("k: 33.333")["k"]) == "33.333"
    assert read("k: 0.1")["k"] * 3 == Decimal("0.3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1:1: the file is empty"),
        (" \n\n", "1:1: the file is empty"),
        ("# only this\n", "1:1: the file has only comments"),
        ("a: 1\nb: 2\na: 3\n", "3:1: the key 'a' stands here again; it is already on line 1"),
        ("a:\n  x: 1\n  x: 2\n", "3:3: the key 'x' stands here again; it is already on line 2"),
        ("{a: 1, a: 2}\n", "1:8: the key 'a' stands here again; it is already on line 1"),
        ("a:\n\tb: 1\n", "2:1: a tab cannot indent YAML; use spaces"),
        ("a: 1\n---\nb: 2\n", "2:1: a second YAML document begins here"),
        ("1: a\n", "1:1: a key must be text; put it in quotes"),
        ("true: a\n", "1:1: a key must be text; put it in quotes"),
        ("~: a\n", "1:1: a key must be text; put it in quotes"),
        ("? [a]\n: b\n", "1:3: a key must be text; put it in quotes"),
        ("? {a: 1}\n: b\n", "1:3: a key must be text; put it in quotes"),
        ("k: .nan\n", "1:4: .nan is not a number that can be used here"),
        ("k: -.inf\n", "1:4: -.inf is not a number that can be used here"),
        ("k: *nope\n", "1:4: the alias *nope names no anchor above it"),
        ("k: &a [*a]\n", "1:8: the alias *a names no anchor above it"),
        ("k: !!python/object/apply:os.system [id]\n", "1:4: the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("k: !!int 5\n", "1:4: the tag tag:yaml.org,2002:int is not supported"),
        ("k: !secret x\n", "1:4: the tag !secret is not supported"),
        ("k: [1, 2\n", "2:1: this is not valid YAML"),
        ("k: 'open\n", "2:1: this is not valid YAML"),
        ("k: a: b\n", "1:5: this is not valid YAML"),
        ("%YAML 3.0\n---\na: 1\n", "1:1: this is not valid YAML"),
        ("<<: x\n", "1:1: `<<` takes a mapping, or a list of mappings"),
        ("<<: [{a: 1}, x]\n", "1:1: `<<` takes a mapping, or a list of mappings"),
        ("a: é\nb: \x01\n", "2:4: the character '\\x01' is not allowed in YAML"),
    ],
)  # fmt: skip
def test_what_people_do_not_mean_is_a_problem_at_its_place(text, said):
    assert problems(text)[0].startswith(said)


def test_bytes_that_are_no_text_are_named_with_their_place():
    assert problems(b"a: 1\nb: \xff\n") == ["2:4: this is not UTF-8 text; save the file as UTF-8"]
    assert problems("a: 1\n".encode("utf-16"))[0].startswith("1:1: this is not UTF-8 text")


def test_a_byte_order_mark_and_windows_line_ends_are_read():
    assert read_document(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").data == {"a": 1, "b": 2}


def test_every_duplicate_is_found_at_once():
    assert len(problems("a: 1\na: 2\nb: 1\nb: 2\nb: 3\n")) == 3


def test_a_merge_brings_the_keys_that_the_mapping_does_not_have_itself():
    text = "base: &b {a: 1, c: 2}\nx: {<<: *b, a: 3}\ny: {<<: [*b, {a: 9, d: 4}]}\n'<<': quoted\n"
    assert read(text) == {"base": {"a": 1, "c": 2}, "x": {"a": 3, "c": 2}, "y": {"a": 1, "c": 2, "d": 4}, "<<": "quoted"}  # fmt: skip  # noqa: E501  one value


def test_the_place_of_every_value_is_known():
    document = read_document(b"flags:\n  digits:\n    unit: [a,\n      b]\n    canary: 5\n")
    assert [str(document.problem(path, "x")).split(": ")[0] for path in (
        ("flags", "digits", "canary"), ("flags", "digits", "unit", 1), ("flags", "digits", "missing"), ("flags", "no"),
    )] == ["5:13", "4:7", "3:5", "2:3"]  # fmt: skip
    assert str(document.problem(("flags", "digits"), "x", of_key=True)).startswith("2:3: flags.digits: x")


BOMBS = {
    "lists": "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "mappings": "a0: &a0 {k: v}\n"
    + "".join(f"a{i}: &a{i} {{{','.join(f'k{j}: *a{i - 1}' for j in range(10))}}}\n" for i in range(1, 12)),
    "merges": "a0: &a0 {k: v}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    "a chain": "x0: &a0 [[[[[[[[[[]]]]]]]]]]\n"
    + "".join(f"x{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]\n" for i in range(1, 5000)),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_of_aliases_is_refused(text):
    assert "with its aliases expanded the file has more than 2,000,000 values" in problems(text)[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "".join(" " * i + "a:\n" for i in range(500))])
def test_depth_is_bounded(text):
    assert "nested more than 32 levels deep" in problems(text)[0]


def test_size_is_bounded():
    fits = b"k: v\n" + b"#" * (MAX_BYTES - 5)
    assert read_document(fits).data == {"k": "v"}
    assert len(problems(fits + b"#")) == 1


def test_the_number_of_problems_is_bounded():
    assert len(problems("a: 1\n" * 10_000)) <= 201


NUMBER = re.compile(r"[-+0-9.eE_:xobinfa]+")  # YAML 1.1, which PyYAML writes, has other numbers than 1.2
TEXTS = st.text(max_size=20).filter(lambda text: not NUMBER.fullmatch(text))
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXTS
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(TEXTS, TREES, max_size=5), st.sampled_from([None, True, False]), st.booleans())
def test_what_a_yaml_writer_writes_is_read_back(tree, flow, unicode):
    text = yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=unicode)
    try:
        reference = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    if reference == tree:  # PyYAML's own reader disagrees with its writer about some texts
        assert read_document(text.encode()).data == tree


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_the_bytes_it_is_a_document_or_a_list_of_problems(content):
    for problem in found(content):
        assert problem.place.line >= 1
        assert problem.place.column >= 1
        assert "\n" not in str(problem)


def found(content: bytes):
    """The problems of a document; none if it can be read."""
    try:
        read_document(content)
    except FlagFileError as refused:
        return refused.problems
    return ()


PIECES = st.sampled_from(
    ["a", "b", ": ", "- ", "\n", "  ", "&a ", "*a", "<<: ", "[", "]", "{", "}", ",", "'", '"', "|", "> ", "#", "!t ",
     "%", "---\n", "...\n", "? ", "~", "1", ".5", "\t", "é", "\u2028", "\x85", "\ufeff", "\\", "@", "`"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_whatever_pieces_of_yaml_are_put_together_nothing_else_is_raised(text):
    lines = text.count("\n") + text.count("\u2028") + text.count("\x85") + 2
    assert all(1 <= problem.place.line <= lines for problem in found(text.encode()))

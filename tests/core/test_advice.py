"""Warnings claim things about every request; here requests are asked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.advice import NOT_FORWARDED, Known, advise, why_not_forwarded
from extproc.core.conditions import All, AnyOf, Leaf, Not, Op, Subject, compile_condition
from extproc.core.decision import decide
from extproc.core.flags import Exposures
from extproc.core.implication import always, covers_all, implies, never
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagyaml import scan_document

MODELS = {"digits": "/v2/models/digits/"}
PREFIX = MODELS["digits"]

TEXTS = st.sampled_from(["", "a", "ab", "b", "abc", "c", "1.2.3", "10.1.2.3", "10.0.0.1"])
PATHS = st.sampled_from(["/", "/v2/", PREFIX, PREFIX + "infer", "/v2/models/wine/", "/x?a", "a", PREFIX + "x?y"])
TUPLES = st.lists(TEXTS, min_size=1, max_size=3).map(tuple)
HEADER, COOKIE, PATH, METHOD = map(st.just, Subject)
T = st.just("t")
FIXED = {
    Op.REGEX: [("^a",), ("b", "c"), ("",)],
    Op.SEMVER: [(">=1",), ("<1", "^1")],
    Op.CIDR: [("10.0.0.0/8",), ("10.1.0.0/16",)],
}
LEAVES = st.one_of(
    st.builds(Leaf, HEADER | COOKIE, T, st.sampled_from([Op.IN, Op.PREFIX, Op.SUFFIX, Op.CONTAINS]), TUPLES),
    *(st.builds(Leaf, HEADER, T, st.just(op), st.sampled_from(values)) for op, values in FIXED.items()),
    st.builds(Leaf, HEADER | COOKIE, T, st.just(Op.EXISTS)),
    st.builds(Leaf, PATH, st.just(""), st.sampled_from([Op.IN, Op.PREFIX]), st.lists(PATHS, min_size=1).map(tuple)),
    st.builds(Leaf, PATH | METHOD, st.just(""), st.just(Op.EXISTS)),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(All, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple)),
    ),
    max_leaves=4,
)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just(b"t"), TEXTS.map(str.encode)),
        st.tuples(st.just(b"cookie"), TEXTS.map(lambda text: b"t=" + text.encode())),
    ),
    max_size=3,
)
TAILS = st.sampled_from([b"infer", b"", b"x?y", b"infer?x"])


def requests(build, headers, tails):
    for sent in headers:
        for tail in tails:
            yield build.request([(b":method", b"POST"), *sent], PREFIX.encode() + tail)


@settings(max_examples=500, deadline=None)
@given(a=CONDITIONS, b=CONDITIONS, headers=st.lists(HEADERS, min_size=4, max_size=8), tails=st.lists(TAILS, max_size=3))
def test_what_is_said_to_follow_always_does(build, a, b, headers, tails):
    first, second = compile_condition(a), compile_condition(b)
    for request in requests(build, headers, tails or [b"infer"]):
        if implies(a, b):
            assert second(request) or not first(request)
        assert first(request) or not always(a, PREFIX)
        assert not (first(request) and never(a, PREFIX))
        assert first(request) or second(request) or not covers_all([a, b], PREFIX)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ((Op.IN, ("a",)), (Op.IN, ("a", "b"))),
        ((Op.IN, ("abc",)), (Op.PREFIX, ("ab",))),
        ((Op.IN, ("1.2.3",)), (Op.SEMVER, ("^1.2",))),
        ((Op.IN, ("abc",)), (Op.REGEX, ("^a.c$",))),
        ((Op.PREFIX, ("abc",)), (Op.PREFIX, ("x", "ab"))),
        ((Op.PREFIX, ("abc",)), (Op.CONTAINS, ("b",))),
        ((Op.SUFFIX, ("abc",)), (Op.SUFFIX, ("c",))),
        ((Op.CIDR, ("10.1.0.0/16",)), (Op.CIDR, ("10.0.0.0/8",))),
        ((Op.CIDR, ("10.1.0.0/16",)), (Op.EXISTS, ())),
        ((Op.REGEX, ("a",)), (Op.REGEX, ("b", "a"))),
    ],
)
def test_a_narrow_comparison_implies_the_wide_one_and_not_the_other_way(narrow, wide):
    a, b = (Leaf(Subject.HEADER, "t", op, values) for op, values in (narrow, wide))
    assert implies(a, b)
    assert not implies(b, a)
    assert implies(Not(b), Not(a))
    assert implies(All((a, Leaf(Subject.COOKIE, "x", Op.EXISTS))), AnyOf((b, Leaf(Subject.COOKIE, "y", Op.EXISTS))))


def test_an_address_among_others_does_not_imply_the_network_of_the_last_one():
    a, b = Leaf(Subject.HEADER, "t", Op.IN, ("10.1.2.3",)), Leaf(Subject.HEADER, "t", Op.CIDR, ("10.0.0.0/8",))
    assert not implies(a, b)
    assert not implies(b, a)


@pytest.mark.parametrize(("op", "value"), [(Op.PREFIX, PREFIX + "infer?x="), (Op.IN, PREFIX + "infer?x=1")])
def test_a_path_is_never_equal_to_one_with_a_query(op, value):
    assert never(Leaf(Subject.PATH, "", op, (value,)), PREFIX)
    assert not never(Leaf(Subject.PATH, "", op, (value, PREFIX + "infer")), PREFIX)


def warnings_of(text, **known):
    document = scan_document(text.encode())
    flags = parse(document, MODELS).flags
    found = advise(document, flags, Known(prefixes=MODELS, today="2026-11-24", **known))
    return flags, found


def rules_file(when, outcome="serve: canary", more=""):
    rule = f"      - {{name: r, when: {when}, {outcome}}}\n"
    return f"version: 1\nflags:\n  digits:\n    canary: 5\n{more}    rules:\n{rule}"


def test_a_good_file_gets_no_warning():
    for text in (
        "version: 1\nflags:\n  digits: {canary: 0}\n",
        "version: 1\nflags:\n  digits: {canary: 5, unit: [x-user-id, random], expires: 2026-11-24}\n",
        rules_file("{header: x-tenant, in: [acme]}"),
        rules_file("{header: x-envoy-external-address, cidr: 10.0.0.0/8}"),
        rules_file("{method: {in: [POST, PURGE]}}"),
        rules_file("{path: {prefix: /v2/models/digits/versions/}}"),
        rules_file("{header: x-user-id, exists: false}", "canary: 50", "    missing_unit: random\n"),
        rules_file("{header: x-user-id, exists: false}", "canary: 100", "    unit: [x-user-id]\n"),
    ):
        assert warnings_of(text)[1] == (), text


@pytest.mark.parametrize("header", [*sorted(NOT_FORWARDED), "x-perch-anything"])
def test_every_header_that_never_arrives_is_named_in_rules_and_units(header):
    assert why_not_forwarded(header)
    (in_rule,) = warnings_of(rules_file(f"{{header: {header.title()}, exists: true}}"))[1]
    assert header in in_rule.message
    (in_unit,) = warnings_of(f"version: 1\nflags:\n  digits: {{canary: 5, unit: [{header}]}}\n")[1]
    assert header in in_unit.message


def test_a_rule_said_to_be_unreachable_decides_about_nobody(build):
    text = """
version: 1
flags:
  digits:
    canary: 5
    rules:
      - {name: a, when: {header: t, prefix: [a, b]}, serve: canary}
      - {name: b, when: {all: [{header: t, in: [ab, bc]}, {header: u, exists: true}]}, serve: stable}
      - {name: c, when: {any: [{header: t, equals: c}, {header: t, equals: ab}]}, serve: stable}
"""
    flags, found = warnings_of(text)
    assert [warning.path for warning in found] == ["flags.digits.rules[1]"]
    ruleset = compile_ruleset(flags, Exposures(), MODELS, version="v")
    asked = {
        decide(ruleset, build.request([(b"t", value), *extra])).choice.rule
        for value in (b"ab", b"bc", b"c", b"x")
        for extra in ([], [(b"u", b"1")], [(b"t", b"c")])
    }
    assert asked == {"a", "c", ""}


def test_warnings_come_in_the_order_of_the_lines():
    text = """
version: 1
flags:
  digits:
    expires: 2020-01-01
    unit: [x-user-id, cookie:sid]
    canary: 5
    rules:
      - {name: a, when: {header: host, exists: true}, canary: 0}
"""
    lines = [warning.place.line for warning in warnings_of(text)[1]]
    assert lines == sorted(lines)
    assert len(lines) == 4


def test_a_big_file_is_looked_through_in_reasonable_steps():
    values = [", ".join(f"v{i}-{j}" for j in range(10)) for i in range(300)]
    rules = "".join(
        f"      - {{name: r{i}, when: {{header: t, in: [{each}]}}, serve: canary}}\n" for i, each in enumerate(values)
    )
    flags, found = warnings_of(f"version: 1\nflags:\n  digits:\n    canary: 5\n    rules:\n{rules}")
    assert len(flags[0].rules) == 300
    assert found == ()

"""Rules against a second reading of the contract that shares nothing with the engine, and against themselves."""

import ipaddress
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.conditions import compile_condition
from extproc.core.decision import decide
from extproc.core.document import Document, Marks, Place
from extproc.core.flags import Exposure, Exposures
from extproc.core.rules import compile_rules, first_match
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse

MODELS = {"digits": "/v2/models/digits/"}
PATH = b"/v2/models/digits/infer"


def flags_of(rules, *, segments=None, **flag):
    """Flags from plain data, as the YAML reader gives it."""
    data = {"version": 1, "segments": segments or {}, "flags": {"digits": {"canary": 0, **flag, "rules": rules}}}
    return parse(Document(data, Marks(Place(1, 1))), MODELS).flags


def ruleset_of(rules, *, exposures=None, **flag):
    return compile_ruleset(flags_of(rules, **flag), exposures or Exposures(), MODELS, version="v")


# A naive evaluator, straight from the document.

PATTERNS = {
    "^eu-": lambda value: value.startswith(b"eu-"),
    "west$": lambda value: value.endswith(b"west"),
    "[0-9]": lambda value: any(48 <= byte <= 57 for byte in value),
    "(?i)ACME": lambda value: b"acme" in value.lower(),
    r"\Qa.b": lambda value: b"a.b" in value,
    r"\Q1\E": lambda value: b"1" in value,
    "a|b": lambda value: b"a" in value or b"b" in value,
    "": lambda _value: True,
}
RANGES = {
    ">=1.2.0": lambda v: v >= (1, 2, 0),
    "<2": lambda v: v < (2, 0, 0),
    "^1.4": lambda v: (1, 4, 0) <= v < (2, 0, 0),
    "1.2.3": lambda v: v == (1, 2, 3),
    ">=1.0.0 <1.4": lambda v: (1, 0, 0) <= v < (1, 4, 0),
}


def a_network_has(network, value):
    try:
        return ipaddress.ip_address(value.split(b",")[-1].strip().decode()) in ipaddress.ip_network(network)
    except ValueError:
        return False


def a_range_has(text, value):
    match = re.fullmatch(rb"(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})", value)
    return match is not None and RANGES[text](tuple(int(part) for part in match.groups()))


def passes(operator, operand, value):
    """One value under one operator."""
    wanted = operand if isinstance(operand, list) else [operand]
    texts = [str(each).encode() for each in wanted]
    match operator:
        case "in" | "equals":
            return value in texts
        case "prefix":
            return any(value[: len(text)] == text for text in texts)
        case "suffix":
            return any(value[len(value) - len(text) :] == text and len(value) >= len(text) for text in texts)
        case "contains":
            return any(text in value for text in texts)
        case "regex":
            return any(PATTERNS[pattern](value) for pattern in wanted)
        case "semver":
            return any(a_range_has(text, value) for text in wanted)
        case "cidr":
            return any(a_network_has(text, value) for text in wanted)


def compared(comparison, values):
    """One operator over all values of a header, a cookie, the path or the method."""
    ((operator, operand),) = [(k, v) for k, v in comparison.items() if k not in ("header", "cookie", "not")]
    if operator == "exists":
        return bool(values) == operand
    if operator == "not_in":
        return not any(passes("in", operand, value) for value in values)
    if operator == "cidr":
        values = values[-1:]
    return any(passes(operator, operand, value) for value in values)


def crumbs(pairs, name):
    found = []
    for header, value in pairs:
        if header == b"cookie":
            for crumb in value.split(b";"):
                key, equals, text = crumb.strip(b" \t").partition(b"=")
                if equals and key == name.encode():
                    found.append(text)
    return found


def true_of(condition, pairs, segments):
    """Whether a condition as written is true of these headers, in order, `:path` and `:method` among them."""
    negated = condition.get("not") is True
    if "all" in condition:
        result = all(true_of(each, pairs, segments) for each in condition["all"])
    elif "any" in condition:
        result = any(true_of(each, pairs, segments) for each in condition["any"])
    elif "segment" in condition:
        result = true_of(segments[condition["segment"]], pairs, segments)
    elif isinstance(condition.get("not"), dict):
        return not true_of(condition["not"], pairs, segments)
    elif "header" in condition:
        name = condition["header"].lower().encode()
        result = compared(condition, [value for header, value in pairs if header == name])
    elif "cookie" in condition:
        result = compared(condition, crumbs(pairs, condition["cookie"]))
    elif "path" in condition:
        result = compared(condition["path"], [v.split(b"?")[0] for h, v in pairs if h == b":path"])
    else:
        result = compared(condition["method"], [v for h, v in pairs if h == b":method"])
    return result != negated


# Documents and requests.

WORDS = st.sampled_from(["acme", "beta", "eu-west", "eu-", "1.2.3", "1.4.0", "a.b", "b", "10.1.2.3", "7"])
ONE_OR_MORE = WORDS | st.lists(WORDS, min_size=1, max_size=3)
OPERATORS = st.one_of(
    st.tuples(st.sampled_from(["in", "not_in", "equals", "prefix", "suffix", "contains"]), ONE_OR_MORE | st.just(7)),
    st.tuples(
        st.just("regex"), st.sampled_from(list(PATTERNS)) | st.lists(st.sampled_from(list(PATTERNS)), min_size=1)
    ),
    st.tuples(st.just("semver"), st.sampled_from(list(RANGES)) | st.lists(st.sampled_from(list(RANGES)), min_size=1)),
    st.tuples(st.just("exists"), st.booleans()),
)
NETWORKS = st.sampled_from(["10.0.0.0/8", "10.1.2.3/32", "2001:db8::/32", "0.0.0.0/0"])
NEGATION = st.sampled_from([{}, {"not": True}, {"not": False}])


def leaf(subject, operator, negation):
    return {**subject, operator[0]: operator[1], **negation}


LEAVES = st.one_of(
    st.builds(leaf, st.sampled_from([{"header": "X-Tenant"}, {"header": "x-region"}]), OPERATORS, NEGATION),
    st.builds(leaf, st.just({"cookie": "tenant"}), OPERATORS, NEGATION),
    st.builds(leaf, st.just({"header": "x-forwarded-for"}), st.tuples(st.just("cidr"), NETWORKS), NEGATION),
    st.builds(lambda op, n: {"path": dict([op]), **n}, OPERATORS, NEGATION),
    st.builds(lambda op, n: {"method": dict([op]), **n}, OPERATORS, NEGATION),
)


def conditions(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda parts, n: {"all": parts, **n}, st.lists(inner, min_size=1, max_size=3), NEGATION),
            st.builds(lambda parts, n: {"any": parts, **n}, st.lists(inner, min_size=1, max_size=3), NEGATION),
            st.builds(lambda part: {"not": part}, inner),
        ),
        max_leaves=5,
    )


SEGMENTS = st.lists(conditions(LEAVES), min_size=2, max_size=2).map(
    lambda pair: {"staff": pair[0], "pilots": {"any": [{"segment": "staff"}, pair[1]]}}
)
CONDITIONS = conditions(LEAVES | st.sampled_from([{"segment": "staff"}, {"segment": "pilots", "not": True}]))
OUTCOMES = st.sampled_from([{"serve": "canary"}, {"serve": "stable"}, {"canary": 50}])
RULES = st.lists(st.tuples(CONDITIONS, OUTCOMES), max_size=6).map(
    lambda rules: [{"name": f"r{i}", "when": when, **outcome} for i, (when, outcome) in enumerate(rules)]
)
VALUES = st.one_of(
    WORDS.map(str.encode),
    st.sampled_from([b"", b"7", b"1.2", b"1.3.9", b"2.0.0", b"tenant=acme", b"x=1; tenant=eu-west;tenant=", b"\xff"]),
    st.sampled_from([b"203.0.113.1, 10.1.2.3", b"10.1.2.3, 203.0.113.1", b"2001:db8::7", b"ACME", b"1.0.0"]),
    st.binary(max_size=8),
)
HEADERS = st.lists(
    st.tuples(st.sampled_from([b"x-tenant", b"x-region", b"cookie", b"x-forwarded-for", b"x-user-id"]), VALUES),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(segments=SEGMENTS, rules=RULES, headers=HEADERS, tail=st.sampled_from([b"", b"?acme", b"/acme", b"\xff"]))
def test_the_first_rule_that_is_true_decides(build, segments, rules, headers, tail):
    method = [(b":method", b"POST")]
    ruleset = ruleset_of(rules, segments=segments)
    decision = decide(ruleset, build.request([*method, *headers], PATH + tail))
    pairs = [(b":path", PATH + tail), *method, *headers]
    expected = next((rule for rule in rules if true_of(rule["when"], pairs, segments)), None)
    assert decision.choice.rule == ("" if expected is None or no_unit(expected, headers) else expected["name"])
    if expected is not None and "serve" in expected:
        assert (decision.choice.cohort.value, decision.choice.reason.value) == (expected["serve"], "TARGETING_MATCH")


def no_unit(rule, headers):
    """A split needs one unit: without any, or with two, the reason names no rule."""
    units = [value for name, value in headers if name == b"x-user-id"]
    return "canary" in rule and (not any(units) or len(units) > 1)


@settings(max_examples=200, deadline=None)
@given(segments=SEGMENTS, rules=RULES, headers=HEADERS, path=st.binary(max_size=30))
def test_looking_at_rules_in_groups_finds_what_looking_at_each_finds(build, segments, rules, headers, path):
    (flag,) = flags_of(rules, segments=segments)
    request = build.request([(b":method", b"POST"), *headers], path)
    groups = compile_rules((rule.when, rule.name) for rule in flag.rules)
    one_by_one = next((rule.name for rule in flag.rules if compile_condition(rule.when)(request)), None)
    assert first_match(groups, request) == one_by_one


@settings(max_examples=100, deadline=None)
@given(
    segments=SEGMENTS,
    rules=RULES,
    headers=st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=500)), max_size=8) | HEADERS,
    path=st.binary(max_size=200),
)
def test_every_rule_has_an_answer_for_any_bytes(build, segments, rules, headers, path):
    ruleset = ruleset_of(rules, segments=segments)
    decision = decide(ruleset, build.request(headers, PATH + path))
    assert decision.choice is ruleset.choices[decision.choice.index]


def test_an_open_quotation_does_not_swallow_the_next_expression(build):
    rules = [
        {"name": "a", "when": {"header": "x-tenant", "regex": r"\Qa"}, "serve": "canary"},
        {"name": "b", "when": {"header": "x-tenant", "regex": r"\Qb\E"}, "serve": "canary"},
    ]
    ruleset = ruleset_of(rules)
    assert [build.ask(ruleset, ("x-tenant", value)).choice.rule for value in ("a", "b", "c")] == ["a", "b", ""]


def test_a_rule_with_a_percentage_splits_by_a_salt_of_its_own(build, murmur3):
    rules = [{"name": "pilot", "when": {"header": "x-region", "prefix": "eu-"}, "canary": 50}]
    exposures = Exposures(1, {"digits": Exposure(salt="s", attempt=2)})
    for decided, salt in ((None, b"s/pilot:"), (exposures, b"s#2/pilot:")):
        ruleset = ruleset_of(rules, salt="s", exposures=decided)
        for i in range(50):
            unit = f"user-{i}".encode()
            decision = build.ask(ruleset, ("x-region", "eu-1"), ("x-user-id", unit))
            assert decision.unit_hash == murmur3(salt + unit, 0)
            below = decision.unit_hash * 100_000 >> 32 < 50_000
            assert build.answer(decision) == ("canary" if below else "stable", "RULE_SPLIT")


def test_a_cold_canary_gets_nobody_whatever_the_rules_say(build):
    rules = [
        {"name": "staff", "when": {"header": "x-tenant", "equals": "acme"}, "serve": "canary"},
        {"name": "ban", "when": {"header": "x-tenant", "equals": "beta"}, "serve": "stable"},
        {"name": "pilot", "when": {"header": "x-tenant", "equals": "p"}, "canary": 100},
        {"name": "none", "when": {"header": "x-tenant", "equals": "n"}, "canary": 0},
    ]
    cold = Exposures(1, {"digits": Exposure(salt="digits", cap=0)})
    ruleset = ruleset_of(rules, exposures=cold)
    asked = {
        name: build.answer(build.ask(ruleset, ("x-tenant", name), ("x-user-id", "u")))
        for name in ["acme", "beta", "p", "n"]
    }
    assert asked == {
        "acme": ("stable", "HELD"), "beta": ("stable", "TARGETING_MATCH"),
        "p": ("stable", "HELD"), "n": ("stable", "RULE_SPLIT"),
    }  # fmt: skip


def test_rules_come_before_the_percentage_and_after_the_switch(build):
    rules = [{"name": "ban", "when": {"header": "x-tenant", "equals": "acme"}, "serve": "stable"}]
    at_100 = ruleset_of(rules, canary=100)
    assert build.answer(build.ask(at_100, ("x-tenant", "acme"), ("x-user-id", "u"))) == ("stable", "TARGETING_MATCH")
    assert build.answer(build.ask(at_100, ("x-tenant", "beta"), ("x-user-id", "u"))) == ("canary", "SPLIT")
    off = ruleset_of([{**rules[0], "serve": "canary"}], canary=100, enabled=False)
    assert build.answer(build.ask(off, ("x-tenant", "acme"))) == ("stable", "DISABLED")


@pytest.mark.parametrize("count", [1, 2, 100])
def test_rules_in_a_row_on_one_header_are_one_group(count):
    rules = [
        {"name": f"r{i}", "when": {"header": "x-tenant", "equals": f"t{i}"}, "serve": "canary"} for i in range(count)
    ]
    (flag,) = flags_of(rules)
    assert len(compile_rules((rule.when, rule.name) for rule in flag.rules)) == 1

"""What one condition says about one request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.conditions import (
    All,
    AnyOf,
    Leaf,
    Not,
    Op,
    Subject,
    compile_condition,
    compile_regex,
    headers_read,
    needed_leaf,
    parse_semver_range,
    semver_key,
    value_test,
)

TENANT = Leaf(Subject.HEADER, "x-tenant", Op.IN, ("acme", "beta"))


def holds(build, condition, *headers, path=b"/v2/models/digits/infer"):
    pairs = [tuple(part.encode() if isinstance(part, str) else part for part in pair) for pair in headers]
    return compile_condition(condition)(build.request(pairs, path))


def header(op, *values, name="x-tenant"):
    return Leaf(Subject.HEADER, name, op, values)


ANY_VALUE = {
    Op.IN: "acme",
    Op.PREFIX: "a",
    Op.SUFFIX: "e",
    Op.CONTAINS: "cm",
    Op.REGEX: ".*",
    Op.SEMVER: ">=0.0.0",
    Op.CIDR: "0.0.0.0/0",
}


@pytest.mark.parametrize("op", list(Op))
def test_about_an_absent_header_every_comparison_is_false_and_its_negation_true(build, op):
    leaf = header(op, *filter(None, [ANY_VALUE.get(op)]))
    assert not holds(build, leaf)
    assert holds(build, Not(leaf))
    cookie = Leaf(Subject.COOKIE, "sid", leaf.op, leaf.values)
    if op is not Op.CIDR:
        assert not holds(build, cookie)
        assert not holds(build, cookie, ("cookie", "other=acme"))


def test_an_empty_header_is_there_and_equals_the_empty_text(build):
    assert holds(build, header(Op.EXISTS), ("x-tenant", ""))
    assert holds(build, header(Op.IN, ""), ("x-tenant", ""))
    assert not holds(build, header(Op.PREFIX, "a"), ("x-tenant", ""))


def test_a_repeated_header_satisfies_if_any_of_its_values_does(build):
    twice = [("x-tenant", "other"), ("x-tenant", "acme")]
    assert holds(build, TENANT, *twice)
    assert holds(build, TENANT, *reversed(twice))
    assert not holds(build, Not(TENANT), *twice)
    assert not holds(build, TENANT, ("x-tenant", "acm"), ("x-tenant", "e"))


def test_values_are_compared_as_bytes_with_their_case_and_white_space(build):
    for value in ("Acme", " acme", "acme ", "acme,beta"):
        assert not holds(build, TENANT, ("x-tenant", value))
    assert holds(build, header(Op.IN, "ünï"), ("x-tenant", "ünï".encode()))
    assert not holds(build, header(Op.IN, "ünï"), ("x-tenant", "ünï".encode("latin-1")))


@pytest.mark.parametrize(
    ("leaf", "yes", "no"),
    [
        (header(Op.PREFIX, "eu-", "uk-"), ["eu-", "eu-west", "uk-x"], ["", "e", "us-eu-"]),
        (header(Op.SUFFIX, ".de", ".at"), [".de", "x.de", "y.at"], ["de", "x.dex"]),
        (header(Op.CONTAINS, "beta", "rc"), ["beta", "1-beta-2", "arc"], ["", "bet"]),
        (header(Op.REGEX, "^v[0-9]+$", "x"), ["v12", "x", "axb"], ["v", "av1", "v1a"]),
        (header(Op.EXISTS), ["", "anything"], []),
    ],
)
def test_each_operator_takes_what_it_says(build, leaf, yes, no):
    for value in yes:
        assert holds(build, leaf, ("x-tenant", value)), value
    for value in no:
        assert not holds(build, leaf, ("x-tenant", value)), value


def test_a_cookie_is_found_in_any_cookie_header_and_by_its_whole_name(build):
    leaf = Leaf(Subject.COOKIE, "tenant", Op.IN, ("acme",))
    assert holds(build, leaf, ("cookie", "a=1; tenant=acme"))
    assert holds(build, leaf, ("cookie", "a=1"), ("cookie", "tenant=acme"))
    assert holds(build, leaf, ("cookie", "tenant=x; tenant=acme"))
    assert not holds(build, leaf, ("cookie", "xtenant=acme; Tenant=acme; tenant"))


def test_the_path_is_compared_without_its_query(build):
    leaf = Leaf(Subject.PATH, "", Op.SUFFIX, ("/infer",))
    assert holds(build, leaf, path=b"/v2/models/digits/infer?x=1")
    assert not holds(build, leaf, path=b"/v2/models/digits/ready?x=/infer")
    method = Leaf(Subject.METHOD, "", Op.IN, ("POST",))
    assert holds(build, method, (":method", "POST"))
    assert not holds(build, method, (":method", "post"))


def test_combinations_are_plain_logic(build):
    region = header(Op.PREFIX, "eu-", name="x-region")
    both, either = All((TENANT, region)), AnyOf((TENANT, region))
    for tenant in (None, "acme", "other"):
        for where in (None, "eu-1", "us-1"):
            sent = [(name, value) for name, value in (("x-tenant", tenant), ("x-region", where)) if value]
            a, b = tenant == "acme", where == "eu-1"
            assert holds(build, both, *sent) == (a and b)
            assert holds(build, either, *sent) == (a or b)
            assert holds(build, Not(both), *sent) == (not a or not b)


# Addresses.


@pytest.mark.parametrize(
    ("value", "inside"),
    [
        ("10.1.2.3", True),
        ("203.0.113.9, 10.1.2.3", True),
        ("10.1.2.3, 203.0.113.9", False),
        ("10.1.2.3,", False),
        ("11.0.0.1", False),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("10.1.2", False),
        ("10.1.2.3:80", False),
        ("", False),
        ("x" * 100_000, False),
    ],
)
def test_only_the_last_address_counts_because_envoy_wrote_it(build, value, inside):
    leaf = header(Op.CIDR, "10.0.0.0/8", "2001:db8::/32", name="x-forwarded-for")
    assert holds(build, leaf, ("x-forwarded-for", value)) is inside


def test_a_client_cannot_bring_an_address_in_a_header_of_its_own_before_envoys(build):
    leaf = header(Op.CIDR, "10.0.0.0/8", name="x-forwarded-for")
    assert not holds(build, leaf, ("x-forwarded-for", "10.1.1.1"), ("x-forwarded-for", "203.0.113.9"))
    assert holds(build, leaf, ("x-forwarded-for", "203.0.113.9"), ("x-forwarded-for", "10.1.1.1"))


# Versions.

ORDER = (
    "0.0.0-0 0.0.0 0.9.9 1.0.0-1 1.0.0-2 1.0.0-10 1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2",
    "1.0.0-beta.11 1.0.0-rc.1 1.0.0 1.0.1 1.2.0 1.10.0 2.0.0-rc.1 2.0.0 10.0.0",
)


def test_versions_sort_as_semver_says():
    keys = [semver_key(version.encode()) for version in " ".join(ORDER).split()]
    assert None not in keys
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert semver_key(b"1.0.0+build.5") == semver_key(b"1.0.0")


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "v1.2.3", "1.2.3.4", "01.2.3", "1.2.3-", "1.2.3-a..b", "1.2.x", "\xff"]
)
def test_what_is_no_version_is_in_no_range(text):
    assert semver_key(text.encode("latin-1")) is None
    assert not value_test(Op.SEMVER, [">=0.0.0-0"])(text.encode("latin-1"))


RANGES = {
    ">=1.2.0": ("1.2.0 1.2.1 2.0.0", "1.1.9 1.2.0-rc.1"),
    ">1.2.0": ("1.2.1", "1.2.0"),
    ">1": ("2.0.0 2.0.0-rc.1 10.0.0", "1.0.0 1.9.9 0.1.0"),
    ">1.2": ("1.3.0 2.0.0", "1.2.9 1.2.0"),
    "<2": ("1.9.9 0.0.1", "2.0.0 2.0.0-rc.1 2.1.0"),
    "<=1": ("1.0.0 1.9.9 0.1.0", "2.0.0 2.0.0-rc.1"),
    "<=1.2": ("1.2.9 1.2.0 0.1.0", "1.3.0 1.3.0-rc.1"),
    "<=1.2.3": ("1.2.3 1.2.3-rc.1", "1.2.4"),
    "1.2.3": ("1.2.3 1.2.3+x", "1.2.4 1.2.3-rc.1"),
    "=1.2": ("1.2.0 1.2.9", "1.3.0 1.1.9 1.3.0-rc.1"),
    "1": ("1.0.0 1.9.9", "2.0.0 0.9.9 2.0.0-rc.1"),
    "^1.4": ("1.4.0 1.9.0", "1.3.9 2.0.0 2.0.0-rc.1"),
    "^0.2.3": ("0.2.3 0.2.9", "0.3.0 0.2.2 1.0.0"),
    "^0.0.3": ("0.0.3", "0.0.4 0.0.2"),
    "^0": ("0.0.1 0.9.9", "1.0.0"),
    "~1.4.2": ("1.4.2 1.4.9", "1.5.0 1.4.1"),
    "~1": ("1.0.0 1.9.9", "2.0.0"),
    ">=2.1.0 <3": ("2.1.0 2.9.9", "2.0.9 3.0.0 3.0.0-rc.1"),
    ">=2.1.0, <3": ("2.1.0 2.9.9", "2.0.9 3.0.0"),
    ">=1.0.0-rc.1": ("1.0.0-rc.1 1.0.0-rc.2 1.0.0", "1.0.0-beta"),
}


VERSIONS = sorted({version for pair in RANGES.values() for text in pair for version in text.split()})


@pytest.mark.parametrize("text", RANGES)
def test_a_range_takes_what_people_mean_by_it(text):
    yes, no = RANGES[text]
    accepts = value_test(Op.SEMVER, [text])
    assert [version for version in yes.split() if not accepts(version.encode())] == []
    assert [version for version in no.split() if accepts(version.encode())] == []


@pytest.mark.parametrize(
    "text", ["", " ", "newest", ">=", ">= 1.0.0", "1.2.3 - 2", "1.x", ">1-rc", "1" * 5000, "1.2.3-"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="write for example"):
        parse_semver_range(text)


def test_a_version_with_more_digits_than_python_would_read_is_compared(build):
    leaf = header(Op.SEMVER, ">=1.0.0-1")
    longest = "1.0.0-" + "9" * 100_000
    assert holds(build, leaf, ("x-tenant", longest))
    assert not holds(build, header(Op.SEMVER, ">=1.0.0"), ("x-tenant", longest))


@given(ranges=st.lists(st.sampled_from(list(RANGES)), min_size=1, max_size=4), version=st.sampled_from(list(VERSIONS)))
def test_several_ranges_take_what_one_of_them_takes(ranges, version):
    each = any(value_test(Op.SEMVER, [text])(version.encode()) for text in ranges)
    assert value_test(Op.SEMVER, ranges)(version.encode()) == each


# Expressions.


def test_an_expression_that_makes_others_explode_takes_linear_time(build):
    leaf = header(Op.REGEX, "^(a+)+$")
    assert not holds(build, leaf, ("x-tenant", "a" * 100_000 + "!"))


def test_an_expression_too_large_to_hold_is_refused():
    with pytest.raises(ValueError, match="too large"):
        compile_regex(r"\pL{1000}")


@pytest.mark.parametrize("value", [b"", b"\x00", b"\xff\xfe", b"a\xffb", bytes(range(256))])
def test_an_expression_meets_any_bytes(build, value):
    for pattern in ("^$", "a.b", "(?i)x", r"\pL", ".*", "[^a]"):
        assert holds(build, header(Op.REGEX, pattern), ("x-tenant", value)) in (True, False)


# What a condition looks at.


def test_the_headers_that_envoy_must_forward_are_those_that_are_looked_at():
    condition = All((TENANT, Not(AnyOf((Leaf(Subject.COOKIE, "sid", Op.EXISTS), Leaf(Subject.PATH, "", Op.EXISTS))))))
    assert headers_read(condition) == {"x-tenant", "cookie", ":path"}
    assert headers_read(Leaf(Subject.METHOD, "", Op.EXISTS)) == {":method"}


def test_a_needed_comparison_is_one_without_which_nothing_matches():
    assert needed_leaf(TENANT) == TENANT
    assert needed_leaf(Not(TENANT)) is None
    assert needed_leaf(AnyOf((TENANT, TENANT))) is None
    assert needed_leaf(All((Not(TENANT), AnyOf((TENANT,)), All((TENANT,))))) == TENANT

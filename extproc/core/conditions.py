"""What a rule asks of a request, as frozen values, and the closures that answer it without raising.

Logic is plain boolean: a condition on a header that is absent is false, and its negation true. A header that came more
than once satisfies a condition if any of its values does, except that `cidr` looks at the last one only. Values are
compared as bytes, case-sensitive.
"""

import functools
import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import re2

from extproc.core.request import Request, cookie_values

Test = Callable[[Request], bool]
ValueTest = Callable[[bytes], bool]

MAX_REGEX_BYTES = 1 << 18
"""Memory that one expression of a file may take: with MAX_REGEXES a bound on what a file makes every worker hold."""

MAX_JOINED_BYTES = 1 << 20
"""The same for the expressions of many rules joined into one."""

MAX_REGEXES = 2_000
"""Different expressions in one file."""


class Subject(StrEnum):
    """What is looked at."""

    HEADER = "header"
    COOKIE = "cookie"
    PATH = "path"
    METHOD = "method"


class Op(StrEnum):
    """How a value is compared. `not_in` is `in` negated."""

    IN = "in"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    CONTAINS = "contains"
    REGEX = "regex"
    SEMVER = "semver"
    CIDR = "cidr"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One comparison: of `subject` (with its `name`, lower-case for a header) by `op` with any of `values`."""

    subject: Subject
    name: str
    op: Op
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Not:
    """True where the inner condition is false."""

    inner: "Condition"


@dataclass(frozen=True, slots=True)
class All:
    """True where every inner condition is."""

    inner: "tuple[Condition, ...]"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True where at least one inner condition is."""

    inner: "tuple[Condition, ...]"


Condition = Leaf | Not | All | AnyOf


def headers_read(condition: Condition) -> frozenset[str]:
    """The request headers that a condition looks at."""
    match condition:
        case Leaf(subject=Subject.HEADER, name=name):
            return frozenset((name,))
        case Leaf(subject=Subject.COOKIE):
            return frozenset(("cookie",))
        case Leaf(subject=Subject.PATH):
            return frozenset((":path",))
        case Leaf():
            return frozenset((":method",))
        case Not(inner):
            return headers_read(inner)
        case All(inners) | AnyOf(inners):
            return frozenset[str]().union(*map(headers_read, inners))


def headers_needed(condition: Condition) -> frozenset[str] | None:
    """Headers of which at least one must be there for the condition to be true. None: it can be true without any."""
    match condition:
        case Leaf(subject=Subject.HEADER | Subject.COOKIE):
            return headers_read(condition)
        case All(inners):
            return next((headers for inner in inners if (headers := headers_needed(inner)) is not None), None)
        case AnyOf(inners):
            every = [headers_needed(inner) for inner in inners]
            known = [headers for headers in every if headers is not None]
            return frozenset[str]().union(*known) if len(known) == len(every) else None
        case _:
            return None


def needed_leaf(condition: Condition) -> Leaf | None:
    """A comparison without which the condition cannot be true, None if there is no single one."""
    match condition:
        case Leaf():
            return condition
        case All(inners):
            return next((leaf for inner in inners if (leaf := needed_leaf(inner)) is not None), None)
        case _:
            return None


def compile_condition(condition: Condition) -> Test:
    """The condition as a closure over a request. Raises ValueError for what the schema would have refused."""
    match condition:
        case Leaf():
            return _compile_leaf(condition)
        case Not(inner):
            test = compile_condition(inner)
            return lambda request: not test(request)
        case All(inners):
            return _first_that_is(False, inners)
        case AnyOf(inners):
            return _first_that_is(True, inners)


def _first_that_is(decisive: bool, conditions: Iterable[Condition]) -> Test:  # noqa: FBT001  any with True, all with False
    """`decisive` as soon as one of the conditions is, else the opposite. A loop costs half of any() and all()."""
    tests = tuple(map(compile_condition, conditions))

    def test(request: Request) -> bool:
        for each in tests:
            if each(request) is decisive:
                return decisive
        return not decisive

    return test


def _compile_leaf(leaf: Leaf) -> Test:
    accepts = value_test(leaf.op, leaf.values)
    if leaf.op is Op.CIDR:
        return _last_value_test(leaf.name.encode(), accepts)
    return subject_test(leaf.subject, leaf.name, accepts)


def subject_test(subject: Subject, name: str, accepts: ValueTest) -> Test:
    """Whether one of a request's values of this subject is accepted."""
    match subject:
        case Subject.COOKIE:
            cookie = name.encode()
            return lambda request: any(accepts(value) for value in cookie_values(request, cookie))
        case Subject.PATH:
            return _path_test(accepts)
        case Subject.METHOD:
            return _header_test(b":method", accepts)
        case Subject.HEADER:
            return _header_test(name.encode(), accepts)


def _path_test(accepts: ValueTest) -> Test:
    """The path without its query: what is asked for, not with which parameters."""

    def test(request: Request) -> bool:
        return accepts(request.headers.get(b":path", b"").partition(b"?")[0])

    return test


def _header_test(name: bytes, accepts: ValueTest) -> Test:
    def test(request: Request) -> bool:
        value = request.headers.get(name)
        if value is None:
            return False
        if name in request.repeated:
            return any(accepts(each) for each in request.repeated[name])
        return accepts(value)

    return test


def _last_value_test(name: bytes, accepts: ValueTest) -> Test:
    """For addresses: Envoy writes the last value, and whatever stands before it a client may have made up."""

    def test(request: Request) -> bool:
        value = request.headers.get(name)
        return value is not None and accepts(request.repeated.get(name, (value,))[-1])

    return test


def value_test(op: Op, values: Sequence[str]) -> ValueTest:
    """Whether one value, as raw bytes, compares true. Never raises when called."""
    encoded = tuple(value.encode() for value in values)
    match op:
        case Op.IN:
            return frozenset(encoded).__contains__
        case Op.PREFIX:
            return lambda value: value.startswith(encoded)
        case Op.SUFFIX:
            return lambda value: value.endswith(encoded)
        case Op.CONTAINS:
            return lambda value: any(part in value for part in encoded)
        case Op.REGEX:
            expressions = tuple(compile_regex(value) for value in values)
            return lambda value: any(expression.search(value) is not None for expression in expressions)
        case Op.SEMVER:
            return _semver_test(map(parse_semver_range, values))
        case Op.CIDR:
            return _network_test(tuple(ipaddress.ip_network(value) for value in values))
        case Op.EXISTS:
            return lambda _value: True


@functools.lru_cache(maxsize=MAX_REGEXES)
def compile_regex(pattern: str, max_bytes: int = MAX_REGEX_BYTES) -> "re2._Regexp[bytes]":
    """A linear-time expression over bytes, one for all rules that write it. Raises ValueError with RE2's reason."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = max_bytes
    try:
        return re2.compile(pattern.encode(), options)
    except re2.error as error:
        reason = error.args[0]
        raise ValueError(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None


def quote_regex(text: str) -> str:
    """An expression that finds exactly this text."""
    return str(re2.escape(text))


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network_test(networks: Sequence[Network]) -> ValueTest:
    """Whether the last address of an x-forwarded-for list, the one that Envoy itself put there, is in a network."""
    masked = {
        version: [(int(each.network_address), int(each.netmask)) for each in networks if each.version == version]
        for version in (4, 6)
    }

    def test(value: bytes) -> bool:
        try:
            address = ipaddress.ip_address(value.rpartition(b",")[2].strip().decode("ascii"))
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        number = int(address)
        return any(number & mask == network for network, mask in masked[address.version])

    return test


_SEMVER = re.compile(
    rb"(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})"
    rb"(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z.-]+)?"
)
_COMPARATOR = re.compile(
    r"(>=|<=|>|<|=|\^|~)?([0-9]{1,18})(?:\.([0-9]{1,18}))?(?:\.([0-9]{1,18}))?(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?"
)

SemverKey = tuple[int, int, int, tuple[tuple[int, int, bytes], ...]]
SemverRange = tuple[SemverKey, SemverKey]
"""The versions from the first key on, up to but without the second."""

_LOWEST: SemverKey = (0, 0, 0, ())
_ABOVE_ALL: SemverKey = (10**18, 0, 0, ())  # a part has at most 18 digits

_RELEASE: tuple[tuple[int, int, bytes], ...] = ((2, 0, b""),)
"""Sorts a release after each of its pre-releases, whose identifiers begin with 0 (numbers) or 1 (words)."""


def semver_key(version: bytes) -> SemverKey | None:
    """A version as a tuple that sorts by precedence; None if it is none. Source: semver.org 2.0.0, item 11."""
    match = _SEMVER.fullmatch(version)
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3]), _prerelease_key(match[4])


def _prerelease_key(text: bytes | None) -> tuple[tuple[int, int, bytes], ...]:
    if text is None:
        return _RELEASE
    return tuple(map(_identifier_key, text.split(b".")))


def _identifier_key(part: bytes) -> tuple[int, int, bytes]:
    """Numbers sort by length, then digit by digit: a client may send more of them than Python would make an int of."""
    if not part.isdigit():
        return 1, 0, part
    digits = part.lstrip(b"0")
    return 0, len(digits), digits


def parse_semver_range(text: str) -> SemverRange:
    """`>=2.1.0 <3`, `^1.4`, `~1.4.2`, `1.2.3`: comparisons that must all hold. Raises ValueError."""
    low, high = _LOWEST, _ABOVE_ALL
    for word in text.replace(",", " ").split():
        match = _COMPARATOR.fullmatch(word)
        if match is None or (match[5] is not None and match[4] is None):
            raise ValueError(f"{word!r} is no version comparison; write for example >=2.1.0 <3")
        first, end = _compared(match)
        low, high = max(low, first), min(high, end)
    if not text.replace(",", " ").strip():
        raise ValueError("a version range is empty; write for example >=2.1.0 <3")
    if low >= high:
        raise ValueError(f"no version is in {text!r}; write for example >=2.1.0 <3")
    return low, high


def _compared(match: re.Match[str]) -> SemverRange:
    """The versions that one comparison takes. A part that is left out stands for all its values: `>3` begins at 4."""
    op, major, minor, patch = match[1] or "=", int(match[2]), match[3], match[4]
    low: SemverKey = (major, int(minor or 0), int(patch or 0), _prerelease_key(match[5].encode() if match[5] else None))
    above = _after(low) if patch is not None else _next(low, 0 if minor is None else 1)
    match op:
        case "^":
            first = 0 if major or minor is None else 1 if int(minor) or patch is None else 2
            return low, _next(low, first)
        case "~":
            return low, _next(low, 0 if minor is None else 1)
        case ">=":
            return low, _ABOVE_ALL
        case ">":
            return above, _ABOVE_ALL
        case "<":
            # `<3` leaves out 3.0.0-rc.1 too: who writes it means the third version, not its last pre-release.
            return _LOWEST, low if patch is not None else (*low[:3], ())
        case "<=":
            return _LOWEST, above
        case _:
            return low, above


def _after(key: SemverKey) -> SemverKey:
    """The key next to this one: no version comes between, since 0 is the least that can follow in a pre-release."""
    return (*key[:3], (*key[3], (0, 0, b"")))


def _next(key: SemverKey, place: int) -> SemverKey:
    """The lowest version, pre-releases included, above all that share the parts up to `place`."""
    parts = [key[0], key[1], key[2]]
    parts[place] += 1
    parts[place + 1 :] = [0] * (2 - place)
    return parts[0], parts[1], parts[2], ()


def _semver_test(ranges: Iterable[SemverRange]) -> ValueTest:
    """Whether a version is in one of the ranges, by one search however many there are."""
    bounds: list[SemverKey] = []
    for low, high in sorted(ranges):
        if bounds and low <= bounds[-1]:
            bounds[-1] = max(bounds[-1], high)
        else:
            bounds += [low, high]

    def test(value: bytes) -> bool:
        key = semver_key(value)
        return key is not None and bisect_right(bounds, key) % 2 == 1

    return test

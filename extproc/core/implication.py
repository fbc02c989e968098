"""What can be said about conditions without a request: that one implies another, is always true, or never.

Careful rather than clever: True is a proof, False only means that none was found.
"""

import functools
import ipaddress
from collections.abc import Sequence
from itertools import product

from extproc.core.conditions import All, AnyOf, Condition, Leaf, Not, Op, Subject, ValueTest, value_test

MAX_WORK = 2_500
"""Pairs of comparisons that are worth looking at; larger conditions are compared for equality only."""

MAX_VALUES = 10_000
"""The same for pairs of values."""


def implies(a: Condition, b: Condition) -> bool:
    """Whether b is true wherever a is."""
    return a == b or (_size(a) * _size(b) <= MAX_WORK and _implies(a, b))


def always(condition: Condition, prefix: str) -> bool:
    """Whether it is true of every request whose path begins with `prefix`, as a model's do."""
    match condition:
        case Leaf(subject=Subject.PATH | Subject.METHOD, op=Op.EXISTS):
            return True
        case Leaf(subject=Subject.PATH, op=Op.PREFIX, values=values):
            return any(prefix.startswith(value) for value in values)
        case Not(inner):
            return never(inner, prefix)
        case All(inners):
            return all(always(each, prefix) for each in inners)
        case AnyOf(inners):
            return covers_all(inners, prefix)
        case _:
            return False


def never(condition: Condition, prefix: str) -> bool:
    """Whether it is false of every request whose path begins with `prefix`."""
    match condition:
        case Leaf(subject=Subject.PATH, op=Op.IN, values=values):
            return not any(value.startswith(prefix) and "?" not in value for value in values)
        case Leaf(subject=Subject.PATH, op=Op.PREFIX, values=values):
            fits = (value.startswith(prefix) or prefix.startswith(value) for value in values if "?" not in value)
            return not any(fits)
        case Not(inner):
            return always(inner, prefix)
        case All(inners):
            return any(never(each, prefix) for each in inners) or _contradict(inners)
        case AnyOf(inners):
            return all(never(each, prefix) for each in inners)
        case _:
            return False


def covers_all(conditions: Sequence[Condition], prefix: str) -> bool:
    """Whether at least one of them is true of every request."""
    if any(always(each, prefix) for each in conditions):
        return True
    negated = [each.inner for each in conditions if isinstance(each, Not)]
    return len(negated) * len(conditions) <= MAX_WORK and any(implies(a, b) for a, b in product(negated, conditions))


def _contradict(conditions: Sequence[Condition]) -> bool:
    negated = [each.inner for each in conditions if isinstance(each, Not)]
    return len(negated) * len(conditions) <= MAX_WORK and any(implies(b, a) for a, b in product(negated, conditions))


def _size(condition: Condition) -> int:
    match condition:
        case Leaf():
            return 1
        case Not(inner):
            return _size(inner)
        case All(inners) | AnyOf(inners):
            return sum(map(_size, inners))


def _implies(a: Condition, b: Condition) -> bool:
    if a == b:
        return True
    match a, b:
        case _, All(inners):
            return all(_implies(a, each) for each in inners)
        case AnyOf(inners), _:
            return all(_implies(each, b) for each in inners)
        case Not(x), Not(y):
            return _implies(y, x)
        case Leaf(), Leaf():
            return _leaf_implies(a, b)
        case All(inners), AnyOf(choices):
            return any(_implies(each, b) for each in inners) or any(_implies(a, each) for each in choices)
        case All(inners), _:
            return any(_implies(each, b) for each in inners)
        case _, AnyOf(choices):
            return any(_implies(a, each) for each in choices)
        case _:
            return False


def _leaf_implies(a: Leaf, b: Leaf) -> bool:
    """A comparison holds if any value of a header passes, so what one value implies, the header does."""
    if (a.subject, a.name) != (b.subject, b.name):
        return False
    if b.op is Op.EXISTS:
        return True
    if a.op is Op.EXISTS or len(a.values) * len(b.values) > MAX_VALUES:
        return False
    if (a.op is Op.CIDR) != (b.op is Op.CIDR):
        return False
    if a.op is Op.IN:
        accepts = _accepts(b.op, b.values)
        return all(accepts(value.encode()) for value in a.values)
    return all(any(_value_implies(a.op, x, b.op, y) for y in b.values) for x in a.values)


@functools.lru_cache(maxsize=2_000)
def _accepts(op: Op, values: tuple[str, ...]) -> ValueTest:
    return value_test(op, values)


def _value_implies(a: Op, x: str, b: Op, y: str) -> bool:
    match a, b:
        case Op.PREFIX, Op.PREFIX:
            return x.startswith(y)
        case Op.SUFFIX, Op.SUFFIX:
            return x.endswith(y)
        case ((Op.PREFIX | Op.SUFFIX | Op.CONTAINS), Op.CONTAINS):
            return y in x
        case Op.CIDR, Op.CIDR:
            return _inside(x, y)
        case _:
            return a is b and x == y


def _inside(x: str, y: str) -> bool:
    inner, outer = ipaddress.ip_network(x), ipaddress.ip_network(y)
    if isinstance(inner, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False

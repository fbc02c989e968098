"""A flag's rules, compiled so that those which cannot match cost next to nothing. The first match wins.

Rules in a row that look at the same thing are a group with one test before it: could any of them match? A hundred rules
on one header cost one test where none of them does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from extproc.core.conditions import (
    MAX_JOINED_BYTES,
    Condition,
    Leaf,
    Op,
    Subject,
    Test,
    ValueTest,
    compile_condition,
    compile_regex,
    headers_needed,
    needed_leaf,
    quote_regex,
    subject_test,
    value_test,
)
from extproc.core.request import Request

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Group(Generic[Outcome]):
    """Rules in a row, each a test and what it leads to, in order.

    Where all of `headers` are absent none of them matches, and neither where `could_match` is false. None: nothing is
    known.
    """

    headers: frozenset[bytes] | None
    could_match: Test | None
    rules: tuple[tuple[Test, Outcome], ...]


def compile_rules(rules: Iterable[tuple[Condition, Outcome]]) -> tuple[Group[Outcome], ...]:
    """Conditions with what they lead to, in the order of the file."""
    groups = []
    for subject, members in groupby(rules, key=lambda rule: _subject(rule[0])):
        run = tuple(members)
        compiled = tuple((compile_condition(condition), outcome) for condition, outcome in run)
        leaves = [leaf for condition, _ in run if (leaf := needed_leaf(condition)) is not None]
        worth_it = subject is not None and len(run) > 1
        headers = _headers(condition for condition, _ in run)
        groups.append(Group(headers, _could_match(leaves) if worth_it else None, compiled))
    return tuple(groups)


def _subject(condition: Condition) -> tuple[Subject, str] | None:
    leaf = needed_leaf(condition)
    return None if leaf is None else (leaf.subject, leaf.name)


def _headers(conditions: Iterable[Condition]) -> frozenset[bytes] | None:
    """Without any of these headers none of the conditions is true. None where one could be."""
    found: set[bytes] = set()
    for condition in conditions:
        headers = headers_needed(condition)
        if headers is None:
            return None
        found.update(name.encode() for name in headers)
    return frozenset(found)


def _could_match(leaves: Sequence[Leaf]) -> Test:
    """One test that is true wherever one of these leaves of one subject is."""
    values: dict[Op, list[str]] = {}
    for leaf in leaves:
        values.setdefault(leaf.op, []).extend(leaf.values)
    tests = tuple(_joined_test(op, joined) for op, joined in values.items())
    accepts = tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)
    return subject_test(leaves[0].subject, leaves[0].name, accepts)


def _joined_test(op: Op, values: Sequence[str]) -> ValueTest:
    """What `value_test` would say, by one expression where that is faster than one search per value."""
    # An open \\Q would take the next expression for its own text.
    if op not in (Op.CONTAINS, Op.REGEX) or (op is Op.REGEX and any("\\Q" in value for value in values)):
        return value_test(op, values)
    parts = [quote_regex(value) for value in values] if op is Op.CONTAINS else [f"(?:{value})" for value in values]
    try:
        expression = compile_regex("|".join(parts), MAX_JOINED_BYTES)
    except ValueError:  # together they may be larger than one expression may be
        return value_test(op, values)
    return lambda value: expression.search(value) is not None


def first_match(groups: Iterable[Group[Outcome]], request: Request) -> Outcome | None:
    """What the first matching rule leads to; None if none matches."""
    headers = request.headers
    for group in groups:
        if group.headers is not None and group.headers.isdisjoint(headers):
            continue
        if group.could_match is not None and not group.could_match(request):
            continue
        for test, outcome in group.rules:
            if test(request):
                return outcome
    return None

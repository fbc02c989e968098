"""A flag's rules, compiled so that those which cannot match cost next to nothing. The first match wins."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from extproc.core.conditions import Condition, Leaf, Op, Subject, Test, compile_condition, needed_header
from extproc.core.request import Request

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Compiled(Generic[Outcome]):
    """One rule: its test, and what it leads to."""

    test: Test
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Group(Generic[Outcome]):
    """Rules in a row that all need the same header, skipped together where it is absent. None: nothing is needed.

    `by_value` is there if all of them only compare that header with given values: one look-up instead of a test each.
    """

    header: bytes | None
    rules: tuple[Compiled[Outcome], ...]
    by_value: Mapping[bytes, tuple[Compiled[Outcome], ...]] | None = None


def compile_rules(rules: Iterable[tuple[Condition, Outcome]]) -> tuple[Group[Outcome], ...]:
    """Conditions with what they lead to, in the order of the file."""
    groups = []
    for header, members in groupby(rules, key=lambda rule: needed_header(rule[0])):
        run = tuple(members)
        compiled = tuple(Compiled(compile_condition(condition), outcome) for condition, outcome in run)
        groups.append(Group(header, compiled, _by_value([condition for condition, _ in run], compiled)))
    return tuple(groups)


def _by_value(
    conditions: Sequence[Condition], compiled: Sequence[Compiled[Outcome]]
) -> Mapping[bytes, tuple[Compiled[Outcome], ...]] | None:
    table: dict[bytes, list[Compiled[Outcome]]] = {}
    for condition, rule in zip(conditions, compiled, strict=True):
        match condition:
            case Leaf(subject=Subject.HEADER, op=Op.IN, values=values):
                for value in dict.fromkeys(values):
                    table.setdefault(value.encode(), []).append(rule)
            case _:
                return None
    return {value: tuple(rules) for value, rules in table.items()}


def first_match(groups: Iterable[Group[Outcome]], request: Request) -> Outcome | None:
    """What the first matching rule leads to; None if none matches."""
    headers = request.headers
    for group in groups:
        header = group.header
        rules = group.rules
        if header is not None:
            value = headers.get(header)
            if value is None:
                continue
            if group.by_value is not None and header not in request.repeated:
                rules = group.by_value.get(value, ())
        for rule in rules:
            if rule.test(request):
                return rule.outcome
    return None

"""What a flag file must not say although each of its keys is well written: checks that look at two places at once.

They read the plain document, not the schema's models, so that they speak even where something else is wrong.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from extproc.core.conditions import MAX_REGEXES
from extproc.core.document import Document, Path, Problem
from extproc.core.ruleschema import COMBINERS, OPERATORS, SUBJECTS, TRUSTED_ADDRESSES
from extproc.core.scalars import name as checked_name
from extproc.core.scalars import salt as checked_salt
from extproc.core.scalars import shown
from extproc.core.validation import meant, nearest

FIXED_GUARDRAILS = ("errors", "latency", "drift", "hangs", "srm")
GUARDRAIL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_NESTING = 12
"""Conditions inside conditions, with segments expanded: a request walks them as deep as they are."""

MAX_COMPARISONS_OF_A_RULE = 1_000
MAX_COMPARISONS = 200_000
"""Comparisons in one file, with segments expanded."""

_TOO_MANY = 10**9
"""Where counting ends: segments that double a hundred times would make a number that no line can hold."""

_CONDITION_KEYS = (*SUBJECTS, *OPERATORS, *COMBINERS)


def cross_problems(document: Document, flag_keys: Collection[str], models: Collection[str] | None) -> Iterator[Problem]:
    """Every problem of this kind. `flag_keys` are the keys a flag may have."""
    data = _mapping(document.data)
    flags = _mapping(data.get("flags"))
    segments = _mapping(data.get("segments"))
    yield from _name_problems(document, "segments", segments, checked_name, "the name of a segment")
    yield from _name_problems(document, "flags", flags, checked_salt, "the key of a flag")
    yield from _model_problems(document, flags, models)
    for key, flag in flags.items():
        if isinstance(flag, dict):
            yield from _flag_problems(document, key, flag, flag_keys)
    yield from _condition_problems(document, flags, segments)
    yield from _segment_problems(document, flags, segments)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _name_problems(
    document: Document, where: str, mapping: Mapping[str, Any], check: Callable[[str], str], what: str
) -> Iterator[Problem]:
    """The keys of segments and flags are chosen by people. A flag's is also its default salt and model."""
    for key in mapping:
        try:
            check(key)
        except ValueError as error:
            yield document.problem((where, key), f"{what}: {error}", of_key=True)


def _model_problems(document: Document, flags: Mapping[str, Any], models: Collection[str] | None) -> Iterator[Problem]:
    owner: dict[str, str] = {}
    for key, flag in flags.items():
        model = _mapping(flag).get("model", key)
        if not isinstance(model, str):
            continue
        path: Path = ("flags", key, "model")
        if models is not None and model not in models:
            hint = nearest(model, models)
            known = f"did you mean {hint}?" if hint else f"Envoy serves {', '.join(sorted(models)) or 'none'}"
            yield document.problem(path, f"the model {shown(model)} is not in models.yaml; {known}")
        elif model in owner:
            message = f"the model {shown(model)} has the flag {owner[model]} already; a model has at most one"
            yield document.problem(path, message)
        owner.setdefault(model, key)


def _flag_problems(document: Document, key: str, flag: dict[str, Any], flag_keys: Collection[str]) -> Iterator[Problem]:
    path: Path = ("flags", key)
    there = [name for name in ("canary", "rollout") if name in flag]
    if len(there) == 2 or not (there or meant(flag, "canary", flag_keys) or meant(flag, "rollout", flag_keys)):
        which = "both" if there else "neither"
        message = f"write exactly one of `canary` (a percentage) and `rollout` (a plan); here are {which}"
        yield document.problem(path, message, of_key=True)
    names: dict[str, int] = {}
    for i, rule in enumerate(_list(flag.get("rules"))):
        if isinstance(rule, dict):
            yield from _rule_problems(document, (*path, "rules", i), rule, names)
    yield from _rollout_problems(document, (*path, "rollout"), _mapping(flag.get("rollout")))


def _rule_problems(document: Document, path: Path, rule: dict[str, Any], names: dict[str, int]) -> Iterator[Problem]:
    """A rule's name is its salt and its label, so two rules of a flag cannot share one."""
    there = [name for name in ("serve", "canary") if name in rule]
    known = ("name", "when", "serve", "canary")
    if len(there) == 2 or not (there or meant(rule, "serve", known) or meant(rule, "canary", known)):
        which = "both" if there else "neither"
        message = "a rule has exactly one of `serve` (an arm) and `canary` (a percentage of its own)"
        yield document.problem(path, f"{message}; here are {which}")
    name = rule.get("name")
    if isinstance(name, str):
        if name in names:
            message = f"the rule {shown(name)} stands here again; give it a name of its own"
            yield document.problem((*path, "name"), message)
        names.setdefault(name, len(names))


def _rollout_problems(document: Document, path: Path, rollout: Mapping[str, Any]) -> Iterator[Problem]:
    before: Any = None
    for i, step in enumerate(_list(rollout.get("steps"))):
        percent = _mapping(step).get("canary")
        if isinstance(percent, bool) or not isinstance(percent, int | Decimal):
            continue
        if before is not None and percent <= before:
            message = f"a rollout goes up: {shown(percent)} does not come after {shown(before)}"
            yield document.problem((*path, "steps", i, "canary"), message)
        before = percent
    for guardrail in _mapping(rollout.get("guardrails")):
        kind, _, name = guardrail.partition(".")
        if guardrail in FIXED_GUARDRAILS or (kind == "kpi" and GUARDRAIL_NAME.fullmatch(name)):
            continue
        hint = nearest(guardrail, FIXED_GUARDRAILS)
        known = f"did you mean {hint}?" if hint else f"known are {', '.join(FIXED_GUARDRAILS)} and kpi.NAME"
        yield document.problem((*path, "guardrails", guardrail), f"unknown guardrail; {known}", of_key=True)


def walk_conditions(data: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every condition of a file as it is written, those inside others too, each with its path."""
    file = _mapping(data)
    for path, condition in _conditions(_mapping(file.get("flags")), _mapping(file.get("segments"))):
        yield from _walk(path, condition)


def _conditions(flags: Mapping[str, Any], segments: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The conditions that stand on their own: each segment, and each rule's `when`."""
    for name, condition in segments.items():
        yield ("segments", name), condition
    for key, flag in flags.items():
        for i, rule in enumerate(_list(_mapping(flag).get("rules"))):
            if isinstance(rule, dict) and "when" in rule:
                yield ("flags", key, "rules", i, "when"), rule["when"]


def _inside(path: Path, condition: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The conditions directly inside one."""
    for name in ("all", "any"):
        for i, inner in enumerate(_list(condition.get(name))):
            yield (*path, name, i), inner
    if isinstance(condition.get("not"), dict):
        yield (*path, "not"), condition["not"]


def _walk(path: Path, condition: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A condition and those inside it, at any depth."""
    if isinstance(condition, dict):
        yield path, condition
        for inner_path, inner in _inside(path, condition):
            yield from _walk(inner_path, inner)


def _condition_problems(document: Document, flags: Mapping[str, Any], segments: Mapping[str, Any]) -> Iterator[Problem]:
    for top, when in _conditions(flags, segments):
        for path, condition in _walk(top, when):
            if all(key in _CONDITION_KEYS for key in condition):  # a misspelt key is told by the schema
                for message in _says_one_thing(condition):
                    yield document.problem(path, message)
                for name in ("path", "method"):
                    inner = condition.get(name)
                    if isinstance(inner, dict) and all(key in OPERATORS for key in inner):
                        yield from (document.problem((*path, name), text) for text in _one_operator(inner, name))


def _says_one_thing(condition: Mapping[str, Any]) -> Iterator[str]:
    """A condition says exactly one thing, and one that can be true."""
    things = [name for name in (*SUBJECTS, "all", "any", "segment") if name in condition]
    if "not" in condition and not isinstance(condition["not"], bool):
        things.append("not")
    operators = [name for name in OPERATORS if name in condition]
    if len(things) != 1:
        known = ", ".join((*SUBJECTS, *COMBINERS))
        yield f"a condition has exactly one of {known}; here are {', '.join(things) or 'none'}"
    elif things[0] in ("header", "cookie"):
        yield from _one_operator(condition, things[0])
        if "cidr" in operators and str(condition.get("header")).lower() not in TRUSTED_ADDRESSES:
            yield f"cidr needs a header that Envoy wrote: {' or '.join(TRUSTED_ADDRESSES)}"
    elif operators:
        yield f"`{operators[0]}` has nothing to compare beside `{things[0]}`"


def _one_operator(comparison: Mapping[str, Any], subject: str) -> Iterator[str]:
    operators = [name for name in OPERATORS if name in comparison]
    if len(operators) != 1:
        known = ", ".join(OPERATORS)
        yield f"`{subject}` is compared by exactly one of {known}; here are {', '.join(operators) or 'none'}"
    elif subject in ("path", "method") and operators[0] == "cidr":
        yield f"cidr compares an address, which a {subject} is not; write for example prefix"


@dataclass(frozen=True, slots=True)
class _Size:
    """How much a condition costs with its segments expanded."""

    depth: int
    comparisons: int


def _segment_problems(document: Document, flags: Mapping[str, Any], segments: Mapping[str, Any]) -> Iterator[Problem]:
    """Segments that are not there or name themselves, and conditions that are too much with their segments expanded."""
    for top, when in _conditions(flags, segments):
        for path, condition in _walk(top, when):
            name = condition.get("segment")
            if isinstance(name, str) and name not in segments:
                hint = nearest(name, segments)
                have = f"did you mean {hint}?" if hint else "define it under `segments:`"
                yield document.problem((*path, "segment"), f"there is no segment {shown(name)}; {have}")
    uses = {name: _names_used(condition) & segments.keys() for name, condition in segments.items()}
    order = in_order(uses)
    for loop in _loops(uses, order):
        through = f" by way of {', '.join(map(shown, loop[1:6]))}" if len(loop) > 1 else ""
        yield document.problem(("segments", loop[0]), f"this segment names itself{through}", of_key=True)
    sizes: dict[str, _Size] = {}
    for name in order:
        sizes[name] = _size(segments[name], sizes)
    yield from _size_problems(document, flags, segments, sizes)


def _names_used(condition: Any) -> set[str]:
    return {inner["segment"] for _, inner in _walk((), condition) if isinstance(inner.get("segment"), str)}


def in_order(uses: Mapping[str, Collection[str]]) -> list[str]:
    """The names, each after those it uses. Those that use themselves, at once or by way of others, are left out."""
    users: dict[str, list[str]] = {}
    waits = {name: len(used) for name, used in uses.items()}
    for name, used in uses.items():
        for other in used:
            users.setdefault(other, []).append(name)
    order = [name for name, count in waits.items() if not count]
    for name in order:  # grows while it is walked
        for user in users.get(name, ()):
            waits[user] -= 1
            if not waits[user]:
                order.append(user)
    return order


def _loops(uses: Mapping[str, Collection[str]], order: Collection[str]) -> Iterator[list[str]]:
    """Each circle of segments once, beginning where the file does. What only leads to a circle is not told."""
    done = set(order)
    left = {name: sorted(set(used) - done) for name, used in uses.items() if name not in done}
    place = {name: i for i, name in enumerate(uses)}
    seen: set[str] = set()
    for start in left:
        way: dict[str, None] = {}
        here = start
        while here not in seen:
            seen.add(here)
            way[here] = None
            here = left[here][0]  # there is one, or this name would be in the order
        if here in way:
            circle = list(way)[list(way).index(here) :]
            first = min(range(len(circle)), key=lambda i: place[circle[i]])
            yield circle[first:] + circle[:first]


def _size(condition: Any, sizes: Mapping[str, _Size]) -> _Size:
    if not isinstance(condition, dict):
        return _Size(0, 0)
    if isinstance(condition.get("segment"), str):
        return sizes.get(condition["segment"], _Size(0, 0))
    inner = [_size(each, sizes) for _, each in _inside((), condition)]
    if not inner:
        return _Size(1, 1)
    comparisons = min(sum(each.comparisons for each in inner), _TOO_MANY)
    return _Size(1 + max(each.depth for each in inner), comparisons)


def _size_problems(
    document: Document, flags: Mapping[str, Any], segments: Mapping[str, Any], sizes: Mapping[str, _Size]
) -> Iterator[Problem]:
    total, told, patterns = 0, False, set[str]()
    for path, when in _conditions(flags, segments):
        size = _size(when, sizes)
        if size.depth > MAX_NESTING:
            yield document.problem(path, f"conditions are nested {size.depth} deep; at most {MAX_NESTING}")
        if size.comparisons > MAX_COMPARISONS_OF_A_RULE:
            message = f"with its segments a condition has {size.comparisons:,} comparisons"
            yield document.problem(path, f"{message}; at most {MAX_COMPARISONS_OF_A_RULE:,}")
        total += size.comparisons
        patterns.update(_patterns(when))
        if not told and (total > MAX_COMPARISONS or len(patterns) > MAX_REGEXES):
            told = True
            what = f"{MAX_COMPARISONS:,} comparisons" if total > MAX_COMPARISONS else f"{MAX_REGEXES:,} regexes"
            yield document.problem(path, f"up to here the file has more than {what}; at most so many are served")


def _patterns(condition: Any) -> Iterator[str]:
    for _, inner in _walk((), condition):
        for comparison in (inner, _mapping(inner.get("path")), _mapping(inner.get("method"))):
            written = comparison.get("regex", [])
            yield from (text for text in (written if isinstance(written, list) else [written]) if isinstance(text, str))

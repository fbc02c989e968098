"""The schema of rules and segments: what a person may write under `when`, and the conditions it becomes."""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from extproc.core.conditions import (
    All,
    AnyOf,
    Condition,
    Leaf,
    Not,
    Op,
    Subject,
    compile_regex,
    parse_semver_range,
)
from extproc.core.flags import Arm, Rule
from extproc.core.scalars import HEADER_NAME, Name, Percent, Switch, shown

TRUSTED_ADDRESSES = ("x-forwarded-for", "x-envoy-external-address")
"""Headers whose last address Envoy itself wrote. What else a client can write, no rule may take for its address."""

SUBJECTS = ("header", "cookie", "path", "method")
OPERATORS = ("in", "not_in", "equals", "prefix", "suffix", "contains", "regex", "semver", "cidr", "exists")
COMBINERS = ("all", "any", "not", "segment")
MAX_VALUES = 10_000
MAX_CONDITIONS = 100


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {shown(value)}; put it in quotes")
    return value


def _texts(value: Any) -> list[str]:
    """One text or a list of them: `prefix: eu-` and `prefix: [eu-, uk-]`."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("the list is empty, so nothing would match")
    if len(values) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    return [_text(each) for each in values]


def _checked(check: Callable[[str], object]) -> Callable[[list[str]], list[str]]:
    def validate(value: Any) -> list[str]:
        texts = _texts(value)
        for text in texts:
            check(text)
        return texts

    return validate


def _network(text: str) -> None:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)} is no network: {error}; write for example 10.0.0.0/8") from None


def _regex(text: str) -> None:
    try:
        compile_regex(text)
    except ValueError as error:
        raise ValueError(f"the regex {shown(text)} does not compile: {error}") from None


def _not_empty(text: str) -> None:
    if not text:
        raise ValueError("an empty text is part of every value; write what the value should have")


def _header_name(value: Any) -> str:
    if not isinstance(value, str) or not HEADER_NAME.fullmatch(value.replace("_", "-")):
        raise ValueError(f"{shown(value)} is not a header's name")
    if "_" in value:
        raise ValueError(f"Envoy drops headers with underscores; send and write {value.replace('_', '-')}")
    return value.lower()


def _cookie_name(value: Any) -> str:
    if not isinstance(value, str) or not HEADER_NAME.fullmatch(value.replace("_", "-")):
        raise ValueError(f"{shown(value)} is not a cookie's name")
    return value


Texts = Annotated[list[str], BeforeValidator(_texts, json_schema_input_type=str | list[str])]
Parts = Annotated[list[str], BeforeValidator(_checked(_not_empty), json_schema_input_type=str | list[str])]
Regexes = Annotated[list[str], BeforeValidator(_checked(_regex), json_schema_input_type=str | list[str])]
Ranges = Annotated[list[str], BeforeValidator(_checked(parse_semver_range), json_schema_input_type=str | list[str])]
Networks = Annotated[list[str], BeforeValidator(_checked(_network), json_schema_input_type=str | list[str])]
HeaderName = Annotated[str, BeforeValidator(_header_name)]
CookieName = Annotated[str, BeforeValidator(_cookie_name)]


class Comparison(BaseModel):
    """How a value is compared: exactly one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)

    in_: Texts | None = Field(None, alias="in", description="the value is one of these")
    not_in: Texts | None = Field(None, description="the value is none of these, or the header is absent")
    equals: Texts | None = Field(None, description="the value is this")
    prefix: Parts | None = Field(None, description="the value begins with this, or with one of these")
    suffix: Parts | None = Field(None, description="the value ends with this, or with one of these")
    contains: Parts | None = Field(None, description="the value has this in it, or one of these")
    regex: Regexes | None = Field(None, description="an RE2 expression found in the value; anchor it with ^ and $")
    semver: Ranges | None = Field(None, description="a version in this range: `>=2.1.0 <3`, `^1.4`, `~1.4.2`")
    cidr: Networks | None = Field(None, description="the client's address is in this network")
    exists: Switch | None = Field(None, description="the header or cookie is there, or with false is not")


class ConditionModel(Comparison):
    """A condition: a comparison of one subject, or others combined by `all`, `any`, `not`, `segment`."""

    header: HeaderName | None = Field(None, description="the request header whose value is compared")
    cookie: CookieName | None = Field(None, description="the cookie whose value is compared")
    path: Comparison | None = Field(None, description="the path without its query, compared")
    method: Comparison | None = Field(None, description="the method, compared")
    all: "list[ConditionModel] | None" = Field(None, min_length=1, max_length=MAX_CONDITIONS)
    any: "list[ConditionModel] | None" = Field(None, min_length=1, max_length=MAX_CONDITIONS)
    not_: "Negation | None" = Field(None, alias="not", description="a condition, or true to negate what stands beside")
    segment: str | None = Field(None, description="the name of a segment at the top of the file")

    @model_validator(mode="after")
    def _one_thing(self) -> "ConditionModel":
        fail_unless_one_thing(self)
        return self


Negation = Annotated[
    Annotated[ConditionModel, Tag("condition")] | Annotated[Switch, Tag("switch")],
    Discriminator(lambda value: "condition" if isinstance(value, dict | ConditionModel) else "switch"),
]
ConditionModel.model_rebuild()


def given(model: BaseModel, names: Sequence[str]) -> list[str]:
    """Which of these keys stand in the file, by the names that people write."""
    aliases = {
        field.alias or name for name, field in type(model).model_fields.items() if name in model.model_fields_set
    }
    return [name for name in names if name in aliases]


def fail_unless_one_thing(model: ConditionModel) -> None:
    """Raises ValueError unless the condition says exactly one thing, and one that can be true."""
    things = given(model, (*SUBJECTS, "all", "any", "segment"))
    operators = given(model, OPERATORS)
    if "not" in given(model, ("not",)) and not isinstance(model.not_, bool):
        things.append("not")
    if len(things) != 1:
        known = ", ".join((*SUBJECTS, *COMBINERS))
        raise ValueError(f"a condition has exactly one of {known}; here are {', '.join(things) or 'none'}")
    if things[0] in ("header", "cookie"):
        fail_unless_one_operator(operators, things[0])
        if "cidr" in operators and model.header not in TRUSTED_ADDRESSES:
            raise ValueError(f"cidr needs a header that Envoy wrote: {' or '.join(TRUSTED_ADDRESSES)}")
    elif operators:
        raise ValueError(f"`{operators[0]}` has nothing to compare beside `{things[0]}`")
    for name in ("path", "method"):
        comparison = getattr(model, name)
        if comparison is not None:
            fail_unless_one_operator(given(comparison, OPERATORS), name)


def fail_unless_one_operator(operators: Sequence[str], subject: str) -> None:
    """Raises ValueError unless there is exactly one."""
    if len(operators) != 1:
        known = ", ".join(OPERATORS)
        raise ValueError(
            f"`{subject}` is compared by exactly one of {known}; here are {', '.join(operators) or 'none'}"
        )


class RuleModel(BaseModel):
    """One rule: where `when` is true, `serve` says the arm, or `canary` the percentage of a split of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    when: ConditionModel
    serve: Literal["stable", "canary"] | None = None
    canary: Percent | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> "RuleModel":
        if len({"serve", "canary"} & self.model_fields_set) != 1:
            raise ValueError("a rule has exactly one of `serve` (an arm) and `canary` (a percentage of its own)")
        return self

    def rule(self, segments: Mapping[str, Condition]) -> Rule:
        """As the core knows it."""
        serve = Arm(self.serve) if self.serve is not None else None
        return Rule(name=self.name, when=condition_of(self.when, segments), serve=serve, percent=self.canary)


def condition_of(model: ConditionModel, segments: Mapping[str, Condition]) -> Condition:
    """The condition as the core knows it. Raises KeyError for a segment that is not there."""
    condition: Condition
    if model.all is not None:
        condition = All(tuple(condition_of(inner, segments) for inner in model.all))
    elif model.any is not None:
        condition = AnyOf(tuple(condition_of(inner, segments) for inner in model.any))
    elif model.segment is not None:
        condition = segments[model.segment]
    elif isinstance(model.not_, ConditionModel):
        return Not(condition_of(model.not_, segments))
    elif model.path is not None:
        condition = _leaf(model.path, Subject.PATH, "")
    elif model.method is not None:
        condition = _leaf(model.method, Subject.METHOD, "")
    elif model.header is not None:
        condition = _leaf(model, Subject.HEADER, model.header)
    else:
        condition = _leaf(model, Subject.COOKIE, model.cookie or "")
    return Not(condition) if model.not_ is True else condition


def _leaf(comparison: Comparison, subject: Subject, name: str) -> Condition:
    (operator,) = given(comparison, OPERATORS)
    values = () if operator == "exists" else tuple(getattr(comparison, "in_" if operator == "in" else operator))
    match operator:
        case "not_in":
            return Not(Leaf(subject, name, Op.IN, values))
        case "equals":
            return Leaf(subject, name, Op.IN, values)
        case "exists":
            there = Leaf(subject, name, Op.EXISTS)
            return there if comparison.exists else Not(there)
        case _:
            return Leaf(subject, name, Op(operator), values)


def segments_named(model: ConditionModel) -> list[str]:
    """The segments that a condition names, at any depth."""
    inner = [*(model.all or ()), *(model.any or ())]
    if isinstance(model.not_, ConditionModel):
        inner.append(model.not_)
    own = [model.segment] if model.segment is not None else []
    return own + [name for each in inner for name in segments_named(each)]

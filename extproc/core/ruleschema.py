"""The schema of rules and segments: what a person may write under `when`, and the conditions it becomes."""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

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
from extproc.core.scalars import HEADER_NAME, Name, Percent, Switch, Text, shown

TRUSTED_ADDRESSES = ("x-forwarded-for", "x-envoy-external-address")
"""Headers whose last address Envoy itself wrote. What else a client can write, no rule may take for its address."""

SUBJECTS = ("header", "cookie", "path", "method")
OPERATORS = ("in", "not_in", "equals", "prefix", "suffix", "contains", "regex", "semver", "cidr", "exists")
COMBINERS = ("all", "any", "not", "segment")
MAX_VALUES = 10_000
MAX_CONDITIONS = 100
MAX_REGEX = 2_000
"""Characters of one expression."""


def one_of(keys: Sequence[str]) -> dict[str, Any]:
    """JSON Schema: exactly one of these keys."""
    return {"oneOf": [{"required": [key]} for key in keys]}


def condition_schema(schema: dict[str, Any]) -> None:
    """JSON Schema of a condition: one subject with one operator, or one combiner alone."""
    compared = [{"required": [name], **one_of(OPERATORS)} for name in ("header", "cookie")]
    alone = {"not": {"anyOf": [{"required": [name]} for name in OPERATORS]}}
    combined = [{"required": [name], **alone} for name in ("path", "method", "all", "any", "segment")]
    negated = {"required": ["not"], "properties": {"not": {"type": "object"}}, **alone}
    schema["oneOf"] = [*compared, *combined, negated]


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
    if len(text) > MAX_REGEX:
        raise ValueError(f"a regex has at most {MAX_REGEX:,} characters, not {len(text):,}; `in` takes long lists")
    try:
        compile_regex(text)
    except ValueError as error:
        raise ValueError(f"the regex {shown(text)} does not compile: {error}") from None


def _not_empty(text: str) -> None:
    if not text:
        raise ValueError("an empty text is part of every value; write what the value should have")


def _header_name(value: Any) -> str:
    if value in (":path", ":method"):
        raise ValueError(f"{value} is no header; write `{value[1:]}: {{...}}` with the comparison inside")
    if not isinstance(value, str) or not HEADER_NAME.fullmatch(value.replace("_", "-")):
        raise ValueError(f"{shown(value)} is not a header's name")
    if "_" in value:
        raise ValueError(f"Envoy drops headers with underscores; send and write {value.replace('_', '-')}")
    return value.lower()


def _cookie_name(value: Any) -> str:
    if not isinstance(value, str) or not HEADER_NAME.fullmatch(value.replace("_", "-")):
        raise ValueError(f"{shown(value)} is not a cookie's name")
    return value


_ONE = {"type": ["string", "integer"]}
_TEXTS = WithJsonSchema(
    {"anyOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 1, "maxItems": MAX_VALUES}]},
)

Texts = Annotated[list[str], BeforeValidator(_texts), _TEXTS]
Parts = Annotated[list[str], BeforeValidator(_checked(_not_empty)), _TEXTS]
Regexes = Annotated[list[str], BeforeValidator(_checked(_regex)), _TEXTS]
Ranges = Annotated[list[str], BeforeValidator(_checked(parse_semver_range)), _TEXTS]
Networks = Annotated[list[str], BeforeValidator(_checked(_network)), _TEXTS]
HeaderName = Annotated[str, BeforeValidator(_header_name), WithJsonSchema({"type": "string", "pattern": r"^[^_\s:]+$"})]
CookieName = Annotated[str, BeforeValidator(_cookie_name), WithJsonSchema({"type": "string", "pattern": r"^[^\s;=]+$"})]


class Comparison(BaseModel):
    """How a value is compared: exactly one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=one_of(OPERATORS))

    in_: Texts | None = Field(None, alias="in", description="the value is one of these")
    not_in: Texts | None = Field(None, description="the value is none of these, or there is no value")
    equals: Texts | None = Field(None, description="the value is this")
    prefix: Parts | None = Field(None, description="the value begins with this, or with one of these")
    suffix: Parts | None = Field(None, description="the value ends with this, or with one of these")
    contains: Parts | None = Field(None, description="the value has this in it, or one of these")
    regex: Regexes | None = Field(None, description="an RE2 expression found in the value; anchor it with ^ and $")
    semver: Ranges | None = Field(None, description="a version in this range: `>=2.1.0 <3`, `^1.4`, `~1.4.2`")
    cidr: Networks | None = Field(None, description="the client's address is in this network: `10.0.0.0/8`")
    exists: Switch | None = Field(None, description="true: the value is there; false: it is not")


class ConditionModel(Comparison):
    """A condition: a comparison of one subject, or others combined by `all`, `any`, `not`, `segment`."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=condition_schema)

    header: HeaderName | None = Field(None, description="the request header whose value is compared")
    cookie: CookieName | None = Field(None, description="the cookie whose value is compared")
    path: Comparison | None = Field(None, description="the path without its query, compared")
    method: Comparison | None = Field(None, description="the method, in capitals, compared")
    all: "Conditions | None" = Field(None, description="every one of these conditions is true")
    any: "Conditions | None" = Field(None, description="at least one of these conditions is true")
    not_: "Negation | None" = Field(
        None, alias="not", description="a condition that is not true; or `true` beside a comparison, to negate it"
    )
    segment: Text | None = Field(None, description="the segment of this name, defined at the top of the file, is true")


Conditions = Annotated[list[ConditionModel], Field(min_length=1, max_length=MAX_CONDITIONS)]
Negation = Annotated[
    Annotated[ConditionModel, Tag("condition")] | Annotated[Switch, Tag("switch")],
    Discriminator(lambda value: "condition" if isinstance(value, dict | ConditionModel) else "switch"),
]
ConditionModel.model_rebuild()


class RuleModel(BaseModel):
    """One rule: where `when` is true, `serve` says the arm, or `canary` the percentage of a split of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=one_of(("serve", "canary")))

    name: Name = Field(description="what decisions and metrics call the rule; with `canary`, also part of its salt")
    when: ConditionModel = Field(description="the condition under which the rule decides")
    serve: Literal["stable", "canary"] | None = Field(None, description="the arm that everybody gets who matches")
    canary: Percent | None = Field(None, description="the percentage of those who match that gets canary")

    def rule(self, segments: Mapping[str, Condition]) -> Rule:
        """As the core knows it."""
        serve = Arm(self.serve) if self.serve is not None else None
        return Rule(name=self.name, when=condition_of(self.when, segments), serve=serve, percent=self.canary)


def given(model: BaseModel, names: Sequence[str]) -> list[str]:
    """Which of these keys stand in the file, by the names that people write."""
    aliases = {
        field.alias or name for name, field in type(model).model_fields.items() if name in model.model_fields_set
    }
    return [name for name in names if name in aliases]


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


def segments_named(model: ConditionModel) -> set[str]:
    """The segments that a condition names, at any depth."""
    inner = [*(model.all or ()), *(model.any or ())]
    if isinstance(model.not_, ConditionModel):
        inner.append(model.not_)
    own = {model.segment} if model.segment is not None else set()
    return own.union(*map(segments_named, inner))

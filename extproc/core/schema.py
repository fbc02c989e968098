"""The schema of the flag file: a Document becomes flags, or a list of everything that is wrong with it."""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from extproc.core.document import Document, FlagFileError, Path, Problem, dotted
from extproc.core.flags import (
    Flag,
    Guardrail,
    Margin,
    MarginKind,
    MissingUnit,
    Rollout,
    SourceKind,
    Step,
    UnitSource,
)

MAX_NAME = 200
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_DURATION = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_MARGIN = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)([x%]?)")
_FIXED_GUARDRAILS = ("errors", "latency", "drift", "hangs", "srm")


def _percent(value: Any) -> Decimal:
    if isinstance(value, str) and value.rstrip().endswith("%"):
        raise ValueError(f"write the number alone: {value.rstrip().rstrip('%').rstrip()}")
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"a percentage is a number from 0 to 100, not {_shown(value)}")
    percent = Decimal(value)
    if not 0 <= percent <= 100:
        raise ValueError(f"{value} is not between 0 and 100")
    if percent != round(percent, 3):
        raise ValueError(f"{value} has more than three decimals; the smallest step is 0.001")
    return percent


def _duration(value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
    if match is None:
        raise ValueError(f"a duration looks like 30s, 10m, 2h or 1h30m, not {_shown(value)}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _margin(value: Any) -> Margin:
    text = str(value) if isinstance(value, int | Decimal) and not isinstance(value, bool) else value
    match = _MARGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"a margin looks like 1.2x, 15% or 0.20, not {_shown(value)}")
    return Margin(Decimal(match[1]), MarginKind(match[2]))


def _unit(value: Any) -> UnitSource:
    if not isinstance(value, str):
        raise ValueError(f"a unit is a header's name, cookie:NAME or random, not {_shown(value)}")
    if value == "random":
        return UnitSource(SourceKind.RANDOM, "")
    if value.startswith("cookie:"):
        if not _HEADER.fullmatch(value[7:]):
            raise ValueError(f"{_shown(value)} names no cookie; write cookie:NAME")
        return UnitSource(SourceKind.COOKIE, value[7:])
    if not _HEADER.fullmatch(value):
        raise ValueError(f"{_shown(value)} is not a header's name")
    if "_" in value:
        raise ValueError(f"Envoy drops headers with underscores; send and write {value.replace('_', '-')}")
    return UnitSource(SourceKind.HEADER, value.lower())


def _name(value: str) -> str:
    if len(value) > MAX_NAME:
        raise ValueError(f"longer than {MAX_NAME} characters")
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{_shown(value)} may have letters, digits and . _ - / only, and begins with a letter or digit"
        )
    return value


def _salt(value: str) -> str:
    if ":" in value:
        raise ValueError("a salt must not contain ':', which separates it from the unit")
    if "#" in value:
        raise ValueError("a salt must not contain '#', which separates it from the attempt of a reseeded rollout")
    return _name(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {_shown(value)}; put it in quotes")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"write true or false, not {_shown(value)}")
    return value


def _date(value: Any) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"a date looks like 2027-03-01, not {_shown(value)}") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a count is a whole number from 0, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as people wrote it, short."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    word = {True: "true", False: "false", None: "nothing"}.get(value) if value in (None, True, False) else None
    text = word if word is not None and not isinstance(value, Decimal) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


Percent = Annotated[Decimal, BeforeValidator(_percent)]
Duration = Annotated[float, BeforeValidator(_duration)]
MarginText = Annotated[Margin, BeforeValidator(_margin)]
Unit = Annotated[UnitSource, BeforeValidator(_unit)]
Name = Annotated[str, BeforeValidator(_text), AfterValidator(_name)]
Salt = Annotated[str, BeforeValidator(_text), AfterValidator(_salt)]
Text = Annotated[str, BeforeValidator(_text)]
Switch = Annotated[bool, BeforeValidator(_flag)]
Day = Annotated[str, BeforeValidator(_date)]
Count = Annotated[int, BeforeValidator(_count)]


class _Strict(BaseModel):
    """pydantic's way to set options for all models: unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class StepModel(_Strict):
    """One stage of a rollout."""

    canary: Percent
    soak: Duration | None = None
    min_requests: Count | None = None
    min_units: Count | None = None
    approval: Literal["required"] | None = None

    def step(self) -> Step:
        """As the core knows it."""
        return Step(
            percent=self.canary,
            soak_s=self.soak,
            min_requests=self.min_requests,
            min_units=self.min_units,
            approval=self.approval == "required",
        )


class GuardrailModel(_Strict):
    """One guardrail's margins."""

    rollback_if: MarginText | None = None
    halt_if: MarginText | None = None
    require: Literal["pass"] | None = None
    direction: Literal["up", "down"] | None = None


class RolloutModel(_Strict):
    """A plan that the controller follows."""

    steps: Annotated[list[StepModel], Field(min_length=1, max_length=100)]
    bake: Duration | None = None
    guardrails: dict[str, GuardrailModel] | None = None

    def rollout(self) -> Rollout:
        """As the core knows it."""
        guardrails = None
        if self.guardrails is not None:
            guardrails = tuple(Guardrail(name=name, **dict(model)) for name, model in self.guardrails.items())
        return Rollout(steps=tuple(step.step() for step in self.steps), bake_s=self.bake, guardrails=guardrails)


class FlagModel(_Strict):
    """One flag."""

    description: Text = ""
    owner: Text = ""
    model: Name | None = None
    unit: Annotated[list[Unit], Field(min_length=1, max_length=16)] | None = None
    missing_unit: Literal["stable", "random"] = "stable"
    salt: Salt | None = None
    enabled: Switch = True
    allow_force: Switch = False
    expires: Day | None = None
    canary: Percent | None = None
    rollout: RolloutModel | None = None

    @model_validator(mode="after")
    def _one_percentage(self) -> "FlagModel":
        given = {"canary", "rollout"} & self.model_fields_set
        if len(given) != 1:
            raise ValueError("one_percentage")
        return self

    def flag(self, key: str) -> Flag:
        """As the core knows it, with the defaults that come from the key."""
        unit = {"unit": tuple(self.unit)} if self.unit is not None else {}
        return Flag(
            key=key,
            model=self.model or key,
            salt=self.salt or key,
            percent=self.canary,
            rollout=self.rollout.rollout() if self.rollout is not None else None,
            missing_unit=MissingUnit(self.missing_unit),
            enabled=self.enabled,
            allow_force=self.allow_force,
            description=self.description,
            owner=self.owner,
            expires=self.expires,
            **unit,
        )


class FlagFileModel(_Strict):
    """The whole file."""

    version: Literal[1]
    flags: dict[str, FlagModel]


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """The flags of a good file, in the order in which they stand there."""

    flags: tuple[Flag, ...]


def parse(document: Document, models: Collection[str] | None) -> ParsedFlags:
    """The flags of a document. `models` are the names that Envoy serves; None leaves that unchecked.

    Raises FlagFileError with all problems at once.
    """
    try:
        model = FlagFileModel.model_validate(document.data)
    except ValidationError as error:
        raise FlagFileError(_problems(document, error)) from None
    flags = tuple(flag.flag(key) for key, flag in model.flags.items())
    problems = [
        *_key_problems(document, flags),
        *_model_problems(document, flags, models),
        *(problem for flag in flags if flag.rollout for problem in _rollout_problems(document, flag.key, flag.rollout)),
    ]
    if problems:
        raise FlagFileError(problems)
    return ParsedFlags(flags)


def _key_problems(document: Document, flags: tuple[Flag, ...]) -> Iterator[Problem]:
    """A key is also the default salt and model, so it must do as both."""
    for flag in flags:
        try:
            _salt(flag.key)
        except ValueError as error:
            yield document.problem(("flags", flag.key), f"the key of a flag: {error}", of_key=True)


def _model_problems(document: Document, flags: tuple[Flag, ...], models: Collection[str] | None) -> Iterator[Problem]:
    owner: dict[str, str] = {}
    for flag in flags:
        path: Path = ("flags", flag.key, "model")
        if models is not None and flag.model not in models:
            hint = _nearest(flag.model, models)
            known = f"did you mean {hint}?" if hint else f"Envoy serves {', '.join(sorted(models)) or 'none'}"
            yield document.problem(path, f"the model {flag.model} is not in models.yaml; {known}")
        elif flag.model in owner:
            message = f"the model {flag.model} has the flag {owner[flag.model]} already; a model has at most one"
            yield document.problem(path, message)
        owner.setdefault(flag.model, flag.key)


def _rollout_problems(document: Document, key: str, rollout: Rollout) -> Iterator[Problem]:
    path: Path = ("flags", key, "rollout")
    for i, (before, after) in enumerate(zip(rollout.steps, rollout.steps[1:], strict=False), start=1):
        if after.percent <= before.percent:
            message = f"a rollout goes up: {after.percent} does not come after {before.percent}"
            yield document.problem((*path, "steps", i, "canary"), message)
    for guardrail in rollout.guardrails or ():
        kind, _, name = guardrail.name.partition(".")
        if guardrail.name in _FIXED_GUARDRAILS or (kind == "kpi" and name):
            continue
        message = f"unknown guardrail; known are {', '.join(_FIXED_GUARDRAILS)} and kpi.NAME"
        yield document.problem((*path, "guardrails", guardrail.name), message, of_key=True)


def _problems(document: Document, error: ValidationError) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        loc = tuple(step for step in detail["loc"] if not (isinstance(step, str) and step == "[key]"))
        yield _problem(document, loc, detail)


def _problem(document: Document, path: Path, detail: Any) -> Problem:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    match kind:
        case "extra_forbidden":
            return document.problem(path, _unknown_key(path), of_key=True)
        case "missing":
            return Problem(document.place_of(path[:-1], of_key=True), dotted(path), "this key is missing")
        case "value_error" if str(context.get("error")) == "one_percentage":
            both = "both" if "canary" in value and "rollout" in value else "neither"
            message = f"write exactly one of `canary` (a percentage) and `rollout` (a plan); here are {both}"
            return document.problem(path, message, of_key=True)
        case "value_error":
            return document.problem(path, str(context["error"]))
        case "literal_error":
            return document.problem(path, f"write {context['expected']}, not {_shown(value)}")
        case "model_type" | "dict_type" | "model_attributes_type":
            return document.problem(path, f"expected a mapping of keys, not {_shown(value)}")
        case "list_type":
            return document.problem(path, f"expected a list, not {_shown(value)}")
        case "too_short":
            return document.problem(path, "the list is empty")
        case _:
            return document.problem(path, str(detail["msg"]))


def _unknown_key(path: Path) -> str:
    known = _keys_at(path[:-1])
    hint = _nearest(str(path[-1]), known)
    return "unknown key" + (f"; did you mean {hint}?" if hint else f"; known are {', '.join(known)}")


def _keys_at(path: Path) -> tuple[str, ...]:
    match path:
        case ():
            model: type[BaseModel] = FlagFileModel
        case ("flags", _):
            model = FlagModel
        case ("flags", _, "rollout"):
            model = RolloutModel
        case ("flags", _, "rollout", "steps", _):
            model = StepModel
        case _:
            model = GuardrailModel
    return tuple(model.model_fields)


def _nearest(word: str, known: Collection[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    return close[0] if close else None

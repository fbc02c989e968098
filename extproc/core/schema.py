"""The schema of the flag file: a Document becomes flags, or a list of everything that is wrong with it."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from extproc.core.conditions import Condition
from extproc.core.document import Document, FlagFileError, Path, Problem, dotted
from extproc.core.flags import Flag, Guardrail, MissingUnit, Rollout, Step
from extproc.core.ruleschema import Comparison, ConditionModel, RuleModel, condition_of, segments_named
from extproc.core.scalars import Count, Day, Duration, MarginText, Name, Percent, Salt, Switch, Text, Unit, salt, shown

FIXED_GUARDRAILS = ("errors", "latency", "drift", "hangs", "srm")
MAX_RULES = 1_000


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
    rules: Annotated[list[RuleModel], Field(max_length=MAX_RULES)] = []
    canary: Percent | None = None
    rollout: RolloutModel | None = None

    @model_validator(mode="after")
    def _one_percentage(self) -> "FlagModel":
        given = {"canary", "rollout"} & self.model_fields_set
        if len(given) != 1:
            raise ValueError("one_percentage")
        return self

    def flag(self, key: str, segments: Mapping[str, Condition]) -> Flag:
        """As the core knows it, with the defaults that come from the key."""
        unit: dict[str, Any] = {"unit": tuple(self.unit)} if self.unit is not None else {}
        return Flag(
            key=key,
            model=self.model or key,
            salt=self.salt or key,
            percent=self.canary,
            rollout=self.rollout.rollout() if self.rollout is not None else None,
            rules=tuple(rule.rule(segments) for rule in self.rules),
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
    segments: dict[str, ConditionModel] = {}
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
    problems = [*_segment_problems(document, model), *_rule_name_problems(document, model)]
    if problems:
        raise FlagFileError(problems)
    segments = _segments(model)
    flags = tuple(flag.flag(key, segments) for key, flag in model.flags.items())
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
            salt(flag.key)
        except ValueError as error:
            yield document.problem(("flags", flag.key), f"the key of a flag: {error}", of_key=True)


def _segments(model: FlagFileModel) -> dict[str, Condition]:
    """Every segment as a condition, those that name others after them. There is no circle: that was checked."""
    segments: dict[str, Condition] = {}

    def resolve(name: str) -> None:
        if name not in segments:
            for other in segments_named(model.segments[name]):
                resolve(other)
            segments[name] = condition_of(model.segments[name], segments)

    for name in model.segments:
        resolve(name)
    return segments


def _segment_problems(document: Document, model: FlagFileModel) -> Iterator[Problem]:
    """Segments that are not there, and those that name themselves, at once or by way of others."""
    users: list[tuple[Path, ConditionModel]] = [
        (("segments", name), condition) for name, condition in model.segments.items()
    ]
    for key, flag in model.flags.items():
        users.extend((("flags", key, "rules", i, "when"), rule.when) for i, rule in enumerate(flag.rules))
    known = True
    for path, condition in users:
        for name in segments_named(condition):
            if name not in model.segments:
                known = False
                hint = _nearest(name, model.segments)
                have = f"did you mean {hint}?" if hint else "define it under `segments:`"
                yield document.problem(path, f"there is no segment {name}; {have}")
    if known:
        for name in model.segments:
            if _reaches(model, name, name, set()):
                yield document.problem(("segments", name), "this segment names itself", of_key=True)


def _reaches(model: FlagFileModel, start: str, goal: str, seen: set[str]) -> bool:
    for name in segments_named(model.segments[start]):
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            if _reaches(model, name, goal, seen):
                return True
    return False


def _rule_name_problems(document: Document, model: FlagFileModel) -> Iterator[Problem]:
    """A rule's name is its salt and its label, so two rules of a flag cannot share one."""
    for key, flag in model.flags.items():
        first: dict[str, int] = {}
        for i, rule in enumerate(flag.rules):
            if rule.name in first:
                message = f"the rule {rule.name} stands here again; give it a name of its own"
                yield document.problem(("flags", key, "rules", i, "name"), message)
            first.setdefault(rule.name, i)


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
        if guardrail.name in FIXED_GUARDRAILS or (kind == "kpi" and name):
            continue
        message = f"unknown guardrail; known are {', '.join(FIXED_GUARDRAILS)} and kpi.NAME"
        yield document.problem((*path, "guardrails", guardrail.name), message, of_key=True)


def _problems(document: Document, error: ValidationError) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        yield _problem(document, _path_in(document.data, detail["loc"]), detail)


def _path_in(data: Any, loc: Path) -> Path:
    """Pydantic's location without the steps that are names of its own and not keys of the document."""
    path: list[str | int] = []
    for i, step in enumerate(loc):
        inside = step in data if isinstance(data, dict) else isinstance(step, int) and isinstance(data, list)
        if inside:
            path.append(step)
            data = data[step]
        elif i == len(loc) - 1 and isinstance(data, dict):
            path.append(step)
    return tuple(path)


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
            return document.problem(path, f"write {context['expected']}, not {shown(value)}")
        case "model_type" | "dict_type" | "model_attributes_type":
            return document.problem(path, f"expected a mapping of keys, not {shown(value)}")
        case "list_type":
            return document.problem(path, f"expected a list, not {shown(value)}")
        case "too_short":
            return document.problem(path, "the list is empty")
        case _:
            return document.problem(path, str(detail["msg"]))


def _unknown_key(path: Path) -> str:
    model = _model_at(path[:-1])
    known = [field.alias or name for name, field in model.model_fields.items()]
    hint = _nearest(str(path[-1]), known)
    return "unknown key" + (f"; did you mean {hint}?" if hint else f"; known are {', '.join(known)}")


def _model_at(path: Path) -> type[BaseModel]:
    match path:
        case ():
            return FlagFileModel
        case ("flags", _):
            return FlagModel
        case ("flags", _, "rules", _):
            return RuleModel
        case ("flags", _, "rollout"):
            return RolloutModel
        case ("flags", _, "rollout", "steps", _):
            return StepModel
        case ("flags", _, "rollout", *_):
            return GuardrailModel
        case (*_, "path" | "method"):
            return Comparison
        case _:
            return ConditionModel


def _nearest(word: str, known: Collection[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    return close[0] if close else None

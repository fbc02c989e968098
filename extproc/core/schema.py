"""The schema of the flag file: a Document becomes flags, or a list of everything that is wrong with it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from extproc.core.conditions import Condition
from extproc.core.crosschecks import cross_problems, in_order
from extproc.core.document import Document, FlagFileError, Problem
from extproc.core.flags import Flag, Guardrail, MissingUnit, Rollout, Step
from extproc.core.ruleschema import ConditionModel, RuleModel, condition_of, one_of, segments_named
from extproc.core.scalars import Count, Day, Duration, MarginText, Name, Percent, Salt, Switch, Text, Unit
from extproc.core.validation import keys_of, nothing_written, validated, without_repetition

MAX_RULES = 1_000
MAX_FLAGS = 50_000
MAX_PROBLEMS = 200
"""More would not be read; how many there are is told."""


class _Strict(BaseModel):
    """pydantic's way to set options for all models: unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class StepModel(_Strict):
    """One stage of a rollout."""

    canary: Percent = Field(description="the percentage of users who get canary, higher than the step before")
    soak: Duration | None = Field(None, description="how long the step lasts at least: 30s, 10m, 2h, 1h30m")
    min_requests: Count | None = Field(None, description="requests of canary that must have been judged")
    min_units: Count | None = Field(None, description="different users that must have been judged")
    approval: Literal["required"] | None = Field(
        None, description="a person must approve (`perch rollout approve`) before the next step"
    )

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
    """One guardrail's margins: how much worse than stable canary may be."""

    rollback_if: MarginText | None = Field(
        None, description="everybody goes back to stable when canary is this much worse: 1.2x, 15% or 0.20"
    )
    halt_if: MarginText | None = Field(None, description="the rollout stays where it is when canary is this much worse")
    require: Literal["pass"] | None = Field(
        None, description="the next step waits for this guardrail to pass, not only for it not to fail"
    )
    direction: Literal["up", "down"] | None = Field(None, description="of a KPI: whether higher or lower is better")


class RolloutModel(_Strict):
    """A plan that the controller follows."""

    steps: Annotated[list[StepModel], Field(min_length=1, max_length=100)] = Field(
        description="the stages, each with a higher percentage than the one before"
    )
    bake: Duration | None = Field(None, description="how long the last step is watched before the rollout is done")
    guardrails: dict[str, GuardrailModel] | None = Field(
        None,
        description="what is watched: errors, latency, drift, hangs, srm, kpi.NAME; left out: errors, latency, drift",
    )

    def rollout(self) -> Rollout:
        """As the core knows it."""
        guardrails = None
        if self.guardrails is not None:
            guardrails = tuple(Guardrail(name=name, **dict(model)) for name, model in self.guardrails.items())
        return Rollout(steps=tuple(step.step() for step in self.steps), bake_s=self.bake, guardrails=guardrails)


class FlagModel(_Strict):
    """One flag."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, json_schema_extra=one_of(("canary", "rollout"))
    )

    description: Text = Field("", description="what is being rolled out, for people")
    owner: Text = Field("", description="who answers for it, for people")
    model: Name | None = Field(None, description="the model of models.yaml that it splits; left out: the flag's key")
    unit: Annotated[list[Unit], Field(min_length=1, max_length=16)] | None = Field(
        None,
        description="what is hashed: the first of these that the request carries, a header's name, `cookie:NAME` or "
        "`random` (each request anew); left out: x-user-id, then x-session-id",
    )
    missing_unit: Literal["stable", "random"] = Field(
        "stable", description="what a request without any unit gets: stable, or a random draw per request"
    )
    salt: Salt | None = Field(
        None, description="draws the users: another salt, other users; left out: the flag's key. No ':' and no '#'"
    )
    enabled: Switch = Field(True, description="false: everybody gets stable, at once")
    allow_force: Switch = Field(
        False,
        description="whether testers may choose their arm by `x-force-cohort: canary;TOKEN`",
    )
    expires: Day | None = Field(None, description="the day after which `perch check` asks to take the flag out")
    rules: Annotated[list[RuleModel], Field(max_length=MAX_RULES)] = Field(
        [], description="looked at before the percentage, in this order; the first that matches decides"
    )
    canary: Percent | None = Field(None, description="the percentage of users who get canary, up to three decimals")
    rollout: RolloutModel | None = Field(None, description="a plan that the controller follows, instead of `canary`")

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

    version: Literal[1] = Field(description="the version of this format: 1")
    segments: dict[str, ConditionModel] = Field({}, description="conditions with a name, for rules to use")
    flags: Annotated[dict[str, FlagModel], Field(max_length=MAX_FLAGS)] = Field(
        description="each flag by its key: it splits the users of one model between stable and canary"
    )


@dataclass(frozen=True, slots=True)
class ParsedFlags:
    """The flags of a good file, in the order in which they stand there."""

    flags: tuple[Flag, ...]


def parse(document: Document, models: Collection[str] | None) -> ParsedFlags:
    """The flags of a document. `models` are the names that Envoy serves; None leaves that unchecked.

    Raises FlagFileError with all problems at once: the document's own, the schema's, and those between keys.
    """
    model, problems = validated(document, FlagFileModel)
    problems = [
        *document.problems,
        *nothing_written(document),
        *problems,
        *cross_problems(document, keys_of(FlagModel), models),
    ]
    if problems or model is None:
        raise FlagFileError(_first(without_repetition(problems)))
    segments = _segments(model)
    return ParsedFlags(tuple(flag.flag(key, segments) for key, flag in model.flags.items()))


def _first(problems: list[Problem]) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    told = sorted(problems, key=lambda problem: (problem.place.line, problem.place.column))[:MAX_PROBLEMS]
    return [*told, Problem(told[-1].place, "", f"and {len(problems) - MAX_PROBLEMS:,} more problems after this one")]


def _segments(model: FlagFileModel) -> dict[str, Condition]:
    """Every segment as a condition, those that name others after them. There is no circle: that was checked."""
    segments: dict[str, Condition] = {}
    for name in in_order({name: segments_named(condition) for name, condition in model.segments.items()}):
        segments[name] = condition_of(model.segments[name], segments)
    return segments

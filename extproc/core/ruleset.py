"""Compiles flags into a frozen ruleset: everything that a decision needs, worked out before the first request."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from types import MappingProxyType

from extproc.core.bucketing import effective_salt, first_hash_outside, hash_prefix, rule_salt, threshold_of
from extproc.core.conditions import Condition, headers_read
from extproc.core.flags import (
    Arm,
    Exposure,
    Exposures,
    Flag,
    MissingUnit,
    SourceKind,
    wanted_percent,
)
from extproc.core.rules import Group, compile_rules

EVERYBODY = Decimal(100)
FORCE_HEADER = b"x-force-cohort"


class Reason(StrEnum):
    """Why a request got its cohort."""

    SPLIT = "SPLIT"
    RULE_SPLIT = "RULE_SPLIT"
    TARGETING_MATCH = "TARGETING_MATCH"
    FORCED = "FORCED"
    DISABLED = "DISABLED"
    DEFAULT = "DEFAULT"
    NO_UNIT = "NO_UNIT"
    AMBIGUOUS_UNIT = "AMBIGUOUS_UNIT"
    HELD = "HELD"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that a ruleset can answer. Replies and counters are lists by `index`."""

    index: int
    flag: str
    model: str
    cohort: Arm
    reason: Reason
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Reader:
    """How one unit source is read from a request: the header's name as bytes, and the cookie's name where it is one."""

    header: bytes
    cookie: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Units divided at a threshold: the flag's own percentage, or a rule's.

    `threshold` counts exposed buckets. Hashes below `first_hash_outside` are exposed: the same, without a
    multiplication per request. `wanted`: somebody would be exposed if the warm gate were open.
    """

    threshold: int
    everybody: bool
    wanted: bool
    hash_prefix: bytes
    first_hash_outside: int
    canary: Choice
    stable: Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One flag, compiled: its rules, its split, and the choice for each other way a decision can end.

    `cold`: the warm gate is closed, nobody gets canary.
    """

    flag: Flag
    choices: tuple[Choice, ...]
    cold: bool
    readers: tuple[Reader, ...]
    rules: tuple[Group[Choice | Split], ...]
    split: Split
    canary_no_unit: Choice
    stable_no_unit: Choice
    canary_ambiguous: Choice
    stable_ambiguous: Choice
    forced_canary: Choice
    forced_stable: Choice
    not_warm: Choice
    disabled: Choice

    @property
    def held(self) -> bool:
        """Whether the warm gate keeps somebody from canary whom the percentage would send there."""
        return self.cold and self.split.wanted

    def split_of(self, rule: str) -> Split:
        """The split that decided: the rule's with that name if it has one, else the flag's own."""
        for group in self.rules:
            for _, outcome in group.rules:
                if isinstance(outcome, Split) and outcome.canary.rule == rule:
                    return outcome
        return self.split


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruleset:
    """What is served: published by one assignment, read once per request, never changed.

    `plans` maps a model's path prefix to its flag; a model without a flag maps to the choice DEFAULT.
    `unit_headers` are those of which nothing but the unit is read, the one of most flags first: two requests that
    differ in a value of one of them alone, and have one, are divided at the same split or get the same choice.
    `force_digest` is the SHA-256 of the testers' token, None when nobody may force a cohort.
    """

    version: str
    plans: Mapping[bytes, Plan | Choice]
    longest_prefix: int
    no_model: Choice
    error: Choice
    choices: tuple[Choice, ...]
    unit_headers: tuple[bytes, ...] = ()
    force_digest: bytes | None = None


def readers_of(flag: Flag) -> tuple[Reader, ...]:
    """The flag's unit sources as readers; `missing_unit: random` is one more source at the end."""
    readers = [
        Reader(source.header.encode(), source.name.encode() if source.kind is SourceKind.COOKIE else None)
        for source in flag.unit
    ]
    request_id = Reader(b"x-request-id")
    if flag.missing_unit is MissingUnit.RANDOM and request_id not in readers:
        readers.append(request_id)
    return tuple(readers)


def headers_of(flag: Flag) -> frozenset[str]:
    """The request headers that Envoy must forward for this flag to be decided."""
    units = frozenset(reader.header.decode() for reader in readers_of(flag))
    return units.union(*(headers_read(rule.when) for rule in flag.rules))


ENDINGS = (
    (Arm.CANARY, Reason.SPLIT),
    (Arm.STABLE, Reason.SPLIT),
    (Arm.CANARY, Reason.NO_UNIT),
    (Arm.STABLE, Reason.NO_UNIT),
    (Arm.CANARY, Reason.AMBIGUOUS_UNIT),
    (Arm.STABLE, Reason.AMBIGUOUS_UNIT),
    (Arm.CANARY, Reason.FORCED),
    (Arm.STABLE, Reason.FORCED),
    (Arm.STABLE, Reason.HELD),
    (Arm.STABLE, Reason.DISABLED),
)
"""The ways a decision about one flag can end, in the order of Plan's choices."""

FLAGLESS = 2
"""Choices that every ruleset begins with: no model at the path, and a request that could not be read."""


def choices_of(flag: Flag, first_index: int) -> tuple[Choice, ...]:
    """Every answer this flag can give, numbered from `first_index`: a reply is prepared for each.

    ENDINGS first, then for each rule one choice that it serves, or two of its split, canary before stable.
    """
    endings = [(cohort, reason, "") for cohort, reason in ENDINGS]
    for rule in flag.rules:
        if rule.serve is not None:
            endings.append((rule.serve, Reason.TARGETING_MATCH, rule.name))
        else:
            endings.extend((arm, Reason.RULE_SPLIT, rule.name) for arm in (Arm.CANARY, Arm.STABLE))
    return tuple(
        Choice(first_index + offset, flag.key, flag.model, cohort, reason, rule)
        for offset, (cohort, reason, rule) in enumerate(endings)
    )


def flagless_choices(models: Iterable[str]) -> tuple[Choice, ...]:
    """The answers that need no flag: no model, unreadable request, then DEFAULT for each model given, in order."""
    return (
        Choice(0, "", "", Arm.STABLE, Reason.DEFAULT),
        Choice(1, "", "", Arm.STABLE, Reason.ERROR),
        *(Choice(FLAGLESS + i, "", model, Arm.STABLE, Reason.DEFAULT) for i, model in enumerate(models)),
    )


def compile_flag(flag: Flag, exposure: Exposure | None, first_index: int) -> Plan:
    """One flag and what the controller decided for it, as constants. About 25 us without rules."""
    choices = choices_of(flag, first_index)
    cold = exposure is not None and exposure.cap == 0
    salt = effective_salt(flag.salt, exposure.attempt if exposure is not None else 0)
    cap = Decimal(0) if cold or not flag.enabled else EVERYBODY
    return Plan(
        flag=flag,
        choices=choices,
        cold=cold,
        readers=readers_of(flag),
        rules=_compile_rules(flag, salt, cap, choices[len(ENDINGS) :]),
        split=_split(salt, wanted_percent(flag, exposure), cap, choices[:2]),
        canary_no_unit=choices[2],
        stable_no_unit=choices[3],
        canary_ambiguous=choices[4],
        stable_ambiguous=choices[5],
        forced_canary=choices[6],
        forced_stable=choices[7],
        not_warm=choices[8],
        disabled=choices[9],
    )


def _split(salt: str, wanted: Decimal, cap: Decimal, choices: Sequence[Choice]) -> Split:
    """A split at `wanted` percent, never above the cap. `choices` are canary's and stable's."""
    percent = min(wanted, cap)
    threshold = threshold_of(percent)
    return Split(
        threshold=threshold,
        everybody=percent == EVERYBODY,
        wanted=wanted > 0,
        hash_prefix=hash_prefix(salt),
        first_hash_outside=first_hash_outside(threshold),
        canary=choices[0],
        stable=choices[1],
    )


def _compile_rules(flag: Flag, salt: str, cap: Decimal, choices: Sequence[Choice]) -> tuple[Group[Choice | Split], ...]:
    outcomes: list[tuple[Condition, Choice | Split]] = []
    left = list(choices)
    for rule in flag.rules:
        if rule.percent is None:
            outcomes.append((rule.when, left.pop(0)))
        else:
            own = (left.pop(0), left.pop(0))
            outcomes.append((rule.when, _split(rule_salt(salt, rule.name), rule.percent, cap, own)))
    return compile_rules(outcomes)


class Draft:
    """A ruleset in the making: flags are added a few at a time, so that a loop that also answers requests never stalls.

    `models` maps a model's name to its path prefix. Adding raises KeyError for an unknown model and ValueError for a
    second flag of one model: the schema has refused both before.
    """

    def __init__(self, version: str, models: Mapping[str, str], force_token: str | None = None) -> None:
        self._version = version
        self._models = models
        self._choices = list(flagless_choices(models))
        self._plans: dict[bytes, Plan | Choice] = {
            prefix.encode(): self._choices[FLAGLESS + i] for i, prefix in enumerate(models.values())
        }
        self._units: Counter[bytes] = Counter()
        self._read = {b":path", FORCE_HEADER}
        self._force_digest = hashlib.sha256(force_token.encode()).digest() if force_token else None

    def add(self, flag: Flag, exposure: Exposure | None) -> Plan:
        """Compiles one flag into the draft."""
        prefix = self._models[flag.model].encode()
        if isinstance(self._plans[prefix], Plan):
            raise ValueError(f"model {flag.model} has two flags")  # noqa: TRY004  the argument's value is wrong
        plan = compile_flag(flag, exposure, len(self._choices))
        self._plans[prefix] = plan
        self._choices.extend(plan.choices)
        self._units.update(reader.header for reader in plan.readers if reader.cookie is None)
        self._read.update(reader.header for reader in plan.readers if reader.cookie is not None)
        for rule in flag.rules:
            self._read.update(name.encode() for name in headers_read(rule.when))
        return plan

    def finish(self) -> Ruleset:
        """The frozen ruleset."""
        return Ruleset(
            version=self._version,
            plans=MappingProxyType(self._plans),
            longest_prefix=max(map(len, self._plans), default=0),
            no_model=self._choices[0],
            error=self._choices[1],
            choices=tuple(self._choices),
            unit_headers=tuple(header for header, _ in self._units.most_common() if header not in self._read),
            force_digest=self._force_digest,
        )


def compile_ruleset(
    flags: Iterable[Flag],
    exposures: Exposures,
    models: Mapping[str, str],
    *,
    version: str,
    force_token: str | None = None,
) -> Ruleset:
    """All of it at once, for callers that answer no requests meanwhile."""
    draft = Draft(version, models, force_token)
    for flag in flags:
        draft.add(flag, exposures.of(flag))
    return draft.finish()


def ruleset_version(flag_file: bytes, seq: int) -> str:
    """`<12 hex of the flag file's SHA-256>.<exposure seq>`: equal on every worker that read the same two files."""
    return f"{hashlib.sha256(flag_file).hexdigest()[:12]}.{seq}"

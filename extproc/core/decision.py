"""Decides which arm a request gets. Total: every request has an answer with a reason, whatever bytes it carries."""

import hashlib
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from extproc.core.bucketing import bucket_of, hash_unit
from extproc.core.flags import Arm
from extproc.core.request import Request, cookie_values
from extproc.core.rules import first_match
from extproc.core.ruleset import FORCE_HEADER, Choice, Plan, Reader, Ruleset, Split


class Decision(NamedTuple):
    """What a request got. `unit_hash` is the full 32-bit hash, None when no unit was hashed."""

    choice: Choice
    unit_hash: int | None = None

    @property
    def bucket(self) -> int | None:
        """0 .. 99_999, or None when no unit was hashed."""
        return None if self.unit_hash is None else bucket_of(self.unit_hash)


_new = tuple.__new__  # half the time of calling the class of a named tuple


class Ambiguity(Enum):
    """The unit came in two copies: nobody knows which one the user is."""

    TWICE = "twice"


AMBIGUOUS: Final = Ambiguity.TWICE


class Hashed(NamedTuple):
    """A request that is divided: where, and by which unit."""

    split: Split
    unit: bytes


def decide(ruleset: Ruleset, request: Request) -> Decision:
    """The cohort of one request under one ruleset."""
    outcome = outcome_of(ruleset, request)
    return Decision(outcome) if isinstance(outcome, Choice) else _new(Decision, draw(outcome.split, outcome.unit))


def draw(split: Split, unit: bytes) -> tuple[Choice, int]:
    """The side of a split that a unit is on, and the unit's hash."""
    unit_hash = hash_unit(split.hash_prefix, unit)
    return split.canary if unit_hash < split.first_hash_outside else split.stable, unit_hash


def outcome_of(ruleset: Ruleset, request: Request) -> Choice | Hashed:
    """All of the decision but the hash."""
    plan = plan_of(ruleset, request.headers.get(b":path", b""))
    if not isinstance(plan, Plan):
        return plan
    if not plan.flag.enabled:
        return plan.disabled
    if plan.flag.allow_force and FORCE_HEADER in request.headers:
        forced = forced_arm(ruleset, request)
        if forced is not None:
            return _forced(plan, forced)
    split = plan.split
    if plan.rules:
        matched = first_match(plan.rules, request)
        if isinstance(matched, Choice):
            return plan.not_warm if plan.cold and matched.cohort is Arm.CANARY else matched
        split = split if matched is None else matched
    if plan.cold and split.wanted:
        return plan.not_warm
    unit = unit_of(plan.readers, request)
    if unit is None:
        return plan.canary_no_unit if split.everybody else plan.stable_no_unit
    if unit is AMBIGUOUS:
        return plan.canary_ambiguous if split.everybody else plan.stable_ambiguous
    return _new(Hashed, (split, unit))


def plan_of(ruleset: Ruleset, path: bytes) -> Plan | Choice:
    """The flag of the model with the longest prefix of the path: a look-up per '/', however many models there are."""
    plans = ruleset.plans
    end = path.rfind(b"/", 0, ruleset.longest_prefix) + 1
    while end > 0:
        plan = plans.get(path[:end])
        if plan is not None:
            return plan
        end = path.rfind(b"/", 0, end - 1) + 1
    return ruleset.no_model


def unit_of(readers: Sequence[Reader], request: Request) -> bytes | Ambiguity | None:
    """The first unit that is present and not empty, as received; AMBIGUOUS if that one came twice; None without any."""
    for reader in readers:
        value = request.headers.get(reader.header)
        if value is None:
            continue
        values: Sequence[bytes]
        if reader.cookie is not None:
            values = cookie_values(request, reader.cookie)
        elif reader.header in request.repeated:
            values = request.repeated[reader.header]
        elif value:
            return value
        else:
            continue
        if any(values):
            return values[0] if len(values) == 1 else AMBIGUOUS
    return None


def forced_arm(ruleset: Ruleset, request: Request) -> Arm | None:
    """The arm that a tester asked for with the right token, else None. `canary;TOKEN` or `stable;TOKEN`, sent once."""
    if ruleset.force_digest is None or FORCE_HEADER in request.repeated:
        return None
    arm, _, token = request.headers[FORCE_HEADER].partition(b";")
    # Digests are compared, not tokens: how long that takes says nothing about the token.
    if hashlib.sha256(token).digest() != ruleset.force_digest:
        return None
    return _ARMS.get(arm)


_ARMS = {arm.encode(): arm for arm in Arm}


def _forced(plan: Plan, arm: Arm) -> Choice:
    if arm is Arm.STABLE:
        return plan.forced_stable
    return plan.not_warm if plan.cold else plan.forced_canary

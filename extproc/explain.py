"""Why a unit gets its arm: the very decision that serve makes, over the same files, with its numbers shown."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from extproc.core.decision import Decision, decide
from extproc.core.exposure import ExposureError
from extproc.core.flags import Exposures, Flag, SourceKind
from extproc.core.request import Request
from extproc.core.ruleset import Plan, Reason, Ruleset, Split, compile_ruleset, ruleset_version
from extproc.flagfile import Paths, read_exposures
from extproc.flagread import read_flag_file

_VERSION = re.compile(r"[0-9a-f]{12}\.[0-9]{1,20}")


class ExplainError(Exception):
    """What was asked for cannot be explained; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A flag file as serve would serve it now."""

    ruleset: Ruleset
    flags: Mapping[str, Flag]
    models: Mapping[str, str]
    exposures: Exposures


def read_flags(path: Path, models: Mapping[str, str] | None) -> tuple[bytes, tuple[Flag, ...]]:
    """The file's bytes and flags, by the very reader that serves. Raises FlagFileError."""
    read = read_flag_file(path, models)
    return read.content, read.flags


def load(paths: Paths, models: Mapping[str, str], force_token: str | None) -> Loaded:
    """The flag file with what the controller decided. Raises FlagFileError; what is unreadable is as for serve."""
    content, flags = read_flags(paths.flags, models)
    try:
        exposures = read_exposures(paths.exposure) or Exposures()
    except ExposureError:
        exposures = Exposures(closed=True)
    ruleset = compile_ruleset(
        flags, exposures, models, version=ruleset_version(content, exposures.seq), force_token=force_token
    )
    return Loaded(ruleset, {flag.key: flag for flag in flags}, models, exposures)


def load_version(paths: Paths, version: str, models: Mapping[str, str], force_token: str | None) -> Loaded:
    """What was served under this version, from the state folder, on the paths that the models have today.

    Raises ExplainError for a version that is not kept there, FlagFileError for a kept file that cannot be read.
    """
    if not _VERSION.fullmatch(version):
        raise ExplainError(f"{version!r} is no version; it looks like 0123456789ab.7, as `perch status` shows it")
    digest, _, _ = version.partition(".")
    try:
        exposures = read_exposures(paths.rulesets / f"{version}.json")
    except (ExposureError, OSError) as error:
        raise ExplainError(f"the version {version} cannot be read in {paths.rulesets}: {error}") from None
    if exposures is None:
        known = sorted(path.stem for path in paths.rulesets.glob("*.json"))
        have = f"it has {len(known)}, for example {', '.join(known[-3:])}" if known else "it has none"
        raise ExplainError(f"the version {version} is not kept in {paths.rulesets}; {have}")
    _, flags = read_flags(paths.rulesets / f"{digest}.yaml", None)
    prefixes = {flag.model: models.get(flag.model, f"/v2/models/{flag.model}/") for flag in flags}
    ruleset = compile_ruleset(flags, exposures, prefixes, version=version, force_token=force_token)
    return Loaded(ruleset, {flag.key: flag for flag in flags}, prefixes, exposures)


def at_percent(loaded: Loaded, key: str, percent: Decimal, force_token: str | None) -> Loaded:
    """The same if this flag's own percentage were another one and its warm gate open. Raises ExplainError."""
    flag = _flag(loaded, key)
    changed = {**loaded.flags, key: replace(flag, percent=percent, rollout=None)}
    decided = dict(loaded.exposures.flags)
    if key in decided:
        decided[key] = replace(decided[key], cap=100)
    exposures = Exposures(loaded.exposures.seq, decided)
    version = loaded.ruleset.version
    ruleset = compile_ruleset(changed.values(), exposures, loaded.models, version=version, force_token=force_token)
    return Loaded(ruleset, changed, loaded.models, exposures)


def _flag(loaded: Loaded, key: str) -> Flag:
    flag = loaded.flags.get(key)
    if flag is None:
        raise ExplainError(f"there is no flag {key}; the file has {', '.join(loaded.flags) or 'none'}")
    return flag


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision with everything that led to it."""

    decision: Decision
    plan: Plan
    version: str

    @property
    def split(self) -> Split:
        """The split that decided, or would have."""
        return self.plan.split_of(self.decision.choice.rule)

    def plain(self) -> dict[str, Any]:
        """The keys that programs rely on, and a few more."""
        choice = self.decision.choice
        return {
            "flag": choice.flag,
            "cohort": choice.cohort.value,
            "reason": choice.reason.value,
            "rule": choice.rule or None,
            "bucket": self.decision.bucket,
            "threshold": self.split.threshold,
            "version": self.version,
            "model": choice.model,
            "salt": self.split.hash_prefix[:-1].decode(),
            "hash": self.decision.unit_hash,
        }

    def sentence(self) -> str:
        """The same for people."""
        split, choice = self.split, self.decision.choice
        share = f"{split.threshold / 1000:g} %"
        arm = f"{choice.cohort.value}:"
        match choice.reason:
            case Reason.SPLIT | Reason.RULE_SPLIT:
                side = "below" if choice.cohort == "canary" else "not below"
                salt = split.hash_prefix[:-1].decode()
                rule = f"by rule {choice.rule}, " if choice.rule else ""
                return f"{arm} {rule}bucket {self.decision.bucket} is {side} {split.threshold} ({share}, salt {salt})"
            case Reason.TARGETING_MATCH:
                return f"{arm} by rule {choice.rule}"
            case Reason.NO_UNIT:
                names = ", ".join(unit_names(self.plan.flag))
                return f"{arm} the request carries none of {names}; canary serves {share}"
            case Reason.AMBIGUOUS_UNIT:
                return f"{arm} the unit came twice, so nobody knows who the user is"
            case Reason.DISABLED:
                return f"{arm} the flag is switched off (enabled: false)"
            case Reason.HELD:
                return f"{arm} the canary is not warm, the gate holds everybody back"
            case Reason.FORCED:
                return f"{arm} forced by x-force-cohort with the testers' token"
            case _:
                return f"{arm} {choice.reason.value}"


def unit_names(flag: Flag) -> list[str]:
    """A flag's units as the file writes them."""
    return [
        f"cookie:{source.name}" if source.kind is SourceKind.COOKIE else source.name or "random" for source in flag.unit
    ]


def explain(loaded: Loaded, key: str, unit: str | None, headers: Sequence[str]) -> Explanation:
    """The decision for one request: `unit` in the flag's first unit source, and `headers` as `name=value`.

    Raises ExplainError for an unknown flag or a header without '='.
    """
    flag = _flag(loaded, key)
    request = request_for(flag, loaded.models[flag.model], unit, headers)
    plan = loaded.ruleset.plans[loaded.models[flag.model].encode()]
    if not isinstance(plan, Plan):
        raise ExplainError(f"the flag {key} is not in the ruleset")
    decision = decide(loaded.ruleset, request)
    if decision.choice.flag != key:
        where = f"the flag {decision.choice.flag}" if decision.choice.flag else "no flag"
        raise ExplainError(f"the :path given leads to {where}; leave it out, or ask for that one")
    return Explanation(decision, plan, loaded.ruleset.version)


def request_for(flag: Flag, prefix: str, unit: str | None, headers: Sequence[str]) -> Request:
    """The request that such a user would send. Bytes that are not UTF-8 pass through as the shell gave them."""
    pairs = [(b":path", prefix.encode() + b"infer"), (b":method", b"POST")]
    if unit is not None:
        source = flag.unit[0]
        value = unit.encode(errors="surrogateescape")
        pairs.append(
            (b"cookie", source.name.encode() + b"=" + value)
            if source.kind is SourceKind.COOKIE
            else (source.header.encode(), value)
        )
    for header in headers:
        name, equals, text = header.partition("=")
        if not equals or not name:
            raise ExplainError(f"write --header NAME=VALUE, not {header!r}")
        pairs.append((name.lower().encode(), text.encode(errors="surrogateescape")))
    first: dict[bytes, bytes] = {}
    repeated: dict[bytes, list[bytes]] = {}
    for name_bytes, value_bytes in pairs:
        if name_bytes in first and not name_bytes.startswith(b":"):
            repeated.setdefault(name_bytes, [first[name_bytes]]).append(value_bytes)
        else:
            first[name_bytes] = value_bytes
    return Request(first, repeated)


def as_json(explanation: Explanation) -> str:
    """One JSON object."""
    return json.dumps(explanation.plain(), indent=1)

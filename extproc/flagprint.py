"""Flags back to a document, and to YAML: what is read again is the same flags. Segments are written out where used."""

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import yaml

from extproc.core.changes import duration_text, unit_name
from extproc.core.conditions import All, AnyOf, Condition, Leaf, Not, Op, Subject
from extproc.core.flags import Flag, Guardrail, Rollout, Rule, Step

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_/.-]*")
_WORDS = frozenset(("null", "true", "false"))


def plain_flags(flags: Iterable[Flag]) -> dict[str, Any]:
    """The flag file that says this."""
    return {"version": 1, "flags": {flag.key: _flag(flag) for flag in flags}}


def yaml_of(flags: Iterable[Flag]) -> str:
    """The same as text."""
    return yaml.dump(plain_flags(flags), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """PyYAML's way to have text in quotes wherever any reader might take it for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Everything is written out."""
        del data
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


def _represent_number(dumper: yaml.SafeDumper, number: Decimal) -> yaml.ScalarNode:
    text = f"{number:f}"
    return dumper.represent_scalar(f"tag:yaml.org,2002:{'float' if '.' in text else 'int'}", text)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Decimal, _represent_number)


def _flag(flag: Flag) -> dict[str, Any]:
    percentage = {"canary": flag.percent} if flag.rollout is None else {"rollout": _rollout(flag.rollout)}
    return {
        "description": flag.description,
        "owner": flag.owner,
        "model": flag.model,
        "unit": [unit_name(source) for source in flag.unit],
        "missing_unit": flag.missing_unit.value,
        "salt": flag.salt,
        "enabled": flag.enabled,
        "allow_force": flag.allow_force,
        **_written(expires=flag.expires),
        "rules": [_rule(rule) for rule in flag.rules],
        **percentage,
    }


def _written(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _rollout(rollout: Rollout) -> dict[str, Any]:
    guardrails = rollout.guardrails
    return {
        "steps": [_step(step) for step in rollout.steps],
        **_written(bake=duration_text(rollout.bake_s) or None),
        **_written(guardrails=None if guardrails is None else {each.name: _guardrail(each) for each in guardrails}),
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "canary": step.percent,
        **_written(soak=duration_text(step.soak_s) or None, min_requests=step.min_requests, min_units=step.min_units),
        **_written(approval="required" if step.approval else None),
    }


def _guardrail(guardrail: Guardrail) -> dict[str, Any]:
    margins = {"rollback_if": guardrail.rollback_if, "halt_if": guardrail.halt_if}
    texts = {key: str(margin) for key, margin in margins.items() if margin is not None}
    return {**texts, **_written(require=guardrail.require, direction=guardrail.direction)}


def _rule(rule: Rule) -> dict[str, Any]:
    serve = rule.serve.value if rule.serve is not None else None
    return {"name": rule.name, "when": plain_condition(rule.when), **_written(serve=serve, canary=rule.percent)}


def plain_condition(condition: Condition) -> dict[str, Any]:
    """A condition as the file writes it."""
    match condition:
        case Leaf():
            return _leaf(condition)
        case Not(inner):
            return {"not": plain_condition(inner)}
        case All(inners):
            return {"all": [plain_condition(each) for each in inners]}
        case AnyOf(inners):
            return {"any": [plain_condition(each) for each in inners]}


def _leaf(leaf: Leaf) -> dict[str, Any]:
    comparison = {leaf.op.value: True if leaf.op is Op.EXISTS else list(leaf.values)}
    if leaf.subject in (Subject.PATH, Subject.METHOD):
        return {leaf.subject.value: comparison}
    return {leaf.subject.value: leaf.name, **comparison}

"""What differs between two versions of a flag, in the words of the file, and what that does to a running rollout."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from extproc.core.flags import Exposure, Flag, Guardrail, Rollout, Rule, SourceKind, Step, UnitSource, wanted_percent

UNCHANGED_KEYS = ("key", "model", "salt", "missing_unit", "enabled", "allow_force", "expires", "owner", "description")


@dataclass(frozen=True, slots=True)
class Change:
    """One key that says something else now. `before` or `after` is '' where it is not written."""

    what: str
    before: str
    after: str


def changes_of(old: Flag | None, new: Flag | None) -> Iterator[Change]:
    """Everything that differs, in the order of the file's keys."""
    if old is None or new is None:
        yield Change("flag", old.key if old else "", new.key if new else "")
        return
    for name in UNCHANGED_KEYS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield Change(name, _plain(before), _plain(after))
    if old.unit != new.unit:
        yield Change("unit", ", ".join(map(unit_name, old.unit)), ", ".join(map(unit_name, new.unit)))
    yield from _rule_changes(old.rules, new.rules)
    if (old.percent, old.rollout is None) != (new.percent, new.rollout is None):
        yield Change("canary", _percentage(old), _percentage(new))
    if old.rollout is not None and new.rollout is not None:
        yield from _rollout_changes(old.rollout, new.rollout)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def unit_name(source: UnitSource) -> str:
    """A unit as the file writes it."""
    match source.kind:
        case SourceKind.HEADER:
            return source.name
        case SourceKind.COOKIE:
            return f"cookie:{source.name}"
        case SourceKind.RANDOM:
            return "random"


def _percentage(flag: Flag) -> str:
    return f"{flag.percent} %" if flag.percent is not None else "a rollout"


def _rule_changes(old: tuple[Rule, ...], new: tuple[Rule, ...]) -> Iterator[Change]:
    before, after = {rule.name: rule for rule in old}, {rule.name: rule for rule in new}
    for name in {**before, **after}:
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            yield Change(f"rule {name}", _serves(was), _serves(now))
            continue
        if _serves(was) != _serves(now):
            yield Change(f"rule {name}", _serves(was), _serves(now))
        if was.when != now.when:
            yield Change(f"rule {name}", "its old condition", "a new condition")
    order = [name for name in before if name in after]
    if order != [name for name in after if name in before]:
        yield Change("rules", "order " + ", ".join(order), ", ".join(name for name in after if name in before))


def _serves(rule: Rule | None) -> str:
    if rule is None:
        return ""
    return f"serve {rule.serve}" if rule.serve is not None else f"canary {rule.percent} %"


def _rollout_changes(old: Rollout, new: Rollout) -> Iterator[Change]:
    if old.steps != new.steps:
        yield Change("steps", steps_text(old.steps), steps_text(new.steps))
    if old.bake_s != new.bake_s:
        yield Change("bake", duration_text(old.bake_s), duration_text(new.bake_s))
    before, after = _guardrails(old), _guardrails(new)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            yield Change(f"guardrail {name}", before.get(name, ""), after.get(name, ""))


def _guardrails(rollout: Rollout) -> Mapping[str, str]:
    if rollout.guardrails is None:
        return {"(all)": "the defaults"}
    return {guardrail.name: guardrail_text(guardrail) for guardrail in rollout.guardrails}


def guardrail_text(guardrail: Guardrail) -> str:
    """A guardrail on one line, as the file writes it."""
    keys = ("direction", "rollback_if", "halt_if", "require")
    written = [(key, getattr(guardrail, key)) for key in keys]
    return ", ".join(f"{key} {value}" for key, value in written if value is not None) or "its defaults"


def steps_text(steps: tuple[Step, ...]) -> str:
    """Steps on one line: `1 % (5m, 300 requests), 25 % (approval), 100 %`."""
    return ", ".join(_step_text(step) for step in steps)


def _step_text(step: Step) -> str:
    conditions = [
        duration_text(step.soak_s),
        f"{step.min_requests} requests" if step.min_requests is not None else "",
        f"{step.min_units} units" if step.min_units is not None else "",
        "approval" if step.approval else "",
    ]
    inside = ", ".join(filter(None, conditions))
    return f"{step.percent} %" + (f" ({inside})" if inside else "")


def duration_text(seconds: float | None) -> str:
    """A duration as the file writes it: 5400.0 is `1h30m`."""
    if seconds is None:
        return ""
    left, parts = int(seconds), []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{name}")
    return "".join(parts) or "0s"


def rollout_effect(old: Flag | None, new: Flag | None, before: Exposure | None, after: Exposure | None) -> str:
    """What the edit does to a rollout: '' where there is none and none begins.

    `before` and `after` are the exposures that count for the old and for the new flag: None without an entry for its
    key and salt.
    """
    had = old is not None and old.rollout is not None
    has = new is not None and new.rollout is not None
    was = Decimal(0) if old is None else wanted_percent(old, before)
    if not has or new is None:
        now = "the flag is gone" if new is None else f"{new.percent} % is served from now on"
        return f"the rollout ends at {was} %: {now}" if had else ""
    now = f"{wanted_percent(new, after)} %"
    if not had or old is None:
        return f"a rollout begins at {now}" if old is None else f"a rollout begins at {now}, instead of {was} %"
    if before is not None and after is None:
        why = "a rollout belongs to its salt" if old.salt != new.salt else "a rollout belongs to its flag's key"
        return f"the rollout begins again at 0 %, from {was} %: {why}"
    if old.rollout == new.rollout:
        return f"the rollout goes on at {now}"
    return f"the rollout keeps its {now}; the new steps and guardrails count from its next look on"

"""What an edit of the flag file would do to the users: who changes arm, exactly, before anybody does.

A draw is a salt and the units it hashes. Under one draw the exposed users are the buckets below a threshold, so the
difference of two percentages is an interval of buckets. Two different draws are independent: of the users that have
canary by one, the other exposes its own percentage. All shares are exact fractions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from extproc.core.bucketing import BUCKETS, effective_salt, rule_salt, threshold_of
from extproc.core.changes import Change, changes_of, rollout_effect
from extproc.core.document import Path
from extproc.core.flags import Arm, Exposure, Exposures, Flag, Rule, UnitSource, wanted_percent
from extproc.core.implication import implies


@dataclass(frozen=True, slots=True)
class Draw:
    """Who gets canary: the units whose bucket under `salt` is below `threshold`. 0 is nobody, BUCKETS everybody."""

    threshold: int
    salt: str = ""
    units: tuple[UnitSource, ...] = ()

    @property
    def share(self) -> Fraction:
        """The exposed part of all users."""
        return Fraction(self.threshold, BUCKETS)

    @property
    def percent(self) -> Decimal:
        """The same in percent."""
        return Decimal(self.threshold) / 1000


NOBODY = Draw(0)


@dataclass(frozen=True, slots=True)
class Interval:
    """Buckets `first` .. `last` under the salt of the draw, and the arm that they move to."""

    first: int
    last: int
    to: Arm


@dataclass(frozen=True, slots=True)
class Move:
    """The parts of those concerned that move to canary and back to stable; `interval` where one draw says which."""

    to_canary: Fraction
    to_stable: Fraction
    interval: Interval | None = None
    drawn_anew: bool = False


def move(before: Draw, after: Draw) -> Move:
    """Who changes arm between two draws."""
    a, b = before.threshold, after.threshold
    trivial = {a, b} & {0, BUCKETS}
    same = before.salt == after.salt and before.units[:1] == after.units[:1]
    if not (same or trivial):
        return Move((1 - before.share) * after.share, before.share * (1 - after.share), drawn_anew=True)
    if a == b:
        return Move(Fraction(0), Fraction(0))
    interval = Interval(min(a, b), max(a, b) - 1, Arm.CANARY if b > a else Arm.STABLE)
    return Move(max(after.share - before.share, Fraction(0)), max(before.share - after.share, Fraction(0)), interval)


@dataclass(frozen=True, slots=True)
class Group:
    """Users that one rule decides about, or with rule '' the percentage itself."""

    rule: str
    draw: Draw


@dataclass(frozen=True, slots=True)
class GroupMove:
    """Users that may be decided about by another rule than before, or by the same in another way."""

    before: Group
    after: Group
    move: Move


@dataclass(frozen=True, slots=True)
class Side:
    """A flag before or after, with what the controller decided for it. The warm gate is left aside: it is passing."""

    flag: Flag
    exposure: Exposure | None

    @property
    def salt(self) -> str:
        """The salt that is hashed."""
        return effective_salt(self.flag.salt, self.exposure.attempt if self.exposure is not None else 0)

    @property
    def warm_exposure(self) -> Exposure | None:
        """The same with the warm gate open."""
        return replace(self.exposure, cap=100) if self.exposure is not None else None

    @property
    def draw(self) -> Draw:
        """Who gets canary by the percentage."""
        return self._draw(wanted_percent(self.flag, self.exposure), self.salt)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Who gets canary by each rule, and last by the percentage. A flag that is switched off asks no rule."""
        rules = self.flag.rules if self.flag.enabled else ()
        return (*(Group(rule.name, self._rule_draw(rule)) for rule in rules), Group("", self.draw))

    def _rule_draw(self, rule: Rule) -> Draw:
        if rule.percent is not None:
            return self._draw(rule.percent, rule_salt(self.salt, rule.name))
        return Draw(BUCKETS if rule.serve is Arm.CANARY else 0)

    def _draw(self, percent: Decimal, salt: str) -> Draw:
        return Draw(threshold_of(percent) if self.flag.enabled else 0, salt, self.flag.unit)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should know before the edit is served; `path` is below the flag."""

    path: Path
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagPlan:
    """What the edit does to one model's users.

    `users` are those whom the percentage decides about before and after; `groups` those that a rule decides about
    before or after, as far as they can change arm. How many users a rule matches is not known here.
    """

    model: str
    before: Side | None
    after: Side | None
    users: Move
    groups: tuple[GroupMove, ...]
    changes: tuple[Change, ...]
    rollout: str
    notices: tuple[Notice, ...]
    units_lost: bool

    @property
    def key(self) -> str:
        """The flag's key, the new one if it changed."""
        side = self.after if self.after is not None else self.before
        return side.flag.key if side is not None else ""

    @property
    def moves_back(self) -> bool:
        """Whether anybody may move from canary to stable."""
        return self.units_lost or any(each.to_stable > 0 for each in (self.users, *(g.move for g in self.groups)))

    @property
    def changed(self) -> bool:
        """Whether the edit touches this flag at all."""
        return bool(self.changes)


def plan(before: Iterable[Flag], after: Iterable[Flag], exposures: Exposures) -> tuple[FlagPlan, ...]:
    """One plan per model that has a flag before or after, in the order of the new file, then of the old."""
    old = {flag.model: Side(flag, exposures.of(flag)) for flag in before}
    new = {flag.model: Side(flag, exposures.of(flag)) for flag in after}
    return tuple(_flag_plan(model, old.get(model), new.get(model)) for model in {**new, **old})


def _flag_plan(model: str, before: Side | None, after: Side | None) -> FlagPlan:
    users = move(before.draw if before else NOBODY, after.draw if after else NOBODY)
    groups = tuple(_group_moves(before, after))
    return FlagPlan(
        model=model,
        before=before,
        after=after,
        users=users,
        groups=groups,
        changes=tuple(changes_of(_flag(before), _flag(after))),
        rollout=rollout_effect(_flag(before), _flag(after), _exposure(before), _exposure(after)),
        notices=tuple(_notices(before, after, users)) if before and after else (),
        units_lost=_units_lost(before, after),
    )


def _flag(side: Side | None) -> Flag | None:
    return side.flag if side is not None else None


def _exposure(side: Side | None) -> Exposure | None:
    return side.exposure if side is not None else None


def _groups(side: Side | None) -> tuple[Group, ...]:
    return side.groups if side is not None else (Group("", NOBODY),)


def _rules(side: Side | None) -> tuple[Rule, ...]:
    return side.flag.rules if side is not None and side.flag.enabled else ()


def _group_moves(before: Side | None, after: Side | None) -> Iterator[GroupMove]:
    """Every way in which users of one group can come to another and change arm by it.

    Whom a rule matched is known to match its condition and none before it. So after the edit they are decided about by
    the first rule that surely matches, or by one before it that may.
    """
    old, new = _rules(before), _rules(after)
    old_groups, new_groups = _groups(before), _groups(after)
    false: set[object] = set()
    for i, group in enumerate(old_groups):
        condition = old[i].when if i < len(old) else None
        for j, then in enumerate(new_groups):
            if j < len(new) and new[j].when in false:
                continue
            if not (group.rule == "" and then.rule == ""):
                moved = move(group.draw, then.draw)
                if moved.to_canary or moved.to_stable:
                    yield GroupMove(group, then, moved)
            if j < len(new) and condition is not None and implies(condition, new[j].when):
                break
        false.add(condition)


def _units_lost(before: Side | None, after: Side | None) -> bool:
    """Whether users that are exposed now may send no unit that is still asked for."""
    if before is None or after is None or after.draw.threshold == BUCKETS or not before.draw.threshold:
        return False
    return before.flag.unit[0] == after.flag.unit[0] and before.flag.unit != after.flag.unit[: len(before.flag.unit)]


def _notices(before: Side, after: Side, users: Move) -> Iterator[Notice]:
    old, new = before.flag, after.flag
    swap = _swap_text(users)
    renamed = old.key != new.key
    if before.salt != after.salt:
        if renamed and old.salt != new.salt and new.salt == new.key:
            message = f"the flag {old.key} is now {new.key} and has no salt of its own: {swap}"
            yield Notice((), f"{message}; write `salt: {old.salt}` to keep them where they are")
        elif old.salt != new.salt:
            how = f"the salt changed: {swap}"
            yield Notice(("salt",), f"{how}; write `salt: {old.salt}` to keep them where they are")
        else:
            yield Notice((), f"the flag's new key loses the rollout's reseeded salt {before.salt}: {swap}")
    elif renamed and old.rollout is not None and new.rollout is not None and before.exposure is not None:
        yield Notice((), f"the flag {old.key} is now {new.key}: its rollout begins again, at {after.draw.percent} %")
    if old.unit != new.unit:
        yield Notice(("unit",), f"the units changed: {_units_text(before, after)}")
    if before.salt == after.salt:
        yield from _rule_notices(old, new)


def _swap_text(users: Move) -> str:
    share = percent_text(users.to_canary + users.to_stable)
    if users.to_canary and users.to_stable:
        return f"{share} % of users swap"
    if users.to_canary or users.to_stable:
        return f"{share} % of users move {'to canary' if users.to_canary else 'back to stable'}"
    return "nobody moves yet, but others will be first"


def _units_text(before: Side, after: Side) -> str:
    old, new = before.flag.unit, after.flag.unit
    if old[0] != new[0]:
        return "every user is drawn anew"
    return f"who sends no {old[0].name or 'random'} is drawn by something else, or gets stable"


def _rule_notices(old: Flag, new: Flag) -> Iterator[Notice]:
    """A rule's name is part of the salt of its split."""
    names = {rule.name for rule in new.rules}
    gone = {rule.when: rule for rule in old.rules if rule.percent is not None and rule.name not in names}
    for i, rule in enumerate(new.rules):
        was = gone.get(rule.when)
        if was is not None and rule.percent is not None:
            message = f"the rule {was.name} is now {rule.name}, and its split is drawn by its name: its users swap"
            yield Notice(("rules", i, "name"), message)


def percent_text(share: Fraction) -> str:
    """An exact share as a percentage: 19/200 is `9.5`."""
    text = f"{Decimal(share.numerator * 100) / Decimal(share.denominator):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

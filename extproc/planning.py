"""`perch plan`: a new flag file against what is served, counted on unit ids if there are any, and shown."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from extproc.core.bucketing import BUCKETS
from extproc.core.decision import decide
from extproc.core.exposure import ExposureError
from extproc.core.flags import Arm, Exposures, Flag
from extproc.core.plan import FlagPlan, Group, GroupMove, Move, Side, percent_text, plan
from extproc.core.ruleset import Ruleset, compile_ruleset, ruleset_version
from extproc.explain import request_for
from extproc.flagfile import Paths, read_exposures
from extproc.flagread import FlagFileRead, read_flag_file

WIDTH = 50
"""Characters of the line from 0 to 100 %: two percent each."""

FULL, COMING, LEAVING, EMPTY = "█", "+", "-", "·"


class PlanError(Exception):
    """There is nothing to compare with; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Unit ids counted by the arm before and after."""

    units: int
    to_canary: int
    to_stable: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A new file against an old one: the versions, the plans of every flag, the counts by flag's key."""

    before: str
    after: str
    flags: tuple[FlagPlan, ...]
    counted: Mapping[str, Counted]

    @property
    def moves_back(self) -> bool:
        """Whether anybody may move from canary to stable, by what is known or by the units that were counted."""
        return any(each.moves_back for each in self.flags) or any(each.to_stable for each in self.counted.values())


def served_or(paths: Paths, old: Path | None) -> tuple[Path, Exposures]:
    """The file to compare with, the last one served unless another is given, and what the controller decided.

    Raises PlanError.
    """
    file = old if old is not None else paths.last_good
    if old is None and not file.exists():
        raise PlanError(f"nothing is served yet, {file} does not exist; compare with a file by --flags FILE")
    try:
        return file, read_exposures(paths.exposure) or Exposures()
    except ExposureError as error:
        raise PlanError(f"{paths.exposure}: {error}; compare elsewhere by --state FOLDER") from None


def make_plan(
    old: FlagFileRead, new: FlagFileRead, exposures: Exposures, models: Mapping[str, str], units: Path | None
) -> Planned:
    """The whole plan. Raises PlanError for a file of units that cannot be read."""
    versions = [ruleset_version(each.content, exposures.seq) for each in (old, new)]
    plans = plan(old.flags, new.flags, exposures)
    counted = _count(plans, _ids(units), models) if units is not None else {}
    return Planned(versions[0], versions[1], plans, counted)


def _ids(file: Path) -> list[str]:
    """One id a line, as bytes; empty lines are none."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise PlanError(f"{file}: cannot be read: {error.strerror}") from None
    ids = [line.decode(errors="surrogateescape") for line in lines if line]
    if not ids:
        raise PlanError(f"{file}: has no unit id; write one a line")
    return ids


def _count(plans: Iterable[FlagPlan], ids: Sequence[str], models: Mapping[str, str]) -> dict[str, Counted]:
    """Every id decided before and after, the warm gate open, in the flag's first unit and with no other header."""
    counted = {}
    for each in plans:
        prefix = models.get(each.model, f"/v2/models/{each.model}/")
        arms = zip(_arms(each.before, prefix, ids), _arms(each.after, prefix, ids), strict=True)
        moves = [(before, after) for before, after in arms if before is not after]
        to_canary = sum(after is Arm.CANARY for _, after in moves)
        counted[each.key] = Counted(len(ids), to_canary, len(moves) - to_canary)
    return counted


def _arms(side: Side | None, prefix: str, ids: Sequence[str]) -> Iterator[Arm]:
    if side is None:
        yield from (Arm.STABLE for _ in ids)
        return
    ruleset = _warm_ruleset(side, prefix)
    for unit in ids:
        yield decide(ruleset, request_for(side.flag, prefix, unit, ())).choice.cohort


def _warm_ruleset(side: Side, prefix: str) -> Ruleset:
    flag: Flag = side.flag
    exposure = side.warm_exposure
    exposures = Exposures(0, {flag.key: exposure} if exposure is not None else {})
    return compile_ruleset([flag], exposures, {flag.model: prefix}, version="plan")


def read_both(new: Path, old: Path, models: Mapping[str, str]) -> tuple[FlagFileRead, FlagFileRead]:
    """The old and the new file. What is served may name a model that is gone. Raises FlagFileError."""
    return read_flag_file(old, None), read_flag_file(new, models)


def as_text(planned: Planned, *, ascii_only: bool = False) -> list[str]:
    """Lines for people."""
    changed = [each for each in planned.flags if each.changed]
    if not changed:
        return ["nothing changes for anybody"]
    lines = [line for each in changed for line in _flag_lines(each, planned.counted.get(each.key))]
    same = [each.key for each in planned.flags if not each.changed]
    if same:
        lines.append(f"unchanged: {', '.join(same)}")
    back = "somebody moves back from canary to stable" if planned.moves_back else "nobody moves back to stable"
    lines.append(back)
    return [line.translate(_ASCII) for line in lines] if ascii_only else lines


_ASCII = str.maketrans({FULL: "#", EMPTY: ".", "→": ">"})


def _flag_lines(each: FlagPlan, counted: Counted | None) -> Iterator[str]:
    yield f"{each.key} (model {each.model})"
    yield from (f"  {line}" for line in picture(each))
    yield f"  of those whom the percentage decides about, {_move_text(each.users)}"
    if counted is not None:
        yield f"  of {counted.units:,} units counted, {counted.to_canary:,} to canary, {counted.to_stable:,} to stable"
    yield from (f"  {_group_text(group)}" for group in each.groups)
    for change in each.changes:
        yield f"  {change.what}: {change.before or '(nothing)'} → {change.after or '(nothing)'}"
    if each.rollout:
        yield f"  {each.rollout}"
    if _held(each):
        yield "  the canary is not warm: nobody is on it now, and all of this holds once it is"
    yield from (f"  warning: {notice.message}" for notice in each.notices)
    yield ""


def _held(each: FlagPlan) -> bool:
    """Whether the warm gate of the flag that is served is closed."""
    exposure = each.before.exposure if each.before is not None else None
    return exposure is not None and exposure.cap == 0


def _move_text(move: Move) -> str:
    to = f"{percent_text(move.to_canary)} % move to canary, {percent_text(move.to_stable)} % back to stable"
    if move.interval is not None:
        return f"{to} (buckets {move.interval.first}..{move.interval.last})"
    return f"{to}, wherever they were: another draw" if move.drawn_anew else to


def _group_text(group: GroupMove) -> str:
    to = f"{percent_text(group.move.to_canary)} % to canary, {percent_text(group.move.to_stable)} % back to stable"
    return f"who goes from {_group(group.before)} to {_group(group.after)}: {to}"


def _group(group: Group) -> str:
    return (
        f"rule {group.rule} ({group.draw.percent:f} %)" if group.rule else f"the percentage ({group.draw.percent:f} %)"
    )


def picture(each: FlagPlan) -> list[str]:
    """The line from 0 to 100 % before and after: who has canary, who comes to it, who leaves it."""
    before = each.before.draw.threshold if each.before is not None else 0
    after = each.after.draw.threshold if each.after is not None else 0
    kept = 0 if each.users.drawn_anew else min(before, after)
    cells = [_cell(i, before, after, kept) for i in range(WIDTH)]
    old = "".join(FULL if i < _cells(before) else EMPTY for i in range(WIDTH))
    return [
        f"before |{old}| {before / 1000:g} %",
        f"after  |{''.join(cells)}| {after / 1000:g} %" + ("  drawn anew" if each.users.drawn_anew else ""),
        f"        0{'25':>{WIDTH // 4}}{'50':>{WIDTH // 4}}{'75':>{WIDTH // 4 + 1}}{'100':>{WIDTH // 4 + 1}}",
    ]


def _cells(threshold: int) -> int:
    """How many cells a threshold fills: one is always seen, and the last only when it is everybody."""
    cells = round(threshold * WIDTH / BUCKETS)
    return min(max(cells, 1 if threshold else 0), WIDTH if threshold == BUCKETS else WIDTH - 1)


def _cell(i: int, before: int, after: int, kept: int) -> str:
    if i < _cells(kept):
        return FULL
    if i < _cells(after):
        return COMING
    return LEAVING if i < _cells(before) and kept else EMPTY


def as_json(planned: Planned) -> str:
    """One object for programs. Percentages are exact as far as a double can be."""
    return json.dumps(
        {
            "before": planned.before,
            "after": planned.after,
            "moves_back": planned.moves_back,
            "flags": {each.key: _plain(each, planned.counted.get(each.key)) for each in planned.flags},
        },
        indent=1,
    )


def _plain(each: FlagPlan, counted: Counted | None) -> dict[str, Any]:
    return {
        "model": each.model,
        "changed": each.changed,
        "before": _side(each.before),
        "after": _side(each.after),
        **_move(each.users),
        "moves_back": each.moves_back,
        "held": _held(each),
        "rules": [
            {"from": group.before.rule or None, "to": group.after.rule or None, **_move(group.move)}
            for group in each.groups
        ],
        "changes": [{"what": c.what, "before": c.before or None, "after": c.after or None} for c in each.changes],
        "rollout": each.rollout or None,
        "warnings": [notice.message for notice in each.notices],
        "counted": None
        if counted is None
        else {"units": counted.units, "to_canary": counted.to_canary, "to_stable": counted.to_stable},
    }


def _side(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    return {
        "key": side.flag.key,
        "percent": _number(side.draw.share),
        "threshold": side.draw.threshold,
        "salt": side.salt,
        "enabled": side.flag.enabled,
    }


def _move(move: Move) -> dict[str, Any]:
    interval = move.interval
    return {
        "to_canary_percent": _number(move.to_canary),
        "to_stable_percent": _number(move.to_stable),
        "intervals": [{"first": interval.first, "last": interval.last, "to": interval.to.value}] if interval else [],
        "drawn_anew": move.drawn_anew,
    }


def _number(share: Fraction) -> float | int:
    percent = share * 100
    return int(percent) if percent.denominator == 1 else float(percent)

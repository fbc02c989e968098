"""The scalar types of the flag file: each takes what YAML gave, checks it, and says in its error what to write."""

import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from extproc.core.document import printable
from extproc.core.flags import Margin, MarginKind, SourceKind, UnitSource

MAX_NAME = 200
MAX_TEXT = 2_000
MAX_DURATION_S = 366 * 24 * 3600
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_DURATION = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_MARGIN = re.compile(r"([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?)([x%]?)")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and line feed, which a description of several lines has."""


def _percent(value: Any) -> Decimal:
    if isinstance(value, str) and value.rstrip().endswith("%"):
        raise ValueError(f"write the number alone: {shown(value.rstrip().rstrip('%').rstrip())}")
    if isinstance(value, str):
        raise ValueError(f"a percentage is a number from 0 to 100, without quotes, not the text {shown(value)}")
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"a percentage is a number from 0 to 100, not {shown(value)}")
    percent = Decimal(value)
    if not 0 <= percent <= 100:
        raise ValueError(f"{shown(value)} is not between 0 and 100")
    if percent != round(percent, 3):
        raise ValueError(f"{shown(value)} has more than three decimals; the smallest step is 0.001")
    return percent


def _duration(value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
    if match is None:
        raise ValueError(f"a duration looks like 30s, 10m, 2h or 1h30m, not {shown(value)}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    duration_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if duration_s > MAX_DURATION_S:
        raise ValueError(f"{shown(value)} is longer than a year; write at most {MAX_DURATION_S // 86400}d")
    return float(duration_s)


def _margin(value: Any) -> Margin:
    text = str(value) if isinstance(value, int | Decimal) and not isinstance(value, bool) else value
    match = _MARGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"a margin looks like 1.2x, 15% or 0.20, not {shown(value)}")
    return Margin(Decimal(match[1]), MarginKind(match[2]))


def _unit(value: Any) -> UnitSource:
    if not isinstance(value, str):
        raise ValueError(f"a unit is a header's name, cookie:NAME or random, not {shown(value)}")
    if value.lower() == "random":
        return UnitSource(SourceKind.RANDOM, "")
    if value.startswith("cookie:"):
        if not HEADER_NAME.fullmatch(value[7:]):
            raise ValueError(f"{shown(value)} names no cookie; write cookie:NAME")
        return UnitSource(SourceKind.COOKIE, value[7:])
    if not HEADER_NAME.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a header's name")
    if "_" in value:
        raise ValueError(f"Envoy drops headers with underscores; send and write {value.replace('_', '-')}")
    return UnitSource(SourceKind.HEADER, value.lower())


def name(value: str) -> str:
    """Checks a name. Raises ValueError."""
    if not value:
        raise ValueError("the text is empty; write a name, or take the key out")
    if len(value) > MAX_NAME:
        raise ValueError(f"longer than {MAX_NAME} characters")
    if not _NAME.fullmatch(value):
        raise ValueError(f"{shown(value)} may have letters, digits and . _ - / only, and begins with a letter or digit")
    return value


def salt(value: str) -> str:
    """Checks a salt. Raises ValueError."""
    if ":" in value:
        raise ValueError("a salt must not contain ':', which separates it from the unit")
    if "#" in value:
        raise ValueError("a salt must not contain '#', which separates it from the attempt of a reseeded rollout")
    return name(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {shown(value)}; put it in quotes")
    return value


def _note(value: Any) -> str:
    """Text for people: it may have several lines, but nothing that would do things to a terminal."""
    text = _text(value)
    control = _CONTROL.search(text)
    if control is not None:
        raise ValueError(f"the control character {control[0]!r} does not belong here")
    if len(text) > MAX_TEXT:
        raise ValueError(f"longer than {MAX_TEXT:,} characters")
    return text


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"write true or false, not {shown(value)}")
    return value


def _date(value: Any) -> str:
    try:
        return date.fromisoformat(value if _DAY.fullmatch(value) else "").isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"a date looks like 2027-03-01, not {shown(value)}") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a count is a whole number from 0, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as people wrote it, short, on one line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    text = printable(str(value).lower() if isinstance(value, bool) else str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _in_schema(**schema: Any) -> WithJsonSchema:
    """What an editor is told about a type whose checks are Python."""
    return WithJsonSchema(schema)


_NUMBER_UNIT = r"^[-+]?[0-9]+(\.[0-9]+)?[x%]?$"
_NAMES = {"type": "string", "maxLength": MAX_NAME}

Percent = Annotated[Decimal, BeforeValidator(_percent), _in_schema(type="number", minimum=0, maximum=100)]
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    _in_schema(type="string", pattern=r"^(?=.)([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$", examples=["10m", "1h30m"]),
]
MarginText = Annotated[
    Margin,
    BeforeValidator(_margin),
    _in_schema(anyOf=[{"type": "string", "pattern": _NUMBER_UNIT}, {"type": "number"}], examples=["1.2x", "15%", 0.2]),
]
Unit = Annotated[
    UnitSource,
    BeforeValidator(_unit),
    _in_schema(type="string", pattern=r"^[^_\s]+$|^cookie:\S+$", examples=["x-user-id", "cookie:sid", "random"]),
]
Name = Annotated[
    str, BeforeValidator(_text), AfterValidator(name), _in_schema(**_NAMES, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
]
Salt = Annotated[
    str, BeforeValidator(_text), AfterValidator(salt), _in_schema(**_NAMES, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
]
Text = Annotated[str, BeforeValidator(_note), _in_schema(type="string", maxLength=MAX_TEXT)]
Switch = Annotated[bool, BeforeValidator(_flag), _in_schema(type="boolean")]
Day = Annotated[
    str,
    BeforeValidator(_date),
    _in_schema(type="string", format="date", pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", examples=["2027-03-01"]),
]
Count = Annotated[int, BeforeValidator(_count), _in_schema(type="integer", minimum=0)]

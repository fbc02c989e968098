"""The scalar types of the flag file: each takes what YAML gave, checks it, and says in its error what to write."""

import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from extproc.core.flags import Margin, MarginKind, SourceKind, UnitSource

MAX_NAME = 200
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_DURATION = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_MARGIN = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)([x%]?)")


def _percent(value: Any) -> Decimal:
    if isinstance(value, str) and value.rstrip().endswith("%"):
        raise ValueError(f"write the number alone: {value.rstrip().rstrip('%').rstrip()}")
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"a percentage is a number from 0 to 100, not {shown(value)}")
    percent = Decimal(value)
    if not 0 <= percent <= 100:
        raise ValueError(f"{value} is not between 0 and 100")
    if percent != round(percent, 3):
        raise ValueError(f"{value} has more than three decimals; the smallest step is 0.001")
    return percent


def _duration(value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
    if match is None:
        raise ValueError(f"a duration looks like 30s, 10m, 2h or 1h30m, not {shown(value)}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _margin(value: Any) -> Margin:
    text = str(value) if isinstance(value, int | Decimal) and not isinstance(value, bool) else value
    match = _MARGIN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"a margin looks like 1.2x, 15% or 0.20, not {shown(value)}")
    return Margin(Decimal(match[1]), MarginKind(match[2]))


def _unit(value: Any) -> UnitSource:
    if not isinstance(value, str):
        raise ValueError(f"a unit is a header's name, cookie:NAME or random, not {shown(value)}")
    if value == "random":
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


def _name(value: str) -> str:
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
    return _name(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {shown(value)}; put it in quotes")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"write true or false, not {shown(value)}")
    return value


def _date(value: Any) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"a date looks like 2027-03-01, not {shown(value)}") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a count is a whole number from 0, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as people wrote it, short."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


Percent = Annotated[Decimal, BeforeValidator(_percent)]
Duration = Annotated[float, BeforeValidator(_duration)]
MarginText = Annotated[Margin, BeforeValidator(_margin)]
Unit = Annotated[UnitSource, BeforeValidator(_unit)]
Name = Annotated[str, BeforeValidator(_text), AfterValidator(_name)]
Salt = Annotated[str, BeforeValidator(_text), AfterValidator(salt)]
Text = Annotated[str, BeforeValidator(_text)]
Switch = Annotated[bool, BeforeValidator(_flag)]
Day = Annotated[str, BeforeValidator(_date)]
Count = Annotated[int, BeforeValidator(_count)]

"""state/exposure.json as values and back: what the controller decided, for serve to follow."""

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

from extproc.core.flags import Exposure, Exposures


class ExposureError(ValueError):
    """An exposure file that cannot be followed; the message says which key is wrong."""


def parse_exposures(data: Any) -> Exposures:
    """Checks and freezes what was read from the file. Raises ExposureError. Unknown keys are left to newer versions."""
    if not isinstance(data, dict) or not isinstance(data.get("flags"), dict):
        raise ExposureError("expected {seq, written_by, flags: {KEY: {...}}}")
    seq = _whole(data.get("seq"), "seq")
    return Exposures(seq, {key: _exposure(key, entry) for key, entry in data["flags"].items()})


def _exposure(key: str, entry: Any) -> Exposure:
    if not isinstance(entry, dict) or not isinstance(entry.get("salt"), str):
        raise ExposureError(f"flags.{key}: expected a mapping with the salt it belongs to")
    version = entry.get("canary_version")
    if version is not None and not isinstance(version, str):
        raise ExposureError(f"flags.{key}.canary_version: expected text or null")
    cap = _whole(entry.get("cap", 100), f"flags.{key}.cap")
    if cap not in (0, 100):
        raise ExposureError(f"flags.{key}.cap: the warm gate is 0 or 100, not {cap}")
    return Exposure(
        salt=entry["salt"],
        attempt=_whole(entry.get("attempt", 0), f"flags.{key}.attempt"),
        canary_version=version,
        step=_whole(entry.get("step", 0), f"flags.{key}.step"),
        percent=_percent(entry.get("percent", 0), f"flags.{key}.percent"),
        cap=cap,
    )


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ExposureError(f"{where}: expected a whole number from 0, not {value!r}")
    return value


def _percent(value: Any, where: str) -> Decimal:
    try:
        percent = Decimal(str(value)) if not isinstance(value, bool) else Decimal("NaN")
    except InvalidOperation:
        percent = Decimal("NaN")
    if not (percent.is_finite() and 0 <= percent <= 100):
        raise ExposureError(f"{where}: expected a percentage from 0 to 100, not {value!r}")
    return percent


def plain_exposures(exposures: Exposures, written_by: str) -> dict[str, Any]:
    """The same as JSON can hold it. Percentages are numbers: three decimals survive a double."""
    return {
        "seq": exposures.seq,
        "written_by": written_by,
        "flags": {key: _plain(exposure) for key, exposure in sorted(exposures.flags.items())},
    }


def _plain(exposure: Exposure) -> dict[str, Any]:
    percent = exposure.percent
    return {
        "salt": exposure.salt,
        "attempt": exposure.attempt,
        "canary_version": exposure.canary_version,
        "step": exposure.step,
        "percent": int(percent) if percent == int(percent) else float(percent),
        "cap": exposure.cap,
    }


def with_caps(exposures: Exposures, caps: Mapping[str, tuple[str, int]]) -> Exposures:
    """The exposures with the warm gate of each flag in `caps` (key -> salt, cap) set; itself if none changed.

    An entry of another salt says nothing about the flag any more and is replaced by a new one.
    """
    flags = dict(exposures.flags)
    for key, (salt, cap) in caps.items():
        known = flags.get(key)
        fresh = Exposure(salt=salt) if known is None or known.salt != salt else known
        flags[key] = replace(fresh, cap=cap)
    if flags == exposures.flags:
        return exposures
    return Exposures(exposures.seq + 1, flags)

"""Builders of flags, rulesets and requests, and a murmur3 of our own that shares nothing with the code under test."""

from collections.abc import Callable, Iterable
from decimal import Decimal
from types import SimpleNamespace

import pytest

from extproc.core.decision import Decision, decide
from extproc.core.flags import Exposure, Exposures, Flag, MissingUnit, SourceKind, UnitSource
from extproc.core.request import Request
from extproc.core.ruleset import Ruleset, compile_ruleset

MODELS = {"digits": "/v2/models/digits/", "wine": "/v2/models/wine/"}
TOKEN = "correct-horse-battery"


def murmur3_x86_32(data: bytes, seed: int) -> int:
    """Written from the algorithm's description: blocks of four bytes, a tail, a finalizer."""

    def rotate(word: int, by: int) -> int:
        return (word << by | word >> (32 - by)) & 0xFFFFFFFF

    def scramble(block: int) -> int:
        return rotate(block * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    h = seed
    whole = len(data) // 4 * 4
    for i in range(0, whole, 4):
        h = rotate(h ^ scramble(int.from_bytes(data[i : i + 4], "little")), 13) * 5 + 0xE6546B64 & 0xFFFFFFFF
    if whole < len(data):
        h ^= scramble(int.from_bytes(data[whole:], "little"))
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


@pytest.fixture(scope="session")
def murmur3() -> Callable[[bytes, int], int]:
    """The independent hash: (data, seed) -> 0 .. 2**32 - 1."""
    return murmur3_x86_32


def source(text: str) -> UnitSource:
    """A unit source as the flag file writes it."""
    if text == "random":
        return UnitSource(SourceKind.RANDOM, "")
    if text.startswith("cookie:"):
        return UnitSource(SourceKind.COOKIE, text.removeprefix("cookie:"))
    return UnitSource(SourceKind.HEADER, text)


def flag(key: str = "digits", *, percent: object = 5, unit: str | None = None, **more) -> Flag:
    """A flag; `unit` is a list of sources with spaces between, `percent` None makes room for a rollout."""
    given = {"model": key, "salt": key, **more}
    if unit is not None:
        given["unit"] = tuple(map(source, unit.split()))
    if "missing_unit" in given:
        given["missing_unit"] = MissingUnit(given["missing_unit"])
    return Flag(key=key, percent=None if percent is None else Decimal(str(percent)), **given)


def exposures(seq: int = 1, **flags: dict) -> Exposures:
    """What the controller wrote: key = {percent, cap, ...}; the salt is the key unless given."""
    entries = {}
    for key, values in flags.items():
        given = {"salt": key, **values}
        given["percent"] = Decimal(str(given.get("percent", 0)))
        entries[key] = Exposure(**given)
    return Exposures(seq, entries)


def rules(*flags: Flag, decided: Exposures | None = None, token: str | None = None, models=MODELS) -> Ruleset:
    """A compiled ruleset."""
    return compile_ruleset(flags, decided or Exposures(), models, version="v", force_token=token)


def request(pairs: Iterable[tuple[bytes, bytes]], path: bytes = b"/v2/models/digits/infer") -> Request:
    """The request with these headers in this order."""
    first: dict[bytes, bytes] = {}
    repeated: dict[bytes, list[bytes]] = {}
    for name, value in [(b":path", path), *pairs]:
        if name in first:
            repeated.setdefault(name, [first[name]]).append(value)
        else:
            first[name] = value
    return Request(first, repeated)


def ask(ruleset: Ruleset, *headers: tuple[str | bytes, str | bytes], path: bytes = b"/v2/models/digits/infer"):
    """The decision for a request with these headers."""
    pairs = [tuple(part.encode() if isinstance(part, str) else part for part in pair) for pair in headers]
    return decide(ruleset, request(pairs, path))


def answer(decision: Decision) -> tuple[str, str]:
    """Cohort and reason."""
    return decision.choice.cohort.value, decision.choice.reason.value


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """flag, exposures, rules, request, ask, answer, and the models and token that they use."""
    return SimpleNamespace(
        flag=flag,
        exposures=exposures,
        rules=rules,
        request=request,
        ask=ask,
        answer=answer,
        source=source,
        models=MODELS,
        token=TOKEN,
    )

"""`flags/tests.yaml`: what a team expects of its flags. Each case asks the very decision that serve makes.

Nothing outside the two files counts: no exposure, no warm gate. A rollout is at 0 unless a case says `at:`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from extproc.core.decision import Decision, decide
from extproc.core.document import Document, FlagFileError, Problem
from extproc.core.document import Path as At
from extproc.core.flags import Exposures, Flag, SourceKind
from extproc.core.request import Request
from extproc.core.ruleschema import HeaderName
from extproc.core.ruleset import Reason, Ruleset, compile_ruleset
from extproc.core.scalars import Name, Percent, Text, shown
from extproc.core.validation import nearest, nothing_written, validated, without_repetition
from extproc.flagread import read_bytes
from extproc.flagyaml import scan_document

MAX_IDS = 1_000_000


def _header_values(value: Any) -> list[bytes]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int):
            raise ValueError(f"expected text, not {shown(each)}; put it in quotes")  # noqa: TRY004  pydantic's way
    return [str(each).encode() for each in values]


def _ids(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_IDS:
        raise ValueError(f"a number of ids is a whole number from 1 to {MAX_IDS:,}, not {shown(value)}")
    return value


HeaderValues = Annotated[list[bytes], BeforeValidator(_header_values), WithJsonSchema({"type": ["string", "array"]})]
Ids = Annotated[int, BeforeValidator(_ids)]


class _Strict(BaseModel):
    """Unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpectModel(_Strict):
    """What must come out. Each key that is written is compared."""

    cohort: Literal["stable", "canary"] | None = None
    reason: Text | None = None
    rule: Text | None = None
    canary: Percent | None = None
    within: Percent = Decimal(1)


class CaseModel(_Strict):
    """One case: a request, or many that differ in their unit."""

    name: Text
    flag: Name
    headers: dict[HeaderName, HeaderValues] = {}
    path: Text | None = None
    method: Text = "POST"
    at: Percent | None = None
    ids: Ids | None = None
    expect: ExpectModel


class CaseFileModel(_Strict):
    """The whole file."""

    version: Literal[1]
    tests: Annotated[list[CaseModel], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True, slots=True)
class CasesReport:
    """The tests of one file: how many there are, and what is wrong, in the file itself or with the flags."""

    file: Path
    count: int = 0
    problems: tuple[Problem, ...] = ()
    failed: frozenset[int] = field(default_factory=frozenset)

    @property
    def passed(self) -> bool:
        """Whether every case came out as expected."""
        return not self.problems


def run_tests(file: Path, flags: Sequence[Flag], prefixes: Mapping[str, str]) -> CasesReport:
    """Runs the cases of a file against these flags."""
    try:
        document = scan_document(read_bytes(file))
    except FlagFileError as error:
        return CasesReport(file, 0, error.problems)
    model, problems = validated(document, CaseFileModel)
    problems = without_repetition(
        [*document.problems, *nothing_written(document), *problems, *_case_problems(document, flags)]
    )
    if problems or model is None:
        return CasesReport(file, 0, FlagFileError(problems).problems)
    by_key = {flag.key: flag for flag in flags}
    found: list[Problem] = []
    failed: set[int] = set()
    for i, case in enumerate(model.tests):
        for path, message in _run(case, by_key[case.flag], prefixes):
            failed.add(i)
            found.append(document.problem(("tests", i, *path), f"{shown(case.name)}: {message}"))
    return CasesReport(file, len(model.tests), tuple(found), frozenset(failed))


def _case_problems(document: Document, flags: Sequence[Flag]) -> Iterator[Problem]:
    """What looks at two keys at once."""
    cases = document.data.get("tests") if isinstance(document.data, dict) else None
    known = [flag.key for flag in flags]
    for i, case in enumerate(cases if isinstance(cases, list) else ()):
        if not isinstance(case, dict):
            continue
        path: At = ("tests", i)
        key, expect = case.get("flag"), case.get("expect")
        if isinstance(key, str) and key not in known:
            hint = nearest(key, known)
            have = f"did you mean {hint}?" if hint else f"the file has {', '.join(known) or 'none'}"
            yield document.problem((*path, "flag"), f"there is no flag {shown(key)}; {have}")
        if isinstance(expect, dict):
            yield from _expect_problems(document, path, case, expect)


def _expect_problems(
    document: Document, path: At, case: Mapping[str, Any], expect: Mapping[str, Any]
) -> Iterator[Problem]:
    reason = expect.get("reason")
    if isinstance(reason, str) and reason not in list(Reason):
        hint = nearest(reason.upper(), list(Reason))
        known = f"did you mean {hint}?" if hint else f"known are {', '.join(Reason)}"
        yield document.problem((*path, "expect", "reason"), f"{shown(reason)} is no reason; {known}")
    if not {"cohort", "reason", "rule", "canary"} & expect.keys():
        yield document.problem((*path, "expect"), "nothing is expected; write cohort, reason, rule or canary")
    one = [key for key in ("cohort", "reason", "rule") if key in expect]
    if ("canary" in expect) != ("ids" in case):
        yield document.problem((*path, "expect"), "a percentage needs `ids`, the number of users to try, and `ids` one")
    elif "ids" in case and one:
        yield document.problem((*path, "expect", one[0]), "of many ids only the percentage is compared: write canary")
    elif "within" in expect and "canary" not in expect:
        yield document.problem((*path, "expect", "within"), "a tolerance belongs to a percentage: write canary too")


def _run(case: CaseModel, flag: Flag, prefixes: Mapping[str, str]) -> Iterator[tuple[At, str]]:
    """Where and how the case came out otherwise than expected."""
    prefix = prefixes.get(flag.model, f"/v2/models/{flag.model}/")
    if case.at is not None:
        flag = replace(flag, percent=case.at, rollout=None)
    ruleset = compile_ruleset([flag], Exposures(), {flag.model: prefix}, version="tests")
    if case.ids is None:
        yield from _compared(case.expect, decide(ruleset, _request(case, flag, prefix, None)))
        return
    seen = Counter(_cohorts(ruleset, case, flag, prefix))
    share = Fraction(100 * seen["canary"], case.ids)
    expected, within = case.expect.canary or Decimal(0), case.expect.within
    if abs(share - Fraction(expected)) > Fraction(within):
        yield ("expect", "canary"), f"{float(share):g} % of {case.ids:,} ids get canary, not {expected} +- {within} %"


def _cohorts(ruleset: Ruleset, case: CaseModel, flag: Flag, prefix: str) -> Iterator[str]:
    for number in range(case.ids or 0):
        yield decide(ruleset, _request(case, flag, prefix, f"user-{number}".encode())).choice.cohort.value


def _compared(expect: ExpectModel, decision: Decision) -> Iterator[tuple[At, str]]:
    choice = decision.choice
    got = {"cohort": choice.cohort.value, "reason": choice.reason.value, "rule": choice.rule}
    for key, value in got.items():
        wanted = getattr(expect, key)
        if wanted is not None and wanted != value:
            yield ("expect", key), f"{key} is {value or 'none'}, not {wanted or 'none'}"


def _request(case: CaseModel, flag: Flag, prefix: str, unit: bytes | None) -> Request:
    """The request of a case, with a unit of its own in the flag's first source where many are tried."""
    path = case.path if case.path is not None else f"{prefix}infer"
    headers = {b":path": path.encode(), b":method": case.method.encode()}
    repeated: dict[bytes, list[bytes]] = {}
    for name, values in case.headers.items():
        if values:
            headers[name.encode()] = values[0]
        if len(values) > 1:
            repeated[name.encode()] = values
    if unit is not None:
        source = flag.unit[0]
        header = source.header.encode()
        if source.kind is SourceKind.COOKIE:
            unit = b"; ".join([*filter(None, [headers.get(header)]), source.name.encode() + b"=" + unit])
        headers[header] = unit
    return Request(headers, repeated)

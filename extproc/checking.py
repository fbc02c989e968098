"""What `perch check` finds in flag files, and how it says it: to a person, to a program, to a pull request."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extproc.core.advice import Known, advise
from extproc.core.document import FlagFileError, Problem
from extproc.core.exposure import ExposureError
from extproc.core.flags import Exposures, Flag
from extproc.flagfile import Paths, read_exposures
from extproc.flagread import read_flag_file
from extproc.flagtests import CasesReport, run_tests

FORMATS = ("text", "json", "github")


@dataclass(frozen=True, slots=True)
class Checked:
    """One file: what keeps it from being served, what is probably not meant, and what became of its tests."""

    file: Path
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    flags: int = 0
    tests: CasesReport | None = None

    def good(self, *, strict: bool) -> bool:
        """Whether the check passed."""
        failed = self.tests is not None and not self.tests.passed
        return not (self.problems or failed or (strict and self.warnings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a file is checked against. `models` None: which models there are is not known. `tests`: file of its tests.

    `state` is the folder with what is served, if anything is.
    """

    models: Mapping[str, str] | None
    state: Path
    today: str
    tests: Path | None = None


def check_file(file: Path, around: Around) -> Checked:
    """Reads a flag file as serve does, and then looks at what serve would not mind."""
    try:
        read = read_flag_file(file, around.models)
    except FlagFileError as error:
        return Checked(file, error.problems)
    served, exposures = read_served(around.state)
    prefixes = around.models or {}
    known = Known(prefixes=prefixes, today=around.today, served=served, exposures=exposures)
    tests = run_tests(around.tests, read.flags, prefixes) if around.tests is not None else None
    return Checked(file, (), advise(read.document, read.flags, known), len(read.flags), tests)


def read_served(state: Path) -> tuple[tuple[Flag, ...] | None, Exposures]:
    """What is served, for comparison; None where nothing is, or nothing that this version can read."""
    paths = Paths(state, state)
    try:
        flags = read_flag_file(paths.last_good, None).flags
        return flags, read_exposures(paths.exposure) or Exposures()
    except (FlagFileError, ExposureError, OSError):
        return None, Exposures()


def as_text(checked: Checked) -> tuple[list[str], list[str]]:
    """Lines for people: what is wrong, for stderr, and the summary, for stdout."""
    wrong = [f"{checked.file}:{problem}" for problem in checked.problems]
    wrong += [f"{checked.file}:{_at(warning)}: warning: {warning.what}" for warning in checked.warnings]
    if checked.tests is not None:
        wrong += [f"{checked.tests.file}:{problem}" for problem in checked.tests.problems]
    return wrong, [] if checked.problems else [_summary(checked)]


def _at(problem: Problem) -> str:
    return f"{problem.place.line}:{problem.place.column}"


def _summary(checked: Checked) -> str:
    parts = [_count(checked.flags, "flag")]
    if checked.warnings:
        parts.append(_count(len(checked.warnings), "warning"))
    if checked.tests is not None:
        failed = len(checked.tests.problems)
        passed = checked.tests.count - len(checked.tests.failed)
        parts.append(f"{passed} of {_count(checked.tests.count, 'test')} passed" if failed else _tests(checked.tests))
    return f"{checked.file}: good, {', '.join(parts)}"


def _tests(report: CasesReport) -> str:
    return f"{_count(report.count, 'test')} passed"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_json(checked: Sequence[Checked], *, strict: bool) -> str:
    """One object: `ok`, and everything that was found, each with its file."""
    every = {
        "problems": [_row(each.file, problem) for each in checked for problem in each.problems],
        "warnings": [_row(each.file, warning) for each in checked for warning in each.warnings],
        "tests": [_row(each.tests.file, problem) for each in checked if each.tests for problem in each.tests.problems],
    }
    return json.dumps({"ok": all(each.good(strict=strict) for each in checked), **every}, indent=1)


def _row(file: Path, problem: Problem) -> dict[str, Any]:
    place = problem.place
    message = {"path": problem.path, "message": problem.message}
    return {"file": str(file), "line": place.line, "column": place.column, **message}


def as_github(checked: Checked) -> list[str]:
    """Workflow commands, which a pull request shows beside the lines they are about."""
    found = [("error", checked.file, problem) for problem in checked.problems]
    found += [("warning", checked.file, warning) for warning in checked.warnings]
    if checked.tests is not None:
        found += [("error", checked.tests.file, problem) for problem in checked.tests.problems]
    return [
        f"::{kind} file={_property(str(file))},line={problem.place.line},col={problem.place.column},"
        f"title=perch check::{_data(problem.what)}"
        for kind, file, problem in found
    ]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

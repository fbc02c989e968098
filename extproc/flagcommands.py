"""The commands about flag files: check, explain, plan, schema. Each is a few lines over the module that does it."""
# ruff: noqa: FBT002, PLR0913, PLR0917  a command's options are its interface, and this is how typer takes them
# ruff: noqa: PLC0415  a command imports what it needs: `perch --help` should not wait for all of it

import sys
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from extproc.options import Flags, Json, Models, State, fail, load_prefixes, settings_with
from extproc.settings import Settings

MOVES_BACK = 3
"""Exit code of a plan by which somebody moves from canary to stable."""


class Format(StrEnum):
    """How `check` says what it found."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"


def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Flag files [default: flags/flags.yaml].")] = None,
    models: Models = None,
    state: State = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    tests: Annotated[bool, typer.Option("--tests", help="Run the tests.yaml beside the flag file.")] = False,
    tests_file: Annotated[Path | None, typer.Option(help="Run this file of tests.")] = None,
    how: Annotated[Format, typer.Option("--format", help="For people, for programs, for pull requests.")] = Format.TEXT,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Say everything that is wrong with a flag file, each problem with its line. Exit 1 if there is anything.

    It is the very reader that serves: what passes here is served. Warnings are things that are allowed and probably
    not meant; they fail only with --strict.
    """
    from extproc.checking import Around, check_file

    settings = settings_with(models=models, state=state)
    prefixes = _prefixes_if_any(settings)
    today = datetime.now(UTC).date().isoformat()
    checked = []
    for file in files or [settings.flags]:
        cases = tests_file if tests_file is not None else file.with_name("tests.yaml") if tests else None
        checked.append(check_file(file, Around(models=prefixes, state=settings.state, today=today, tests=cases)))
    _tell(checked, Format.JSON if as_json else how, strict=strict)
    if not all(each.good(strict=strict) for each in checked):
        raise typer.Exit(1)


def _tell(checked: list[Any], how: Format, *, strict: bool) -> None:
    from extproc.checking import as_github, as_json, as_text

    if how is Format.JSON:
        typer.echo(as_json(checked, strict=strict))
        return
    for each in checked:
        wrong, summary = as_text(each)
        if how is Format.GITHUB:
            for line in as_github(each):
                typer.echo(line)
        else:
            for line in wrong:
                typer.echo(line, err=True)
        for line in summary:
            typer.echo(line)


def _prefixes_if_any(settings: Settings) -> dict[str, str] | None:
    """The models' prefixes; None in a repository that has flags only and names no models.yaml."""
    if "models" not in settings.model_fields_set and not settings.models.exists():
        typer.echo(f"perch: there is no {settings.models}, so models' names are not checked", err=True)
        return None
    return load_prefixes(settings)


def explain(
    flag: Annotated[str, typer.Option(help="Key of the flag.")],
    unit: Annotated[str | None, typer.Option(help="Value of the flag's first unit: a user's id.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, any number of times.")] = None,
    at: Annotated[str | None, typer.Option(help="What it would be at this percentage of the flag.")] = None,
    version: Annotated[str | None, typer.Option(help="What it was under this ruleset version.")] = None,
    flags: Flags = None,
    models: Models = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Say which arm a user gets, and why: the same decision as serve's, from the same files."""
    from extproc.core.document import FlagFileError
    from extproc.explain import ExplainError, at_percent, load, load_version
    from extproc.explain import as_json as to_json
    from extproc.explain import explain as explained
    from extproc.flagfile import Paths

    settings = settings_with(flags=flags, models=models, state=state)
    paths, prefixes, token = Paths(settings.flags, settings.state), load_prefixes(settings), settings.force_token
    percent = _percent(at)
    try:
        loaded = load(paths, prefixes, token) if version is None else load_version(paths, version, prefixes, token)
        if percent is not None:
            loaded = at_percent(loaded, flag, percent, token)
        explanation = explained(loaded, flag, unit, header or [])
    except FlagFileError as error:
        raise _problems(settings.flags, error) from None
    except ExplainError as error:
        raise fail(error, 2) from None
    if as_json:
        typer.echo(to_json(explanation))
    else:
        asked = f"at {percent} %: " if percent is not None else ""
        typer.echo(f"{asked}{explanation.sentence()}, version {explanation.version}")


def _percent(text: str | None) -> Decimal | None:
    """The percentage of `--at`, checked as the flag file's are."""
    from pydantic import TypeAdapter, ValidationError

    from extproc.core.scalars import Percent

    if text is None:
        return None
    try:
        number = Decimal(text.strip().removesuffix("%").strip())
        percent: Decimal = TypeAdapter(Percent).validate_python(number)
    except (ArithmeticError, ValidationError):
        raise fail(f"--at: a percentage is a number from 0 to 100 with up to three decimals, not {text}", 2) from None
    return percent


def _problems(file: Path, error: Any) -> typer.Exit:
    for problem in error.problems:
        typer.echo(f"{file}:{problem}", err=True)
    return typer.Exit(1)


def plan(
    new: Annotated[Path, typer.Argument(help="The flag file as it would be.")],
    flags: Annotated[Path | None, typer.Option(help="Compare with this file [default: what is served].")] = None,
    units: Annotated[Path | None, typer.Option(help="Also count these unit ids, one a line.")] = None,
    models: Models = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Show what a flag edit would do to the users, before it is served. Exit 3 if anybody moves back to stable."""
    from extproc.core.document import FlagFileError
    from extproc.flagfile import Paths
    from extproc.flagread import read_flag_file
    from extproc.planning import PlanError, as_text, make_plan, served_or
    from extproc.planning import as_json as to_json

    settings = settings_with(models=models, state=state)
    prefixes = load_prefixes(settings)
    file = new
    try:
        after = read_flag_file(new, prefixes)
        file, exposures = served_or(Paths(settings.flags, settings.state), flags)
        planned = make_plan(read_flag_file(file, None), after, exposures, prefixes, units)
    except FlagFileError as error:
        raise _problems(file, error) from None
    except PlanError as error:
        raise fail(error) from None
    if as_json:
        typer.echo(to_json(planned))
    else:
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        for line in as_text(planned, ascii_only=ascii_only):
            typer.echo(line)
    if planned.moves_back:
        raise typer.Exit(MOVES_BACK)


def schema(
    out: Annotated[
        Path | None, typer.Option(help="Where to write it, - to print it [default: beside the flag file].")
    ] = None,
) -> None:
    """Write the flag file's JSON Schema, which makes editors complete and check it."""
    from extproc.flagschema import schema_text
    from extproc.statefiles import write_atomically

    file = out if out is not None else settings_with().flags.with_name("flags.schema.json")
    if str(file) == "-":
        typer.echo(schema_text(), nl=False)
        return
    try:
        write_atomically(file, schema_text().encode())
    except OSError as error:
        raise fail(f"{file}: cannot be written: {error.strerror}") from None
    typer.echo(f"{file}: name it in the first line of the flag file: # yaml-language-server: $schema=./{file.name}")

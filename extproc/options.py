"""What the commands share: options with their help, the settings under them, and how an error is told."""
# ruff: noqa: PLC0415  a command imports what it needs: `perch --help` should not wait for all of it

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from extproc.settings import Settings

Flags = Annotated[Path | None, typer.Option(help="The flag file that people edit [default: flags/flags.yaml].")]
Models = Annotated[Path | None, typer.Option(help="The models that Envoy serves [default: envoy/models.yaml].")]
State = Annotated[Path | None, typer.Option(help="Folder of what programs write [default: state].")]
Workers = Annotated[int | None, typer.Option(help="ext_proc processes, one socket each [default: 1].")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def settings_with(**options: Any) -> Settings:
    """The environment's settings under the options that were given. Exits with 2 for a bad one."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            where = f"--{name.replace('_', '-')}" if name in given else f"PERCH_{name.upper()}"
            typer.echo(f"perch: {where}: {problem['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None


def fail(error: object, code: int = 1) -> typer.Exit:
    """Prints the one line and gives what to raise."""
    typer.echo(f"perch: {error}", err=True)
    return typer.Exit(code)


def load_prefixes(settings: Settings) -> dict[str, str]:
    """The models' prefixes by name."""
    from extproc.app import prefixes

    return prefixes(load_models_or_exit(settings))


def load_models_or_exit(settings: Settings) -> Any:
    """The models, or exit 1 with every problem of the file."""
    from extproc.modelsfile import ModelsFileError, load_models

    try:
        return load_models(settings.models)
    except ModelsFileError as error:
        raise fail(error) from None

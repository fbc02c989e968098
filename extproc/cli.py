"""The `perch` command."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from extproc.settings import Settings

app = typer.Typer(
    name="perch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Moves users to a new model version a few at a time, behind one Envoy listener.",
    epilog="Every option can also be set as PERCH_NAME in the environment. Start with: perch up",
)


def settings_with(**options: Any) -> Settings:
    """The environment's settings with the options that were given on the command line. Exits 2 for a bad one."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            where = f"--{name.replace('_', '-')}" if name in given else f"PERCH_{name.upper()}"
            typer.echo(f"perch: {where}: {problem['msg']}", err=True)
        raise typer.Exit(2) from None


def run(role: Any) -> None:
    """Runs a role to its end; an error that a person can mend is one line and exit 1."""
    from extproc.app import StartError
    from extproc.modelsfile import ModelsFileError

    try:
        asyncio.run(role)
    except (StartError, ModelsFileError) as error:
        typer.echo(f"perch: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def serve(
    listen: Annotated[str | None, typer.Option(help="unix:PATH or HOST:PORT")] = None,
    flags: Annotated[Path | None, typer.Option(help="the flag file")] = None,
    models: Annotated[Path | None, typer.Option(help="the models file")] = None,
    state: Annotated[Path | None, typer.Option(help="the state folder")] = None,
    workers: Annotated[int | None, typer.Option(help="worker processes, one address each")] = None,
) -> None:
    """Answer Envoy: the external processor alone."""
    from extproc.serve import serve as role

    run(role(settings_with(listen=listen, flags=flags, models=models, state=state, workers=workers)))


@app.command(hidden=True)
def serve_worker(listen: str) -> None:
    """One worker of `serve --workers N`, started by it."""
    from extproc.serve import serve_worker as role

    run(role(listen))


def main() -> None:
    """The entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)

"""The `perch` command: options in, one role or one answer out. What a command says is in its docstring."""

import asyncio
import json
import sys
from collections.abc import Coroutine
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
    rich_markup_mode=None,
    help="Moves users to a new model version a few at a time, behind one Envoy listener.",
    epilog="Start with `perch up`. Options may also be set as PERCH_FLAGS, PERCH_STATE, ... in the environment.",
)
envoy = typer.Typer(no_args_is_help=True, help="Envoy's configuration, rendered from models.yaml and the settings.")
app.add_typer(envoy, name="envoy")

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
            typer.echo(f"perch: {where}: {problem['msg']}", err=True)
        raise typer.Exit(2) from None


def fail(error: object, code: int = 1) -> typer.Exit:
    """Prints the one line and gives what to raise."""
    typer.echo(f"perch: {error}", err=True)
    return typer.Exit(code)


def run(role: Coroutine[Any, Any, None]) -> None:
    """Runs a role to its end. An error that a person can mend is one line and exit 1."""
    from extproc.app import StartError
    from extproc.envoyfile import EnvoyFileError
    from extproc.modelsfile import ModelsFileError

    try:
        asyncio.run(role)
    except (StartError, ModelsFileError, EnvoyFileError) as error:
        raise fail(error) from None


@app.command()
def up(  # noqa: PLR0913  the options are the interface
    port: Annotated[int, typer.Option(help="Where clients send requests.")] = 10000,
    control_port: Annotated[int, typer.Option(help="The control API.")] = 8900,
    admin: Annotated[int, typer.Option(help="Envoy's admin interface.")] = 9901,
    flags: Flags = None,
    models: Models = None,
    state: State = None,
    stable: Annotated[Path | None, typer.Option(help="Artifacts that the stable servers load.")] = None,
    canary: Annotated[Path | None, typer.Option(help="Artifacts that the canary servers load.")] = None,
    workers: Workers = None,
) -> None:
    """Run everything on this machine: Envoy, ext_proc, control and the model servers. Ctrl-C stops all of it."""
    from extproc.show import Screen
    from extproc.up import Options
    from extproc.up import up as role

    options = Options(port=port, control_port=control_port, admin_port=admin, stable=stable, canary=canary)
    screen = Screen()
    settings = settings_with(flags=flags, models=models, state=state, workers=workers)
    run(role(settings, options, screen.say, screen.ready))


@app.command()
def serve(
    listen: Annotated[str | None, typer.Option(help="unix:PATH or HOST:PORT; workers add .0, .1, ...")] = None,
    flags: Flags = None,
    models: Models = None,
    state: State = None,
    workers: Workers = None,
) -> None:
    """Answer Envoy: the external processor alone."""
    from extproc.serve import serve as role

    run(role(settings_with(listen=listen, flags=flags, models=models, state=state, workers=workers)))


@app.command(hidden=True)
def serve_worker(listen: str) -> None:
    """One worker of `serve --workers N`, which starts it."""
    from extproc.serve import serve_worker as role

    run(role(listen))


@app.command()
def control(
    listen: Annotated[str | None, typer.Option(help="The API: HOST:PORT or unix:PATH.")] = None,
    flags: Flags = None,
    models: Models = None,
    state: State = None,
) -> None:
    """Watch what Envoy sees, keep the warm gate, answer the control API."""
    from extproc.control import control as role

    run(role(settings_with(control_listen=listen, flags=flags, models=models, state=state)))


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="The flag file [default: flags/flags.yaml].")] = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Say everything that is wrong with a flag file, each problem with its line. Exit 1 if there is anything.

    It is the very reader that serves: what passes here is served.
    """
    from extproc.core.document import FlagFileError
    from extproc.explain import read_flags

    settings = settings_with(flags=file, models=models)
    name, served = settings.flags, load_prefixes(settings)
    try:
        _, found = read_flags(name, served)
    except FlagFileError as error:
        problems = error.problems
    else:
        problems = ()
    if as_json:
        rows = [
            {"file": str(name), "line": p.place.line, "column": p.place.column, "path": p.path, "message": p.message}
            for p in problems
        ]
        typer.echo(json.dumps({"ok": not problems, "problems": rows}, indent=1))
    elif problems:
        for problem in problems:
            typer.echo(f"{name}:{problem}", err=True)
    else:
        typer.echo(f"{name}: good, {len(found)} flag{'s' if len(found) != 1 else ''}")
    if problems:
        raise typer.Exit(1)


@app.command()
def explain(  # noqa: PLR0913  the options are the interface
    flag: Annotated[str, typer.Option(help="Key of the flag.")],
    unit: Annotated[str | None, typer.Option(help="Value of the flag's first unit: a user's id.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, any number of times.")] = None,
    flags: Flags = None,
    models: Models = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Say which arm a user gets, and why: the same decision as serve's, from the same files."""
    from extproc.core.document import FlagFileError
    from extproc.explain import ExplainError, load
    from extproc.explain import as_json as to_json
    from extproc.explain import explain as explained
    from extproc.flagfile import Paths

    settings = settings_with(flags=flags, models=models, state=state)
    try:
        loaded = load(Paths(settings.flags, settings.state), load_prefixes(settings), settings.force_token)
        explanation = explained(loaded, flag, unit, header or [])
    except FlagFileError as error:
        for problem in error.problems:
            typer.echo(f"{settings.flags}:{problem}", err=True)
        raise typer.Exit(1) from None
    except ExplainError as error:
        raise fail(error, 2) from None
    typer.echo(to_json(explanation) if as_json else f"{explanation.sentence()}, version {explanation.version}")


@app.command()
def status(
    control_port: Annotated[int | None, typer.Option(help="Port of the control API on this machine.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is served: each flag with its percentage, whether it is held, and what Envoy had to let pass."""
    from extproc.show import StatusError, show_status

    listen = f"127.0.0.1:{control_port}" if control_port is not None else None
    settings = settings_with(control_listen=listen)
    try:
        asyncio.run(show_status(settings.control_listen, watch=watch, as_json=as_json))
    except StatusError as error:
        raise fail(error) from None


Out = Annotated[Path, typer.Option(help="Folder to write to.")]


@envoy.command("render")
def envoy_render(out: Out = Path("envoy-files"), models: Models = None, flags: Flags = None) -> None:
    """Write Envoy's files: a bootstrap and the resources that it watches."""
    from extproc.envoyfile import EnvoyFileError, write

    settings = settings_with(models=models, flags=flags)
    try:
        changed = write(out, rendered(settings, out))
    except EnvoyFileError as error:
        raise fail(error) from None
    for name in changed:
        typer.echo(out / name)
    typer.echo(f"start it with: envoy -c {out / 'bootstrap.yaml'}" if changed else f"{out}: nothing changed")


@envoy.command("validate")
def envoy_validate(models: Models = None, flags: Flags = None) -> None:
    """Ask the real Envoy whether it takes what would be rendered."""
    from extproc.envoyfile import EnvoyFileError, validate

    settings = settings_with(models=models, flags=flags)
    try:
        asyncio.run(validate(rendered(settings, Path("envoy-files"))))
    except EnvoyFileError as error:
        raise fail(error) from None
    typer.echo(f"Envoy takes it: {settings.models}")


def rendered(settings: Settings, out: Path) -> dict[str, str]:
    """Envoy's files, with the headers forwarded that the flag file names, if it can be read."""
    from extproc.app import envoy_settings, prefixes
    from extproc.core.document import FlagFileError
    from extproc.core.ruleset import headers_of
    from extproc.envoyfile import forwarded_headers, render
    from extproc.explain import read_flags

    models = load_models_or_exit(settings)
    try:
        _, flags = read_flags(settings.flags, prefixes(models))
    except FlagFileError as error:
        typer.echo(f"perch: {settings.flags}:{error.problems[0]}; only the default headers are forwarded", err=True)
        flags = ()
    names = forwarded_headers(name for flag in flags for name in headers_of(flag))
    return render(models, envoy_settings(settings.model_copy(update={"xds": out.absolute()})), names)


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


def main() -> None:
    """The entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)

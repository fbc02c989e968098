"""The `perch` command: options in, one role or one answer out. What a command says is in its docstring."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from extproc.bench.command import bench
from extproc.flagcommands import check, explain, plan, schema
from extproc.options import Flags, Json, Models, State, Workers, fail, load_models_or_exit, settings_with
from extproc.settings import Settings
from extproc.traffic.command import traffic

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


def run(role: Coroutine[Any, Any, None], transport: str | None = None) -> None:
    """Runs a role to its end, on the loop that suits the transport. An error that a person can mend is one line."""
    from extproc.app import StartError, loop_for
    from extproc.envoyfile import EnvoyFileError
    from extproc.modelsfile import ModelsFileError

    try:
        with asyncio.Runner(loop_factory=loop_for(transport) if transport else None) as runner:
            runner.run(role)
    except (StartError, ModelsFileError, EnvoyFileError) as error:
        raise fail(error) from None


@app.command()
def up(
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
    transport: Annotated[str | None, typer.Option(help="fast, or grpcio as reference [default: fast].")] = None,
) -> None:
    """Answer Envoy: the external processor alone."""
    from extproc.serve import serve as role

    settings = settings_with(
        listen=listen, flags=flags, models=models, state=state, workers=workers, transport=transport
    )
    run(role(settings), settings.transport)


@app.command(hidden=True)
def serve_worker(listen: str, transport: str = "fast") -> None:
    """One worker of `serve --workers N`, which starts it."""
    from extproc.serve import serve_worker as role

    run(role(listen), transport)


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


app.command()(check)
app.command()(explain)
app.command()(plan)
app.command()(schema)
app.command()(bench)
app.command()(traffic)


@app.command()
def status(
    control_port: Annotated[int | None, typer.Option(help="Port of the control API on this machine.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until Ctrl-C: a screen, or in a pipe each look.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is served and what each cohort got.

    First whether the system is ready, what Envoy let pass without perch (failed open), and alerts: a flag file that is
    refused, state that cannot be written, requests that are missing or went elsewhere, one unit that makes up too much.

    Then for each flag: the percentage that is served, what is asked for if that is more, and whether it is held or
    off; its ready servers and the version of the ruleset. For each cohort: requests, their share, those that fell back
    to stable, and of the last minute, or of all where that was quiet, requests per second, errors and latencies. Below:
    what the cohorts predict, the model versions that answered, drift between them, the means of reported values with
    their number, and Envoy's log held against the decisions.
    """
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


@envoy.command("run")
def envoy_run() -> None:
    """Run Envoy in this process, on the files that control keeps in PERCH_XDS. Waits a minute for them."""
    import os

    from extproc.app import envoy_settings
    from extproc.envoyfile import EnvoyFileError, await_files, envoy_command

    settings = settings_with()
    if settings.xds is None:
        raise fail("PERCH_XDS is not set; write the folder of Envoy's files", 2)
    try:
        await_files(settings.xds, within_s=60)
        command = envoy_command(envoy_settings(settings))
    except EnvoyFileError as error:
        raise fail(error) from None
    os.execv(command[0], command)  # noqa: S606  signals then reach Envoy itself


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


def main() -> None:
    """The entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)

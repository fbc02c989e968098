"""The whole system for end-to-end tests: the real `perch up`, with everything it starts, and clients in front of it."""

import contextlib
import importlib.util
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ports import free_ports

SALT = "digits-2026-11"
NUMBERS = itertools.count()


def sibling(name: str) -> ModuleType:
    """A module beside this file. Test folders are no packages, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"perch_e2e_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


systems, clients, witnesses = sibling("system"), sibling("client"), sibling("witness")
LIVE: list[Any] = []
"""What runs now, for the report of a test that fails."""


def flag_file(**flags: Any) -> str:
    """The text of a flag file. A number is a percentage under the shipped salt; a mapping is the flag as it is.

    No two texts are equal, so that it can be told when one is served.
    """
    full = {key: flag if isinstance(flag, dict) else {"salt": SALT, "canary": flag} for key, flag in flags.items()}
    return json.dumps({"version": 1, "flags": full}) + f"\n# {next(NUMBERS)}\n"


def digits(name: str = "digits", **more: Any) -> dict[str, Any]:
    """An entry of models.yaml: two servers per arm, with the shipped artifacts."""
    entry: dict[str, Any] = {arm: [f"unix:{name}-{arm}-{n}.sock" for n in (0, 1)] for arm in ("stable", "canary")}
    entry["artifacts"] = {"stable": str(clients.ARTIFACTS / "1"), "canary": str(clients.ARTIFACTS / "2")}
    return {name: {"prefix": f"/v2/models/{name}/"} | entry | more}


@contextlib.contextmanager
def running(
    models: dict[str, Any] | None = None, flags: str | None = None, *, start: bool = True, **more: Any
) -> Iterator[Any]:
    """A system that runs while inside, and of which nothing is left afterwards. `more` is as for System."""
    with folder() as place:
        system = systems.System(place, **more)
        system.configure(models or digits(), flags or flag_file(digits=5))
        LIVE.append(system)
        try:
            if start:
                system.start()
            yield system
            if system.process is not None:
                system.stop()
                system.assert_nothing_left()
        finally:
            if system.runs:
                system.stop(signal.SIGKILL)
            LIVE.remove(system)


@contextlib.contextmanager
def standing_in(path: Path, arm: str) -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in for a model server at a socket, as standin.py describes it."""
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("standin.py")), str(path), arm]
    with subprocess.Popen(program) as process:
        try:
            systems.until(lambda: path.exists() or process.poll() is not None, f"the stand-in at {path}")
            yield process
        finally:
            process.kill()
            path.unlink(missing_ok=True)


def stood_in(place: Path, name: str) -> dict[str, Any]:
    """An entry of models.yaml for one stand-in per arm, at sockets in `place`."""
    entry = {arm: [f"unix:{place}/{name}-{arm}.sock"] for arm in ("stable", "canary")}
    return {name: {"prefix": f"/v2/models/{name}/"} | entry}


@contextlib.contextmanager
def witnessed(flags: dict[str, Any], deadline_s: float = 15.0) -> Iterator[tuple[Any, Any]]:
    """A system with these flags (as in witness.py), a model for each, and the obedient servers of both arms."""
    text = flag_file(**{name: flag.plain(name) for name, flag in flags.items()})
    environment = {"PERCH_FORCE_TOKEN": witnesses.TOKEN}
    with folder() as place, witnesses.Servers(place) as servers:
        models = witnesses.models(place, flags, deadline_s)
        with running(models, text, environment=environment) as system:
            yield system, servers


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own, whose path is short enough for sockets; pytest's are not."""
    place = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What tests of this folder share, since modules of tests are not to be imported."""
    shared = (running, witnessed, folder, standing_in, stood_in, flag_file, digits)
    others = (clients.client_of, clients.inference, systems.until, free_ports)
    return SimpleNamespace(**{one.__name__: one for one in (*shared, *others)}, salt=SALT, witness=witnesses)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Adds the logs of what ran to the report of a test that failed."""
    report = yield
    if report.failed:
        report.sections.extend((f"system in {system.folder}", system.report()) for system in LIVE)
    return report

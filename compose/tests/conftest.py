"""One system in containers for all tests of this folder: each test leaves it settled."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def sibling(name: str) -> ModuleType:
    """A module beside this file. Test folders are no packages, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"perch_compose_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stacks = sibling("stack")
LIVE: list[Any] = []
"""What runs now, for the report of a test that fails."""


@pytest.fixture(scope="session")
def stack_module() -> ModuleType:
    """What tests of this folder share, since modules of tests are not to be imported."""
    return stacks


@pytest.fixture(scope="session")
def tools() -> dict[str, str]:
    """Podman's settings, the programs and the images, as engine.sh printed them for `make test-compose`."""
    where = os.environ.get("PERCH_TEST_ENGINE")
    assert where, "run these tests with: make test-compose"
    return dict(line.split("=", 1) for line in Path(where).read_text().splitlines())


@pytest.fixture(scope="session")
def engine(tools: dict[str, str]) -> Iterator[dict[str, str]]:
    """The tools, with podman's API running for Docker Compose."""
    socket = Path(tools["RUN"]) / "podman.sock"
    socket.unlink(missing_ok=True)
    command = ("podman", "system", "service", "--time=0", f"unix://{socket}")
    with (Path(tools["RUN"]) / "service.log").open("wb") as log:
        service = subprocess.Popen(command, env=os.environ | tools, stdout=log, stderr=log)
        try:
            stacks.until(socket.exists, "podman's API")
            yield tools
        finally:
            service.terminate()
            service.wait(30)
            # Podman leaves its storage mounted on itself, and nobody could delete the folder.
            subprocess.run(("umount", tools["STORAGE"]), capture_output=True, timeout=30, check=False)


@pytest.fixture(scope="session")
def unstarted(tools: dict[str, str]) -> Callable[..., str]:
    """Docker Compose without an engine, and without any setting but those given."""

    def run(*command: str, check: bool = True, **settings: str) -> str:
        done = subprocess.run(
            (tools["COMPOSE"], *command), env=settings, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode == 0) == check, done.stderr
        return done.stdout + ("" if check else done.stderr)

    return run


@pytest.fixture(scope="session")
def promtool(tools: dict[str, str]) -> Callable[..., str]:
    """Prometheus' own judge of its files."""

    def run(*command: Any) -> str:
        done = subprocess.run(
            (tools["PROMTOOL"], *map(str, command)), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def stack(engine: dict[str, str]) -> Iterator[Any]:
    """The system, up; gone afterwards with its volumes."""
    folder = Path(tempfile.mkdtemp(prefix="perch-compose-"))
    system = stacks.Stack(engine, folder)
    LIVE.append(system)
    try:
        system.compose("down", "--volumes", "--timeout", "1")  # of a run that was killed
        system.up()
        yield system
    finally:
        LIVE.remove(system)
        system.compose("down", "--volumes", "--timeout", "2", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Adds the logs of what ran to the report of a test that failed."""
    report = yield
    if report.failed:
        report.sections.extend((f"containers of {system.project}", system.report()) for system in LIVE)
    return report

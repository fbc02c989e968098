"""One system in containers for all tests of this folder: each test leaves it settled."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
def engine() -> Iterator[dict[str, str]]:
    """Podman's settings, Docker Compose and the image, as engine.sh printed them for `make test-compose`."""
    where = os.environ.get("PERCH_TEST_ENGINE")
    assert where, "run these tests with: make test-compose"
    lines = Path(where).read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    socket = Path(found["RUN"]) / "podman.sock"
    socket.unlink(missing_ok=True)
    environment = os.environ | found
    with (Path(found["RUN"]) / "service.log").open("wb") as log:
        service = subprocess.Popen(
            ("podman", "system", "service", "--time=0", f"unix://{socket}"), env=environment, stdout=log, stderr=log
        )
        try:
            stacks.until(socket.exists, "podman's API")
            yield found
        finally:
            service.terminate()
            service.wait(30)


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

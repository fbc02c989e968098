"""Puts rendered files where a live Envoy watches them: atomically, and never a route before its cluster."""

import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from extproc.envoyfile.output import to_resources
from extproc.envoyfile.settings import EnvoyFileError
from extproc.envoyfile.template import Tree
from extproc.statefiles import write_atomically

WRITE_ORDER = ("bootstrap.yaml", "cds.yaml", "rtds.yaml", "ecds.yaml", "rds.yaml", "lds.yaml")
"""Clusters before the routes that name them, routes before the listener that asks for them."""


def write(directory: Path, files: Mapping[str, str]) -> tuple[str, ...]:
    """Replaces what differs, each file by temp file, fsync and rename; returns the names that changed.

    A cluster that goes away stays listed until the routes have been replaced. `bootstrap.yaml` among the changed means
    that Envoy must be restarted to see it. Raises EnvoyFileError where the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        changed = [name for name in _ordered(files) if _read(directory / name) != files[name]]
        leaving = _leaving_clusters(directory, files) if "cds.yaml" in changed else []
        for name in changed:
            _replace(directory / name, _with_clusters(files[name], leaving) if name == "cds.yaml" else files[name])
        if leaving:
            _replace(directory / "cds.yaml", files["cds.yaml"])
        return tuple(changed)
    except OSError as problem:
        raise EnvoyFileError(f"cannot write {problem.filename or directory}: {problem.strerror}") from None


def await_files(directory: Path, within_s: float) -> None:
    """Returns once all files are there, for an Envoy that may be started before `control` has written them.

    Raises EnvoyFileError after `within_s` seconds.
    """
    end_s = time.monotonic() + within_s
    while missing := [name for name in WRITE_ORDER if not (directory / name).is_file()]:
        if time.monotonic() > end_s:
            raise EnvoyFileError(f"{directory / missing[0]} is not there after {within_s:g} s; is control running?")
        time.sleep(0.1)


def _ordered(files: Mapping[str, str]) -> list[str]:
    return sorted(files, key=lambda name: (WRITE_ORDER.index(name) if name in WRITE_ORDER else len(WRITE_ORDER), name))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _leaving_clusters(directory: Path, files: Mapping[str, str]) -> list[Tree]:
    """Clusters of the present cds.yaml that the new one no longer has; none if the present one is unreadable."""
    try:
        before = yaml.load(_read(directory / "cds.yaml") or "", Loader=yaml.CSafeLoader)["resources"]
        kept = {cluster["name"] for cluster in yaml.load(files["cds.yaml"], Loader=yaml.CSafeLoader)["resources"]}
        return [cluster for cluster in before if cluster["name"] not in kept]
    except (yaml.YAMLError, TypeError, KeyError):
        return []


def _with_clusters(text: str, leaving: list[Tree]) -> str:
    if not leaving:
        return text
    resources = yaml.load(text, Loader=yaml.CSafeLoader)["resources"]
    return to_resources([*resources, *leaving], "two versions of models.yaml, until the routes have changed")


def _replace(path: Path, text: str) -> None:
    # Envoy's watch sees only renames in the folder, so the scratch file beside it stays unnoticed.
    write_atomically(path, text.encode())

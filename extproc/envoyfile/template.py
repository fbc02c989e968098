"""The small template language of `envoy/*.yaml`. Substitutes in the parsed tree, never in text.

A template is plain YAML, so an editor and a reviewer can read it, and a value can never break out of its place:

- a scalar that is exactly `$(name)` becomes the value itself, of whatever type; inside a longer text, its text;
- in a list, a value that is a list is spliced in, and `None` is left out; a key whose value is `None` is left out;
- a mapping with `$if: name` is left out as a whole where that value is false.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from extproc.envoyfile.settings import EnvoyFileError

Tree = Any
"""What YAML holds: mappings, lists, scalars."""

_NAME = re.compile(r"\$\(([a-z_]+)\)")


def template_folder() -> Path:
    """Folder of the templates and the shipped models.yaml: in the installed package, else in the checkout."""
    # Beside model_servers in both, so that the paths in models.yaml mean the same.
    beside = Path(__file__).resolve().parents[2]
    for folder in (beside / "extproc_envoy", beside / "envoy"):
        if (folder / "bootstrap.yaml").is_file():
            return folder
    raise EnvoyFileError(f"Envoy's templates are missing: neither extproc_envoy nor envoy is in {beside}")


def load_template(name: str) -> Tree:
    """Parsed template `name` (for example `routes.yaml`), not yet filled in."""
    path = template_folder() / name
    try:
        return yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except (OSError, yaml.YAMLError) as problem:
        raise EnvoyFileError(f"{path}: {' '.join(str(problem).split())}") from None


def fill(tree: Tree, values: Mapping[str, Tree]) -> Tree:
    """`tree` with every `$(name)` and `$if` resolved; raises EnvoyFileError for a name not in `values`."""
    match tree:
        case dict():
            if "$if" in tree and not _value(tree["$if"], values):
                return None
            filled = {key: fill(value, values) for key, value in tree.items() if key != "$if"}
            return {key: value for key, value in filled.items() if value is not None}
        case list():
            return [part for item in tree for part in _parts(fill(item, values), spliced=isinstance(item, str))]
        case str():
            return _fill_text(tree, values)
        case _:
            return tree


def _parts(value: Tree, *, spliced: bool) -> list[Tree]:
    if value is None:
        return []
    return value if spliced and isinstance(value, list) else [value]


def _fill_text(text: str, values: Mapping[str, Tree]) -> Tree:
    whole = _NAME.fullmatch(text)
    if whole:
        return _value(whole[1], values)
    return _NAME.sub(lambda found: str(_value(found[1], values)), text)


def _value(name: str, values: Mapping[str, Tree]) -> Tree:
    try:
        return values[name]
    except KeyError:
        raise EnvoyFileError(f"a template asks for $({name}), which perch does not set") from None

"""The Python backend: a model of one's own, loaded from a file of the version directory.

The manifest says `"backend": "python"` and `"options": {"entry": "model.py:load"}`, and names model.py with its sha256
among `files`, as everything else the model reads. `load(directory)` gets the version directory as a `pathlib.Path` and
returns the model: a callable from a dict of numpy arrays (input name: array, first axis rows) to a dict of numpy arrays
(output name: array, as many rows). With `"parameters": true` in the options it also gets the request's parameters as
a second argument, and only requests with equal parameters share a call. It may raise `model_servers.errors.Refused` for
input it cannot take (400 to that client); anything else it raises is a 500 to the client and a line in the log.

The file is code and runs with the rights of the server: put only your own into a version directory.
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, read_verified
from model_servers.tensors import Tensor


def load(directory: Path, manifest: Manifest) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]:
    """The callable that the entry returns. Raises ArtifactError, with the entry's own error in the sentence."""
    entry = manifest.options.get("entry")
    file, _, name = entry.partition(":") if isinstance(entry, str) else ("", "", "")
    if not file or not name:
        raise ArtifactError(f'{directory}: backend python needs options {{"entry": "model.py:load"}}, not {entry!r}')
    for listed in manifest.files:
        read_verified(directory, manifest, listed)
    source = read_verified(directory, manifest, file)
    try:
        made = _run(directory / file, source, name)(directory)
    except Exception as error:
        raise ArtifactError(f"{directory / file}: {name} failed: {error!r}") from error
    if not callable(made):
        raise ArtifactError(f"{directory / file}: {name} returned {type(made).__name__}, not a callable")
    if manifest.options.get("parameters") is True:
        return made  # type: ignore[no-any-return]  # the owner's callable; its answers are checked on every call

    def predict(inputs: Mapping[str, Tensor], _parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = made(dict(inputs))
        return outputs

    return predict


def _run(path: Path, source: bytes, name: str) -> Callable[[Path], Any]:
    """Runs exactly the bytes whose hash was compared, as a module of its own, and returns its attribute `name`."""
    spec = importlib.util.spec_from_loader(f"perch_model_{abs(hash(source)):x}", loader=None, origin=str(path))
    assert spec is not None  # noqa: S101  spec_from_loader only returns None when it must guess from the loader
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102  the owner's own code is what this is for
    entry: Callable[[Path], Any] = getattr(module, name)
    return entry

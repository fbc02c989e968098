"""A version directory on disk: manifest.json and the files it names, each with its sha256.

Reads and writes files; knows nothing of HTTP. Arrays are stored as `.npz` and read with pickle switched off, so that
loading a model never runs code from the file.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from model_servers.errors import ArtifactError
from model_servers.tensors import DATATYPES, Tensor, TensorSpec, Wanted

MANIFEST = "manifest.json"
ARRAYS = "model.npz"
FORMAT = 1
LARGEST_FILE_BYTES = 2 << 30  # a file above this is refused before it is read


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a version directory says about itself. `prediction` names the output that feeds x-model-prediction."""

    name: str
    version: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    prediction: str
    examples: Mapping[str, list[Any]] = field(default_factory=dict)  # input name: rows (or, unbatched, the tensor)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # file name: sha256 in hex
    options: Mapping[str, Any] = field(default_factory=dict)  # the backend's own
    inputs_by_name: Mapping[str, TensorSpec] = field(init=False, repr=False)
    outputs_by_name: Mapping[str, TensorSpec] = field(init=False, repr=False)
    every_output: Mapping[bool, tuple[Wanted, ...]] = field(init=False, repr=False)  # by "as raw bytes"
    matrix: TensorSpec | None = field(init=False, repr=False)  # the only input, if it is rows of floats of one width
    batched: bool = field(init=False)  # the first axis of every tensor is rows: requests may share one call
    fixed: bool = field(init=False)  # behind the rows every size of the inputs is given

    def __post_init__(self) -> None:
        """Fills in what every request needs and the document only implies."""
        specs = (*self.inputs, *self.outputs)
        object.__setattr__(self, "inputs_by_name", {spec.name: spec for spec in self.inputs})
        object.__setattr__(self, "outputs_by_name", {spec.name: spec for spec in self.outputs})
        every = {binary: tuple(Wanted(spec, binary) for spec in self.outputs) for binary in (False, True)}
        object.__setattr__(self, "every_output", every)
        only = self.inputs[0] if len(self.inputs) == 1 else None
        plain = only is not None and len(only.shape) == 2 and only.shape[0] == -1 and only.datatype.startswith("FP")
        object.__setattr__(self, "matrix", only if plain and only is not None and only.shape[1] != -1 else None)
        object.__setattr__(self, "batched", all(spec.shape[0] == -1 for spec in specs))
        object.__setattr__(self, "fixed", all(-1 not in spec.shape[1:] for spec in self.inputs))


def packed(arrays: Mapping[str, Tensor]) -> bytes:
    """The arrays as the bytes of an `.npz`; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(arrays))
    return buffer.getvalue()


def write_artifact(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Writes the files, then manifest.json with their hashes; returns that manifest.

    The manifest goes last and by rename, so a server that watches the folder never sees a version half written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, blob in files.items():
        (directory / name).write_bytes(blob)
    hashed = replace(manifest, files={name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()})
    text = json.dumps(_document(hashed), indent=1, ensure_ascii=False)
    unfinished = directory / f".{MANIFEST}.new"
    unfinished.write_text(_short_rows(text) + "\n", encoding="utf-8")
    unfinished.replace(directory / MANIFEST)
    return hashed


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a version directory. Raises ArtifactError, naming the file and the field that is wrong."""
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not found; a version directory holds {MANIFEST} and the files it names") from None
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    try:
        return _manifest(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{path}: {reason}") from None


def read_verified(directory: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file that the manifest names, after its sha256 was compared."""
    path = directory / name
    expected = manifest.files.get(name)
    if expected is None:
        raise ArtifactError(f"{directory / MANIFEST}: files does not name {name}")
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ArtifactError(f"{path}: larger than {LARGEST_FILE_BYTES >> 30} GiB")
        blob = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    found = hashlib.sha256(blob).hexdigest()
    if found != expected:
        raise ArtifactError(f"{path}: sha256 is {found}, the manifest says {expected}; copy the version again")
    return blob


def read_arrays(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The arrays of model.npz, verified, without pickle."""
    blob = read_verified(directory, manifest, ARRAYS)
    try:
        with np.load(io.BytesIO(blob), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # noqa: BLE001  zipfile, zlib and numpy raise many kinds for a corrupt archive
        raise ArtifactError(f"{directory / ARRAYS}: not a readable .npz: {error}") from None


def _manifest(document: Any) -> Manifest:
    if document["format"] != FORMAT:
        raise ValueError(f"format is {document['format']!r}; this server reads format {FORMAT}")
    inputs, outputs = _specs(document, "inputs"), _specs(document, "outputs")
    prediction = document.get("prediction", outputs[0].name)
    if prediction not in {spec.name for spec in outputs}:
        raise ValueError(f"prediction names {prediction!r}, which is no output")
    return Manifest(
        name=_word(document, "name"),
        version=_word(document, "version"),
        backend=_word(document, "backend"),
        inputs=inputs,
        outputs=outputs,
        prediction=prediction,
        examples=dict(document.get("examples", {})),
        metrics=dict(document.get("metrics", {})),
        files=dict(document.get("files", {})),
        options=dict(document.get("options", {})),
    )


def _specs(document: Any, key: str) -> tuple[TensorSpec, ...]:
    specs = tuple(_spec(entry) for entry in document[key])
    if not specs or len({spec.name for spec in specs}) != len(specs):
        raise ValueError(f"{key} must list at least one tensor, each name once")
    return specs


def _word(document: Any, key: str) -> str:
    """A name that is safe in a path, a header and a metric tag."""
    word = document[key]
    if not isinstance(word, str) or not word or not all(c.isascii() and (c.isalnum() or c in "._-") for c in word):
        raise ValueError(f"{key} is {word!r}; use letters, digits, '.', '_' and '-'")
    return word


def _spec(entry: Any) -> TensorSpec:
    name, datatype, shape = entry["name"], entry["datatype"], entry["shape"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"tensor name {name!r} must be a word")
    if datatype not in DATATYPES:
        raise ValueError(f"tensor {name!r}: datatype {datatype!r} is none of {', '.join(DATATYPES)}")
    if not shape or not all(type(size) is int and (size == -1 or size > 0) for size in shape):
        raise ValueError(f"tensor {name!r}: shape {shape!r} must list positive sizes or -1, rows first")
    return TensorSpec(name, datatype, tuple(shape))


def _document(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": manifest.name,
        "version": manifest.version,
        "backend": manifest.backend,
        "inputs": [spec.metadata() for spec in manifest.inputs],
        "outputs": [spec.metadata() for spec in manifest.outputs],
        "prediction": manifest.prediction,
        **({"options": dict(manifest.options)} if manifest.options else {}),
        "files": dict(manifest.files),
        "metrics": dict(manifest.metrics),
        "examples": dict(manifest.examples),
    }


def _short_rows(text: str) -> str:
    """Innermost lists of numbers on one line, so that an example row of 64 pixels is one line and not 64."""
    return re.sub(
        r"\[[\s\d.,eE+-]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )

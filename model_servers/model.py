"""A model in memory: its manifest and one callable from named arrays to named arrays.

Knows nothing of HTTP, batching or metrics. The three backends, by the manifest's `backend`:

    dense-softmax   dense layers in model.npz, numpy alone
    onnx            model.onnx through onnxruntime (the extra `onnx`)
    python          a callable of one's own: options {"entry": "model.py:load", "parameters": false}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_servers import dense, onnxmodel, pythonmodel
from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, read_manifest
from model_servers.tensors import DATATYPES, Tensor, TensorSpec, all_finite, fits

Tensors = Mapping[str, Tensor]
Predict = Callable[[Tensors, Mapping[str, Any]], dict[str, Tensor]]

BACKENDS: dict[str, Callable[[Path, Manifest], Predict]] = {
    "dense-softmax": dense.load,
    "onnx": onnxmodel.load,
    "python": pythonmodel.load,
}


class BadModel(Exception):  # noqa: N818  reads as what it is
    """The model returned something else than its manifest declares; the message is for the log."""


@dataclass(frozen=True, slots=True)
class Model:
    """One loaded version. `predict` takes inputs and request parameters; `run` also checks what comes back."""

    manifest: Manifest
    predict: Predict

    def run(self, inputs: Tensors, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every declared output with its declared datatype and shape. Raises BadModel, or what the model raises."""
        found = self.predict(inputs, parameters)
        rows = len(next(iter(inputs.values()))) if self.manifest.batched else None
        return {spec.name: _conform(found.get(spec.name), spec, rows) for spec in self.manifest.outputs}


def load(directory: Path) -> Model:
    """Reads, verifies and tries a version directory. Raises ArtifactError with one sentence that names the file."""
    manifest = read_manifest(directory)
    backend = BACKENDS.get(manifest.backend)
    if backend is None:
        raise ArtifactError(f"{directory}: backend {manifest.backend!r} is none of: {', '.join(BACKENDS)}")
    model = Model(manifest, backend(directory, manifest))
    try:
        examples = example_inputs(manifest, 1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{directory}: the manifest's examples do not fit its inputs: {error}") from None
    try:
        model.run(examples, {})
    except Exception as error:
        raise ArtifactError(f"{directory}: the model fails on its own example: {error!r}") from error
    return model


def example_inputs(manifest: Manifest, rows: int) -> dict[str, Tensor]:
    """`rows` rows of warm-up input: the manifest's examples repeated, or ones where it has none."""
    return {spec.name: _example(spec, manifest.examples.get(spec.name), rows) for spec in manifest.inputs}


def _example(spec: TensorSpec, given: list[Any] | None, rows: int) -> Tensor:
    shape = [1 if size == -1 else size for size in spec.shape]
    if spec.shape[0] == -1:
        shape[0] = rows
    if not given:
        return np.full(shape, b"1" if spec.datatype == "BYTES" else 1, dtype=DATATYPES[spec.datatype])
    if spec.datatype == "BYTES":
        array = np.array(given, dtype=np.object_)
        array.ravel()[:] = [str(item).encode() for item in array.ravel()]
    else:
        array = np.asarray(given, dtype=DATATYPES[spec.datatype])
    if not fits(array.shape, spec.shape):
        raise ValueError(f"{spec.name!r} has shape {list(array.shape)}, declared is {list(spec.shape)}")
    return np.resize(array, (rows, *array.shape[1:])) if spec.shape[0] == -1 else array.copy()


def _conform(found: object, spec: TensorSpec, rows: int | None) -> Tensor:
    if not isinstance(found, np.ndarray):
        raise BadModel(f"output {spec.name!r} is {type(found).__name__}, not an array")
    shape = found.shape
    if not fits(shape, spec.shape) or (rows is not None and shape[0] != rows):
        raise BadModel(f"output {spec.name!r} has shape {list(shape)} for {rows} rows, declared is {list(spec.shape)}")
    cast = found.astype(DATATYPES[spec.datatype], copy=False)
    if cast.dtype.kind == "f" and not all_finite(cast):
        raise BadModel(f"output {spec.name!r} holds a value that is not finite")
    return cast

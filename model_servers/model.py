"""A model in memory: its manifest and one callable from named arrays to named arrays.

The callable is pure numpy and knows nothing of HTTP, batching or metrics. It gets arrays whose first axis is rows and
must return, for each declared output, an array with the same number of rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, read_arrays, read_manifest
from model_servers.tensors import DATATYPES, Tensor, TensorSpec

Tensors = Mapping[str, Tensor]
Predict = Callable[[Tensors], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Model:
    """One loaded version."""

    manifest: Manifest
    predict: Predict


def load(directory: Path) -> Model:
    """Reads and verifies a version directory. Raises ArtifactError with one sentence that names the file."""
    manifest = read_manifest(directory)
    match manifest.backend:
        case "dense-softmax":
            arrays = read_arrays(directory, manifest)
            try:
                predict = dense_softmax(arrays)
                _try_once(manifest, predict)
            except (KeyError, ValueError) as error:
                raise ArtifactError(f"{directory}: the arrays do not form a dense-softmax model: {error}") from None
            return Model(manifest, predict)
        case other:
            raise ArtifactError(f"{directory}: backend {other!r} is none of: dense-softmax")


def dense_softmax(arrays: Tensors) -> Predict:
    """Dense layers, rectified between, softmax at the end: `weight_0`, `bias_0`, `weight_1`, ...

    `weight_i` is FP32 [in, out], `bias_i` FP32 [out]. The callable maps `pixels` [n, in] to `label` INT64 [n] (the
    class with the highest probability) and `probabilities` FP32 [n, classes]. Logistic regression is one layer of it.
    """
    layers = [(arrays[f"weight_{i}"], arrays[f"bias_{i}"]) for i in range(len(arrays) // 2)]
    if not layers:
        raise ValueError("there is no weight_0 and bias_0")

    def predict(inputs: Tensors) -> dict[str, Tensor]:
        values = inputs["pixels"]
        for index, (weight, bias) in enumerate(layers):
            if index:
                np.maximum(values, 0, out=values)
            values = values @ weight
            values += bias
        values -= values.max(axis=1, keepdims=True)
        np.exp(values, out=values)
        values /= values.sum(axis=1, keepdims=True)
        return {"label": values.argmax(axis=1), "probabilities": values}

    return predict


def example_inputs(manifest: Manifest, rows: int) -> dict[str, Tensor]:
    """`rows` rows of warm-up input: the manifest's examples repeated, or ones where it has none."""
    return {spec.name: _example(spec, manifest.examples.get(spec.name), rows) for spec in manifest.inputs}


def _example(spec: TensorSpec, rows_given: list[Any] | None, rows: int) -> Tensor:
    if rows_given:
        if spec.datatype == "BYTES":
            given = np.empty(np.shape(rows_given), dtype=np.object_)
            given.ravel()[:] = [str(item).encode() for item in np.ravel(rows_given)]
        else:
            given = np.asarray(rows_given, dtype=DATATYPES[spec.datatype])
        return np.resize(given, (rows, *given.shape[1:]))
    shape = (rows, *(1 if size == -1 else size for size in spec.shape[1:]))
    return np.full(shape, b"1" if spec.datatype == "BYTES" else 1, dtype=DATATYPES[spec.datatype])


def _try_once(manifest: Manifest, predict: Predict) -> None:
    """One row through the model, so that a model that cannot answer at all ends the start."""
    outputs = predict(example_inputs(manifest, 1))
    for spec in manifest.outputs:
        found = outputs[spec.name].shape
        if len(found) != len(spec.shape) or any(a not in (-1, b) for a, b in zip(spec.shape, found, strict=True)):
            raise ValueError(f"output {spec.name!r} has shape {list(found)}, the manifest says {list(spec.shape)}")

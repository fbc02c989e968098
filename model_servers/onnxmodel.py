"""The ONNX backend: model.onnx through onnxruntime, which is only imported when a manifest asks for it."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, read_verified
from model_servers.tensors import Tensor

GRAPH = "model.onnx"


def load(directory: Path, manifest: Manifest) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]:
    """The callable for model.onnx, whose graph inputs and outputs must be named as in the manifest.

    One thread within an inference: several servers share a machine, and small models lose by more. Raises
    ArtifactError, also when onnxruntime is not installed.
    """
    graph = read_verified(directory, manifest, GRAPH)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        raise ArtifactError(f"{directory}: backend onnx needs onnxruntime: pip install 'perch[onnx]'") from None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  onnxruntime raises classes of its own, one per kind of fault
        raise ArtifactError(f"{directory / GRAPH}: onnxruntime cannot load it: {_first_line(error)}") from None
    _require_names(directory, manifest, session)
    names = [spec.name for spec in manifest.outputs]

    def predict(inputs: Mapping[str, Tensor], _parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        found = session.run(names, {name: _to_text(array) for name, array in inputs.items()})
        return dict(zip(names, found, strict=True))

    return predict


def _require_names(directory: Path, manifest: Manifest, session: Any) -> None:
    for kind, declared, graph in (
        ("inputs", manifest.inputs, session.get_inputs()),
        ("outputs", manifest.outputs, session.get_outputs()),
    ):
        missing = {spec.name for spec in declared} - {node.name for node in graph}
        if missing:
            raise ArtifactError(f"{directory / GRAPH}: the graph has no {kind} named {', '.join(sorted(missing))}")


def _to_text(array: Tensor) -> Tensor:
    """ONNX strings are text, V2 BYTES are bytes."""
    if array.dtype.kind != "O":
        return array
    text = np.empty(array.shape, dtype=np.object_)
    text.ravel()[:] = [item.decode("utf-8", "replace") for item in array.ravel()]
    return text


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)

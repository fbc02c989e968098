"""The numpy backend: dense layers with a softmax at the end."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, read_arrays
from model_servers.tensors import Tensor

PIXELS_TO_LABEL = ("label", "probabilities")


def load(directory: Path, manifest: Manifest) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]:
    """The callable for model.npz. Raises ArtifactError when its arrays form no chain of layers."""
    if len(manifest.inputs) != 1 or tuple(spec.name for spec in manifest.outputs) != PIXELS_TO_LABEL:
        raise ArtifactError(f"{directory}: dense-softmax has one input and the outputs {', '.join(PIXELS_TO_LABEL)}")
    try:
        return dense_softmax(read_arrays(directory, manifest), manifest.inputs[0].name)
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(f"{directory}: the arrays do not form dense layers: {error}") from None


def dense_softmax(
    arrays: Mapping[str, Tensor], source: str
) -> Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]:
    """Dense layers `weight_0`, `bias_0`, `weight_1`, ..., rectified between, softmax at the end.

    `weight_i` is FP32 [in, out], `bias_i` FP32 [out]. The callable maps the input named `source`, FP32 [n, in], to
    `label` INT64 [n] (the class of highest probability) and `probabilities` FP32 [n, classes]. Logistic regression is
    one layer of it. Raises KeyError for a missing array, ValueError for layers that do not fit together.
    """
    layers = [(arrays[f"weight_{i}"], arrays[f"bias_{i}"]) for i in range((len(arrays) + 1) // 2)]
    if not layers:
        raise ValueError("there is no weight_0 and bias_0")
    for (weight, bias), following in zip(layers, [*layers[1:], None], strict=True):
        if weight.ndim != 2 or bias.shape != weight.shape[1:] or (following and len(following[0]) != len(bias)):
            raise ValueError(f"a layer of {list(weight.shape)} with a bias of {list(bias.shape)} does not fit")
    (first, first_bias), *rest = layers

    def predict(inputs: Mapping[str, Tensor], _parameters: Mapping[str, Any]) -> dict[str, Tensor]:
        values = inputs[source] @ first
        values += first_bias
        for weight, bias in rest:
            values = np.maximum(values, 0, out=values) @ weight
            values += bias
        values -= values.max(axis=1, keepdims=True)  # so that exp cannot overflow
        np.exp(values, out=values)
        values /= values.sum(axis=1, keepdims=True)
        return {"label": values.argmax(axis=1), "probabilities": values}

    return predict

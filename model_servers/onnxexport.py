"""Dense layers as an ONNX graph. Needs the `onnx` package; used when artifacts are made, never when serving."""

import importlib
from collections.abc import Mapping
from typing import Any

from model_servers.tensors import Tensor

OPSET = 17  # old enough for every onnxruntime still in use


def dense_softmax_graph(arrays: Mapping[str, Tensor], source: str) -> bytes:
    """The graph of `model_servers.dense.dense_softmax` for the same arrays: same input, outputs, layers and names.

    Raises ModuleNotFoundError without `onnx`.
    """
    helper, numpy_helper = (importlib.import_module(f"onnx.{part}") for part in ("helper", "numpy_helper"))
    nodes: list[Any] = []
    values = source
    layers = len(arrays) // 2
    for index in range(layers):
        weight, bias, out = f"weight_{index}", f"bias_{index}", f"layer_{index}"
        nodes.append(helper.make_node("Gemm", [values, weight, bias], [out]))
        values = out
        if index < layers - 1:
            values = f"rectified_{index}"
            nodes.append(helper.make_node("Relu", [out], [values]))
    nodes.append(helper.make_node("Softmax", [values], ["probabilities"], axis=1))
    nodes.append(helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0))
    width, classes = len(arrays["weight_0"]), len(arrays[f"bias_{layers - 1}"])
    kinds = importlib.import_module("onnx").TensorProto
    graph = helper.make_graph(
        nodes,
        "dense_softmax",
        [helper.make_tensor_value_info(source, kinds.FLOAT, ["rows", width])],
        [
            helper.make_tensor_value_info("label", kinds.INT64, ["rows"]),
            helper.make_tensor_value_info("probabilities", kinds.FLOAT, ["rows", classes]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="perch")
    blob: bytes = model.SerializeToString(deterministic=True)
    return blob

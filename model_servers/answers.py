"""Model outputs to an HTTP answer: the V2 body, in JSON and raw bytes, and the headers that perch reads. Pure."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from model_servers import jsontext
from model_servers.manifest import Manifest
from model_servers.protocol import Inference
from model_servers.rawtensors import to_raw
from model_servers.tensors import Tensor, Wanted

PREDICTIONS_SHOWN = 32  # of one response, in x-model-prediction
LABEL_BYTES_SHOWN = 128  # of one label in it, before percent-encoding; keeps the header under 16 KiB


def write_answer(inference: Inference, outputs: Mapping[str, Tensor], manifest: Manifest) -> tuple[bytes, int | None]:
    """The body, and how many of its bytes are JSON when raw tensors follow (None: all)."""
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
    if inference.id is not None:
        answer["id"] = inference.id
    if inference.parameters:
        answer["parameters"] = inference.parameters
    raw: list[bytes] = []
    answer["outputs"] = [_write_output(wanted, outputs[wanted.spec.name], raw) for wanted in inference.wanted]
    text = jsontext.write(answer)
    return (b"".join((text, *raw)), len(text)) if raw else (text, None)


def _write_output(wanted: Wanted, array: Tensor, raw: list[bytes]) -> dict[str, Any]:
    spec = wanted.spec
    entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
    if wanted.binary:
        data = to_raw(array, spec)
        raw.append(data)
        entry["parameters"] = {"binary_data_size": len(data)}
    elif spec.datatype == "BYTES":
        entry["data"] = [_text(item) for item in array.ravel()]
    else:
        entry["data"] = array.ravel()
    return entry


def predictions_of(outputs: Mapping[str, Tensor], manifest: Manifest) -> list[Any]:
    """The values of the output that the manifest calls the prediction, in request order."""
    predictions: list[Any] = outputs[manifest.prediction].ravel().tolist()
    return predictions


def prediction_list(predictions: list[Any]) -> str:
    """The comma list of the first 32: labels percent-encoded, floats `%.6g`, integers and booleans as they are."""
    shown = predictions[:PREDICTIONS_SHOWN]
    if shown and type(shown[0]) is int:  # one array's values are all of one type
        return ",".join(map(str, shown))
    return ",".join([_shown(value) for value in shown])


def _shown(value: Any) -> str:
    kind = type(value)
    if kind is float:
        return f"{value:.6g}"
    if kind is bool:
        return "true" if value else "false"
    label = value if kind is bytes else str(value).encode("utf-8", "replace")
    return quote(label[:LABEL_BYTES_SHOWN], safe="")


def _text(item: bytes | str) -> str:
    return item if isinstance(item, str) else item.decode("utf-8", "replace")

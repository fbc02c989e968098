"""The Open Inference Protocol V2 in JSON: request bytes to arrays, arrays to response bytes and headers.

Pure: bytes in, bytes out. Everything a client can get wrong raises `Refused` with the status it is answered with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from model_servers.errors import Refused
from model_servers.manifest import Manifest
from model_servers.tensors import Tensor, TensorSpec, checked_shape, from_json, to_json

PREDICTIONS_SHOWN = 32  # of one response, in x-model-prediction


@dataclass(frozen=True, slots=True)
class Inference:
    """A read request: every declared input as an array; all with the same number of rows."""

    inputs: dict[str, Tensor]
    rows: int
    wanted: tuple[TensorSpec, ...]  # outputs, in the order the client asked for them
    id: str | None = None


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


_decode = json.JSONDecoder(parse_constant=_reject_constant).decode


def read_inference(body: bytes, manifest: Manifest) -> Inference:
    """The request in `body`. Raises Refused for everything that is not a full, well-typed request for this model."""
    try:
        document = _decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refused("the body must be a JSON object with a list of inputs")
    identity = document.get("id")
    if identity is not None and not isinstance(identity, str):
        raise Refused("id must be a string")
    inputs = _read_inputs(document.get("inputs"), manifest.inputs)
    rows = {array.shape[0] for array in inputs.values()}
    if len(rows) != 1:
        raise Refused(f"the inputs have different numbers of rows: {sorted(rows)}")
    return Inference(inputs, rows.pop(), _wanted_outputs(document.get("outputs"), manifest.outputs), identity)


def _read_inputs(entries: object, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    if not isinstance(entries, list):
        raise Refused("inputs must be a list of tensors")
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, Tensor] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        spec = by_name.get(name) if isinstance(name, str) else None
        if spec is None:
            raise Refused(f"unknown input {name!r}; this model takes {', '.join(by_name)}")
        if spec.name in found:
            raise Refused(f"input {name!r} is given twice")
        found[spec.name] = _read_input(entry, spec)
    missing = by_name.keys() - found.keys()
    if missing:
        raise Refused(f"missing input {', '.join(sorted(missing))}")
    return found


def _read_input(entry: Mapping[str, Any], spec: TensorSpec) -> Tensor:
    if entry.get("datatype") != spec.datatype:
        raise Refused(f"input {spec.name!r}: datatype is {entry.get('datatype')!r}, this model takes {spec.datatype}")
    return from_json(entry.get("data"), checked_shape(entry.get("shape"), spec), spec)


def _wanted_outputs(entries: object, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if entries is None or entries == []:
        return specs
    if not isinstance(entries, list):
        raise Refused("outputs must be a list")
    by_name = {spec.name: spec for spec in specs}
    wanted: dict[str, TensorSpec] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in by_name:
            raise Refused(f"unknown output {name!r}; this model gives {', '.join(by_name)}")
        wanted[name] = by_name[name]
    return tuple(wanted.values())


def write_answer(inference: Inference, outputs: Mapping[str, Tensor], manifest: Manifest) -> bytes:
    """The response body with the outputs that were asked for."""
    answer: dict[str, Any] = {"model_name": manifest.name, "model_version": manifest.version}
    if inference.id is not None:
        answer["id"] = inference.id
    answer["outputs"] = [_write_output(outputs[spec.name], spec) for spec in inference.wanted]
    return json.dumps(answer, separators=(",", ":")).encode()


def _write_output(array: Tensor, spec: TensorSpec) -> dict[str, Any]:
    shape = list(array.shape)
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape, "data": to_json(array, spec)}


def prediction_headers(manifest: Manifest, outputs: Mapping[str, Tensor]) -> dict[str, str]:
    """x-model-version, x-model-prediction (the first 32, in request order) and x-model-prediction-count."""
    predictions = outputs[manifest.prediction].ravel()
    return {
        "x-model-version": manifest.version,
        "x-model-prediction": prediction_list(predictions[:PREDICTIONS_SHOWN]),
        "x-model-prediction-count": str(predictions.size),
    }


def prediction_list(predictions: Tensor) -> str:
    """The comma list: labels percent-encoded, floats `%.6g`, integers and booleans as they are."""
    match predictions.dtype.kind:
        case "f":
            return ",".join(f"{value:.6g}" for value in predictions.tolist())
        case "O":
            return ",".join(quote(value, safe="") for value in predictions.tolist())
        case "b":
            return ",".join("true" if value else "false" for value in predictions.tolist())
        case _:
            return ",".join(map(str, predictions.tolist()))

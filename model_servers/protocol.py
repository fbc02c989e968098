"""An Open Inference Protocol V2 request: body bytes to arrays.

Pure. Everything a client can get wrong raises `Refused` with a sentence and the status it is answered with.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from model_servers import jsontext
from model_servers.errors import Refused
from model_servers.floatmatrix import read_float_matrix
from model_servers.manifest import Manifest
from model_servers.rawtensors import from_raw
from model_servers.tensors import DATATYPES, Tensor, TensorSpec, Wanted, checked_shape, from_json, in_range

_OURS = frozenset({"binary_data_output", "timeout"})  # request parameters that the protocol uses up
_SHOWN = 80  # characters of a client's value that an error repeats


class Inference(NamedTuple):
    """A read request: every declared input as an array of the declared datatype.

    A named tuple because one is made for every request: a frozen dataclass takes five times as long to make.
    """

    inputs: dict[str, Tensor]
    rows: int  # of each input; 1 for a model that is not batched
    wanted: tuple[Wanted, ...]
    id: str | None
    parameters: Mapping[str, Any]  # the client's own, without those the protocol defines
    timeout_s: float | None


def read_inference(body: bytes, json_bytes: int | None, manifest: Manifest) -> Inference:
    """The request in `body`, of which the first `json_bytes` are JSON when raw tensors follow (None: all of it)."""
    raw = memoryview(body)
    if json_bytes is not None:
        if not 0 < json_bytes <= len(body):
            raise Refused(f"inference-header-content-length is {json_bytes}, the body has {len(body)} bytes")
        body, raw = body[:json_bytes], raw[json_bytes:]
    else:
        raw = raw[len(body) :]
    if json_bytes is None and manifest.matrix is not None:
        matrix = read_float_matrix(body, manifest.matrix)
        if matrix is not None:
            return _only(matrix, manifest.matrix, manifest)
    document = _read_document(body)
    short = _short_way(document, manifest) if json_bytes is None else None
    if short is not None:
        return short
    inputs = _read_inputs(document.get("inputs"), raw, manifest)
    rows = _rows(inputs) if manifest.batched else 1
    identity = _identity(document.get("id"))
    given = document.get("parameters")
    if given is None:
        return Inference(inputs, rows, _wanted(document.get("outputs"), manifest, False), identity, {}, None)
    parameters = _object(given, "parameters")
    wanted = _wanted(document.get("outputs"), manifest, parameters.get("binary_data_output") is True)
    kept = {name: value for name, value in parameters.items() if name not in _OURS}
    return Inference(inputs, rows, wanted, identity, kept, _timeout_s(parameters.get("timeout")))


def _short_way(document: dict[str, Any], manifest: Manifest) -> Inference | None:
    """The request that nearly every client sends nearly always, read in one go: one float matrix and nothing else.

    None for anything unusual or wrong, which then goes the long way and gets its error there. Whatever this accepts
    the long way accepts with the same result (a test compares the two); it takes a third of the time.
    """
    spec = manifest.matrix
    if spec is None or len(document) != 1:
        return None
    try:
        (entry,) = document["inputs"]
        if len(entry) != 4 or entry["name"] != spec.name or entry["datatype"] != spec.datatype:
            return None
        rows, columns = entry["shape"]
        array = np.asarray(entry["data"])
    except (KeyError, TypeError, ValueError):
        return None
    given = array.shape
    if array.dtype != np.float64 or type(rows) is not int or type(columns) is not int or columns != spec.shape[1]:
        return None
    if given not in ((rows * columns,), (rows, columns)) or rows < 1 or not in_range(array, spec.datatype):
        return None
    matrix = array.astype(DATATYPES[spec.datatype]).reshape(rows, columns)
    return _only(matrix, spec, manifest)


def _only(matrix: Tensor, spec: TensorSpec, manifest: Manifest) -> Inference:
    """The request with this input and nothing else."""
    return Inference({spec.name: matrix}, len(matrix), manifest.every_output[False], None, {}, None)


def _read_document(body: bytes) -> dict[str, Any]:
    try:
        document = jsontext.read(body)
    except ValueError as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refused("the body must be a JSON object with a list of inputs")
    return document


def _read_inputs(entries: object, raw: memoryview, manifest: Manifest) -> dict[str, Tensor]:
    if not isinstance(entries, list):
        raise Refused("inputs must be a list of tensors")
    specs = manifest.inputs_by_name
    found: dict[str, Tensor] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        spec = specs.get(name) if isinstance(name, str) else None
        if spec is None:
            raise Refused(f"unknown input {_shown(name)}; this model takes {', '.join(specs)}")
        if spec.name in found:
            raise Refused(f"input {spec.name!r} is given twice")
        found[spec.name], raw = _read_input(entry, raw, spec)
    if len(found) != len(specs):
        raise Refused(f"missing input {', '.join(name for name in specs if name not in found)}")
    if len(raw):
        raise Refused(f"{len(raw)} bytes follow the last binary tensor")
    return found


def _read_input(entry: Mapping[str, Any], raw: memoryview, spec: TensorSpec) -> tuple[Tensor, memoryview]:
    """The tensor, and what is left of the raw bytes."""
    if entry.get("datatype") != spec.datatype:
        given = _shown(entry.get("datatype"))
        raise Refused(f"input {spec.name!r}: datatype is {given}, this model takes {spec.datatype}")
    shape = checked_shape(entry.get("shape"), spec)
    parameters = entry.get("parameters")
    if parameters is None:
        return from_json(entry.get("data"), shape, spec), raw
    size = _object(parameters, "parameters").get("binary_data_size")
    if "shared_memory_region" in parameters:
        raise Refused(f"input {spec.name!r}: shared memory is not supported; send the data")
    if size is None:
        return from_json(entry.get("data"), shape, spec), raw
    if "data" in entry:
        raise Refused(f"input {spec.name!r}: has both data and binary_data_size")
    if type(size) is not int or not 0 <= size <= len(raw):
        raise Refused(f"input {spec.name!r}: binary_data_size is {_shown(size)}, the body holds {len(raw)} raw bytes")
    return from_raw(raw[:size], shape, spec), raw[size:]


def _rows(inputs: Mapping[str, Tensor]) -> int:
    rows = [len(array) for array in inputs.values()]
    if min(rows) != max(rows):
        raise Refused(f"the inputs have different numbers of rows: {rows}")
    return rows[0]


def _wanted(entries: object, manifest: Manifest, binary: bool) -> tuple[Wanted, ...]:  # noqa: FBT001  a client's flag
    if entries is None or entries == []:
        return manifest.every_output[binary]
    if not isinstance(entries, list):
        raise Refused("outputs must be a list")
    specs = manifest.outputs_by_name
    wanted: dict[str, Wanted] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in specs:
            raise Refused(f"unknown output {_shown(name)}; this model gives {', '.join(specs)}")
        asked = _object(entry.get("parameters"), "parameters").get("binary_data", binary)
        wanted[name] = Wanted(specs[name], asked is True)
    return tuple(wanted.values())


def _identity(given: object) -> str | None:
    if given is None or isinstance(given, str):
        return given
    raise _wrong_type("id", given, "a string")


def _object(given: object, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    raise _wrong_type(name, given, "an object")


def _timeout_s(given: object) -> float | None:
    """The `timeout` parameter, in microseconds as Triton defines it, in seconds."""
    if given is None:
        return None
    if type(given) is int and given > 0:
        return given / 1e6
    raise _wrong_type("timeout", given, "a positive whole number of microseconds")


def _wrong_type(name: str, given: object, wanted: str) -> Refused:
    return Refused(f"{name} is {_shown(given)}; it must be {wanted}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

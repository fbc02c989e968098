"""V2 tensors as numpy arrays: the datatypes, and the JSON form of their data.

Pure: no files, sockets or clock. Whatever a client sends either becomes an array of exactly the declared datatype and
shape or raises `Refused` with a sentence that names the tensor. Nothing is converted silently: text is not a number,
null is not NaN, 1.5 is not an integer, and 300 does not fit into UINT8. (One exception: `true` among numbers counts as
1, as in numpy; looking at each value's type would cost every request.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_servers.errors import Refused

Tensor = NDArray[Any]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),  # an array of `bytes`
}


# Below this sum of squares no value exceeds the largest of the float type with so many bytes (65504, 3.4e38, 1.8e308).
_SAFE_SQUARES = {"FP16": 4.2e9, "FP32": 1e76, "FP64": math.inf}
# Below this one every value is below 2**53, so that an integer among them was not rounded on its way to float64.
_EXACT_SQUARES = 2.0**106


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output as the manifest declares it; -1 in `shape` stands for any size, the first axis is rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def metadata(self) -> dict[str, Any]:
        """The V2 metadata form."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output that a client asks for, as JSON or as raw bytes."""

    spec: TensorSpec
    binary: bool


def checked_shape(shape: object, spec: TensorSpec) -> tuple[int, ...]:
    """The shape a client declared, if it fits `spec` and has at least one row."""
    if not isinstance(shape, list):
        raise Refused(f"input {spec.name!r}: shape must be a list of non-negative integers")
    for size in shape:
        if type(size) is not int or size < 0:
            raise Refused(f"input {spec.name!r}: shape must be a list of non-negative integers")
    given = tuple(shape)
    if not fits(given, spec.shape):
        raise Refused(f"input {spec.name!r}: shape {shape} does not fit {list(spec.shape)} (-1 = any size)")
    if 0 in given:
        raise Refused(f"input {spec.name!r}: shape {shape} holds no data; send at least one row")
    return given


def all_finite(array: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    flat = array.ravel()
    # The sum of squares tells in one quick pass, unless it overflows; two-byte floats nearly always overflow. `vdot`
    # because `@` warns about an overflow that is of no interest here.
    if array.dtype.itemsize > 2 and math.isfinite(np.vdot(flat, flat)):
        return True
    return bool(np.isfinite(array).all())


def in_range(array: Tensor, datatype: str) -> bool:
    """Whether every value of a float64 array is known to be finite as `datatype`; False: look at them one by one."""
    flat = array.ravel()
    return bool(np.vdot(flat, flat) < _SAFE_SQUARES[datatype])


def exact(flat: Tensor, datatype: str) -> bool:
    """Whether float64 values are known to be finite as `datatype`, and unrounded if written as integers."""
    return bool(np.vdot(flat, flat) < min(_SAFE_SQUARES[datatype], _EXACT_SQUARES))


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is what a spec declares, where -1 stands for any size."""
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110  on every request; a generator is slower
        if want not in (-1, have):
            return False
    return True


def from_json(data: object, shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
    """JSON data, flat in row-major order or nested as `shape`, as an array of `shape` and the datatype of `spec`."""
    if not isinstance(data, list):
        raise Refused(f"input {spec.name!r}: data must be a list")
    if spec.datatype == "BYTES":
        return _bytes_from_json(data, shape, spec)
    try:
        array = np.asarray(data)
    except ValueError:
        raise Refused(f"input {spec.name!r}: data is ragged; nested lists must all have the same length") from None
    _check_size(array.shape, shape, spec)
    return _cast(array, data, spec).reshape(shape)


def _check_size(found: tuple[int, ...], shape: tuple[int, ...], spec: TensorSpec) -> None:
    if found == shape or (len(found) == 1 and found[0] == math.prod(shape)):
        return
    raise Refused(
        f"input {spec.name!r}: data of shape {list(found)} does not fill the declared shape {list(shape)} "
        f"({math.prod(shape)} values, flat or nested)"
    )


def _cast(array: Tensor, data: Sequence[Any], spec: TensorSpec) -> Tensor:
    wanted = DATATYPES[spec.datatype]
    kind = array.dtype.kind
    if wanted.kind == "f" and kind in "fiu":
        return _cast_float(array, wanted, spec)
    if wanted.kind == "b" and kind == "b":
        return array
    if wanted.kind in "iu" and kind in "iu":
        return _cast_integer(array, wanted, spec)
    if wanted.kind == "u" and kind in "fO":
        # numpy reads a mix of small integers and ones above 2**63 as floats; look again at the values themselves.
        return _cast_large_integer(data, wanted, spec)
    raise Refused(f"input {spec.name!r}: data holds values that are not {spec.datatype}")


def _cast_float(array: Tensor, wanted: np.dtype[Any], spec: TensorSpec) -> Tensor:
    if array.dtype.kind == "f" and in_range(array, spec.datatype):
        return array.astype(wanted)
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    if not np.isfinite(cast).all():
        raise Refused(f"input {spec.name!r}: data holds a value that is not finite as {spec.datatype}")
    return cast


def _cast_integer(array: Tensor, wanted: np.dtype[Any], spec: TensorSpec) -> Tensor:
    limits = np.iinfo(wanted)
    if int(array.min()) < limits.min or int(array.max()) > limits.max:
        raise Refused(
            f"input {spec.name!r}: data holds an integer outside {spec.datatype} [{limits.min}, {limits.max}]"
        )
    return array.astype(wanted)


def _cast_large_integer(data: Sequence[Any], wanted: np.dtype[Any], spec: TensorSpec) -> Tensor:
    values = np.array(data, dtype=object).ravel()
    limits = np.iinfo(wanted)
    if not all(type(value) is int and limits.min <= value <= limits.max for value in values):
        raise Refused(f"input {spec.name!r}: data holds values that are not {spec.datatype}")
    return values.astype(wanted)


def _bytes_from_json(data: list[Any], shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
    flat = _flatten(data, shape) if data and isinstance(data[0], list) else data
    if flat is None or len(flat) != math.prod(shape):
        raise Refused(f"input {spec.name!r}: data does not fill the declared shape {list(shape)}")
    array = np.empty(len(flat), dtype=np.object_)
    for index, item in enumerate(flat):
        if not isinstance(item, str):
            raise Refused(f"input {spec.name!r}: BYTES data in JSON must be strings")
        array[index] = item.encode("utf-8", "surrogatepass")
    return array.reshape(shape)


def _flatten(data: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """Nested lists as one flat list, None when they are not nested exactly as `shape`."""
    level = [data]
    for size in shape:
        if not all(isinstance(part, list) and len(part) == size for part in level):
            return None
        level = [item for part in level for item in part]
    return level

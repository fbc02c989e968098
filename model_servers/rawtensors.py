"""The binary tensor extension: tensor data as raw little-endian bytes behind the JSON part of a body.

Pure. A BYTES tensor is a sequence of elements, each a 4-byte little-endian length and that many bytes.
"""

import math
import struct
from typing import Any

import numpy as np

from model_servers.errors import Refused
from model_servers.tensors import DATATYPES, Tensor, TensorSpec, all_finite

_LENGTH = struct.Struct("<I")


def from_raw(data: memoryview, shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
    """The array in `data`, which must fill `shape` exactly; floats must be finite, booleans 0 or 1."""
    if spec.datatype == "BYTES":
        return _bytes_from_raw(data, shape, spec)
    wanted = DATATYPES[spec.datatype]
    expected = math.prod(shape) * wanted.itemsize
    if len(data) != expected:
        raise Refused(f"input {spec.name!r}: {len(data)} bytes, but shape {list(shape)} needs {expected}")
    if wanted.kind == "b":
        return _booleans(np.frombuffer(data, dtype=np.uint8), spec).reshape(shape)
    array = np.frombuffer(data, dtype=wanted.newbyteorder("<")).reshape(shape)
    if wanted.kind == "f" and not all_finite(array):
        raise Refused(f"input {spec.name!r}: data holds a value that is not finite")
    return array.astype(wanted)  # a copy: models may write into their input, and request bytes are read-only


def to_raw(array: Tensor, spec: TensorSpec) -> bytes:
    """The array in row-major order as raw little-endian bytes."""
    if spec.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(item)) + item for item in map(_as_bytes, array.ravel()))
    return array.astype(DATATYPES[spec.datatype].newbyteorder("<"), copy=False).tobytes()


def _booleans(raw: Tensor, spec: TensorSpec) -> Tensor:
    if raw.size and raw.max() > 1:
        raise Refused(f"input {spec.name!r}: a BOOL byte must be 0 or 1")
    return raw.astype(np.bool_)


def _bytes_from_raw(data: memoryview, shape: tuple[int, ...], spec: TensorSpec) -> Tensor:
    count = math.prod(shape)
    # The declared shape is a client's word: the elements are counted before room for them is made.
    if count * _LENGTH.size > len(data):
        raise Refused(f"input {spec.name!r}: {len(data)} bytes cannot hold {count} BYTES elements")
    array = np.empty(count, dtype=np.object_)
    start = 0
    for index in range(count):
        stop = start + _LENGTH.size
        if stop > len(data):
            raise Refused(f"input {spec.name!r}: BYTES element {index} has no length")
        start, end = stop, stop + _LENGTH.unpack(data[start:stop])[0]
        if end > len(data):
            raise Refused(f"input {spec.name!r}: BYTES element {index} is longer than the data")
        array[index] = bytes(data[start:end])
        start = end
    if start != len(data):
        raise Refused(f"input {spec.name!r}: {len(data) - start} bytes follow the last BYTES element")
    return array.reshape(shape)


def _as_bytes(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)

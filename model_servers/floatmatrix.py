"""The body of nearly every large request, one float matrix in JSON, read without a Python object per value.

A batch of 100 rows of 64 holds 6,400 numbers: making a `float` of each, looking at each to find out what array they
form, and freeing them took half of the server's time for such a request. simdjson writes them straight into a buffer.

Pure, and never the judge: None for anything unusual or wrong, and where simdjson is not installed; the request then
goes the long way and gets its error there. Whatever this accepts the long way accepts with the same result (a test
compares the two).
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from model_servers.tensors import DATATYPES, Tensor, TensorSpec, exact


def _find_simdjson() -> ModuleType | None:
    try:
        return importlib.import_module("simdjson")
    except ImportError:
        return None


SIMDJSON = _find_simdjson()
WORTH_BYTES = 4 << 10  # below, handling simdjson's own objects costs more than they save
_KEPT_BYTES = 256 << 10  # a parser's memory is about 15 times its largest body and stays with it
_PARSER: Any = None if SIMDJSON is None else SIMDJSON.Parser()


def read_float_matrix(body: bytes, spec: TensorSpec) -> Tensor | None:
    """The [rows, columns] array of the datatype of `spec` that `body` holds, flat or as one list per row; or None."""
    if SIMDJSON is None or len(body) < WORTH_BYTES:
        return None
    parser = _PARSER if len(body) <= _KEPT_BYTES else SIMDJSON.Parser()
    try:
        document = parser.parse(body)
        (entry,) = document["inputs"]
        if len(document) != 1 or len(entry) != 4 or entry["name"] != spec.name or entry["datatype"] != spec.datatype:
            return None
        rows, columns = entry["shape"]
        if type(rows) is not int or type(columns) is not int or columns != spec.shape[1] or rows < 1:
            return None
        flat = _flat(entry["data"], rows, columns, _brackets(body))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):  # what simdjson has for bad documents
        return None
    if flat is None or not exact(flat, spec.datatype):
        return None
    return flat.astype(DATATYPES[spec.datatype]).reshape(rows, columns)


def _brackets(body: bytes) -> int:
    """How many lists there are at most: three in a request whose data is flat. Ones inside text count as well."""
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord("[")))


def _flat(data: Any, rows: int, columns: int, brackets: int) -> Tensor | None:
    """The values as float64, row by row; None unless they are nested exactly as declared. TypeError: not all numbers.

    simdjson flattens whatever is nested. That no list is hidden further inside follows from the number of brackets.
    """
    if brackets == 3:
        if len(data) != rows * columns:
            return None
    elif brackets != 3 + rows or len(data) != rows or any(len(row) != columns for row in data):
        return None
    return np.frombuffer(data.as_buffer(of_type="d"), np.float64)

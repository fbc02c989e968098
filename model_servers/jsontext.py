"""JSON in and out: orjson where it is installed, the standard library otherwise.

Both refuse NaN and Infinity, and both write numpy arrays as lists. orjson makes a request with 100 rows eight times
cheaper to read; nothing else depends on which of the two is there.
"""

import importlib
import json
from types import ModuleType
from typing import Any, NoReturn


def _find_orjson() -> ModuleType | None:
    try:
        return importlib.import_module("orjson")
    except ImportError:
        return None


def _reject_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _as_list(value: Any) -> Any:
    return value.tolist()


ORJSON = _find_orjson()
_standard_decode = json.JSONDecoder(parse_constant=_reject_constant).decode
_standard_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_as_list).encode


def standard_read(text: bytes) -> Any:
    """The document in UTF-8 `text`, read by the standard library. Raises ValueError."""
    try:
        return _standard_decode(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def standard_write(document: object) -> bytes:
    """`document`, in which numpy arrays are allowed, as UTF-8 JSON, written by the standard library."""
    return _standard_encode(document).encode()


def fast_read(text: bytes) -> Any:
    """As `standard_read`, by orjson."""
    assert ORJSON is not None  # noqa: S101  only reachable when it was found
    return ORJSON.loads(text)


def fast_write(document: object) -> bytes:
    """As `standard_write`, by orjson; float32 values come out with the fewest digits that read back the same."""
    assert ORJSON is not None  # noqa: S101  only reachable when it was found
    written: bytes = ORJSON.dumps(document, _as_list, ORJSON.OPT_SERIALIZE_NUMPY)
    return written


read = standard_read if ORJSON is None else fast_read
write = standard_write if ORJSON is None else fast_write

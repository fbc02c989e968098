"""Every datatype, in JSON and as raw bytes, through a model that gives back what it gets."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_servers import floatmatrix, jsontext, protocol
from model_servers.errors import Refused
from model_servers.manifest import Manifest
from model_servers.protocol import read_inference
from model_servers.tensors import DATATYPES, TensorSpec

ECHO = """
def load(directory):
    return lambda inputs: {"out_" + name: array for name, array in inputs.items()}
"""

# Edge values of each datatype, as JSON.
VALUES = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [2**64 - 1, 1],
    "INT8": [-128, 127],
    "INT16": [-32768, 32767],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP16": [-65504.0, 0.5],
    "FP32": [-3.4028234663852886e38, 0.1],
    "FP64": [-1.7976931348623157e308, 0.1],
    "BYTES": ["", "gr\u00fc\u00df , \u2713\n"],
}
REFUSED = {
    "BOOL": [1, "true", 0.0],
    "UINT8": [256, -1, 1.0, "1", None],
    "UINT16": [65536, -1],
    "UINT32": [2**32, -1],
    "UINT64": [2**64, -1, 1.5, "1"],
    "INT8": [128, -129, 2**64],
    "INT16": [32768],
    "INT32": [2**31, 1.5],
    "INT64": [2**63, 2**64, 10**30, 0.5],
    "FP16": [65520.0, "x"],
    "FP32": [3.5e38, 10**39, None],
    "FP64": [None, "1.0"],
    "BYTES": [1, None, ["a"], {}],
}


@pytest.fixture(scope="module")
def echo_server(start_server, python_model, tmp_path_factory):
    inputs = [(name.lower(), name, [-1, 2]) for name in DATATYPES]
    outputs = [("out_" + name.lower(), name, [-1, 2]) for name in DATATYPES]
    return start_server(python_model(tmp_path_factory.mktemp("echo"), ECHO, inputs, outputs, prediction="out_bytes"))


def _document(**changed):
    return {
        "inputs": [
            {"name": name.lower(), "shape": [1, 2], "datatype": name, "data": changed.get(name, values)}
            for name, values in VALUES.items()
        ]
    }


def test_every_datatype_comes_back_as_sent_in_json(echo_server):
    reply = echo_server.infer(_document(), "own")
    assert reply.status == 200, reply.body
    for output in reply.json["outputs"]:
        dtype = DATATYPES[output["datatype"]]
        sent = VALUES[output["datatype"]]
        if dtype.kind == "f":
            np.testing.assert_array_equal(np.array(output["data"], dtype), np.array(sent, dtype))
        else:
            assert output["data"] == sent
    assert reply.headers["x-model-prediction"] == ",gr%C3%BC%C3%9F%20%2C%20%E2%9C%93%0A"


def _raw(name, values):
    if name == "BYTES":
        return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)
    return np.array(values, DATATYPES[name].newbyteorder("<")).tobytes()


def test_every_datatype_comes_back_as_sent_in_raw_bytes(echo_server):
    blobs = {name: _raw(name, values) for name, values in VALUES.items()}
    inputs = [
        {"name": name.lower(), "shape": [1, 2], "datatype": name, "parameters": {"binary_data_size": len(blob)}}
        for name, blob in blobs.items()
    ]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    reply = echo_server.request("POST", "/v2/models/own/infer", text + b"".join(blobs.values()), headers)
    assert reply.status == 200, reply.body
    size = int(reply.headers["inference-header-content-length"])
    assert [o["parameters"]["binary_data_size"] for o in json.loads(reply.body[:size])["outputs"]] == [
        len(blob) for blob in blobs.values()
    ]
    assert reply.body[size:] == b"".join(blobs.values())


@pytest.mark.parametrize(("datatype", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_the_datatype_cannot_hold_is_a_400(echo_server, datatype, value):
    reply = echo_server.infer(_document(**{datatype: [value, VALUES[datatype][1]]}), "own")
    assert reply.status == 400, reply.body
    assert datatype.lower() in reply.json["error"]


RAW_MISTAKES = {
    "a boolean of 2": ("BOOL", b"\x01\x02", "0 or 1"),
    "an element longer than the data": ("BYTES", b"\xff\xff\xff\xff" + b"x" * 8, "longer than the data"),
    "an element without a length": ("BYTES", b"\x04\0\0\0abcd" + b"x", "no length"),
    "bytes behind the last element": ("BYTES", b"\0\0\0\0\0\0\0\0xyz", "3 bytes follow the last BYTES element"),
    "too few bytes for the lengths": ("BYTES", b"\0\0\0\0", "cannot hold 2 BYTES elements"),
}


@pytest.mark.parametrize("mistake", RAW_MISTAKES)
def test_raw_garbage_is_a_400(echo_server, mistake):
    datatype, blob, sentence = RAW_MISTAKES[mistake]
    document = _document()
    for tensor in document["inputs"]:
        if tensor["datatype"] == datatype:
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": len(blob)}
    text = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/json"}
    reply = echo_server.request("POST", "/v2/models/own/infer", text + blob, headers)
    assert reply.status == 400, reply.body
    assert sentence in reply.json["error"]


def test_inputs_with_different_rows_are_refused(echo_server):
    document = _document()
    document["inputs"][0] |= {"shape": [2, 2], "data": [True] * 4}
    reply = echo_server.infer(document, "own")
    assert reply.status == 400
    assert "different numbers of rows" in reply.json["error"]


MATRIX = Manifest("m", "1", "none", (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),), "y")
ODD = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.text(max_size=2))
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "x", "x", "z", 1]),
        "datatype": st.sampled_from(["FP32", "FP32", "FP32", "FP64", None]),
        "shape": st.sampled_from([[1, 3], [2, 3], [0, 3], [1, 2], [3], [True, 3], [1.0, 3], None]),
        "data": st.one_of(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
            st.lists(st.integers(-9, 9), min_size=6, max_size=6),
            st.lists(ODD, max_size=7),
            st.lists(st.lists(ODD, min_size=3, max_size=3), max_size=2),
        ),
    },
    optional={"parameters": st.sampled_from([None, {}, {"a": 1}, 3])},
)


@given(st.lists(TENSORS, min_size=1, max_size=2), st.sampled_from([{}, {"id": "a"}, {"outputs": []}]))
def test_the_short_way_reads_exactly_what_the_long_way_reads(tensors, rest):
    try:
        body = jsontext.standard_write({"inputs": tensors, **rest})
    except ValueError:  # NaN or infinity, which no JSON can carry
        return
    short = protocol._short_way(json.loads(body), MATRIX)
    long = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "_short_way", lambda *_: None)
        try:
            long = read_inference(body, None, MATRIX)
        except Refused:
            assert short is None
    if short is not None and long is not None:
        assert short.inputs["x"].dtype == long.inputs["x"].dtype
        np.testing.assert_array_equal(short.inputs["x"], long.inputs["x"])
        assert short[1:] == long[1:]


NUMBER = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-(2**54), 2**54))
MATRICES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "x", "x", "x[", "z"]),
        "datatype": st.sampled_from(["FP32", "FP32", "FP32", "FP16"]),
        "shape": st.sampled_from([[2, 3], [2, 3], [1, 3], [3, 2], [6]]),
        "data": st.one_of(
            st.lists(NUMBER, min_size=6, max_size=6),
            st.lists(st.lists(NUMBER, min_size=3, max_size=3), min_size=2, max_size=2),
            st.lists(st.lists(st.lists(NUMBER, max_size=2), min_size=3, max_size=3), min_size=2, max_size=2),
            st.lists(st.one_of(NUMBER, st.just([]), st.lists(NUMBER, min_size=2, max_size=3)), max_size=6),
            st.lists(ODD, min_size=6, max_size=6),
            st.lists(st.one_of(st.just("abc"), st.just({"a": 1, "b": 2, "c": 3})), min_size=2, max_size=2),
        ),
    }
)


@given(MATRICES, st.sampled_from([{}, {}, {"id": "a"}]))
def test_a_float_matrix_is_read_exactly_as_the_long_way_reads_it(tensor, rest):
    try:
        body = jsontext.standard_write({"inputs": [tensor], **rest})
    except ValueError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floatmatrix, "WORTH_BYTES", 0)
        matrix = floatmatrix.read_float_matrix(body, MATRIX.inputs[0])
        patch.setattr(floatmatrix, "SIMDJSON", None)
        patch.setattr(protocol, "_short_way", lambda *_: None)
        if matrix is None:
            return
        long = read_inference(body, None, MATRIX)  # raises, and so fails, for what only the quick way takes
    assert matrix.dtype == long.inputs["x"].dtype
    np.testing.assert_array_equal(matrix, long.inputs["x"])
    assert (long.rows, long.id) == (len(matrix), None)


def _body(data, shape=(2, 3), **rest):
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": data}], **rest}).encode()


LEFT_TO_THE_LONG_WAY = {
    "lists whose flattened length is right by chance": _body([1.5, [], 1.5, [1.5, 1.5], 1.5, 1.5]),
    "one row too deep": _body([[1.5, [1.5], 1.5], [1.5, 1.5, 1.5]]),
    "rows of unequal length": _body([[1.5, 1.5], [1.5, 1.5, 1.5, 1.5]]),
    "too few": _body([1.5] * 5),
    "a boolean": _body([1.5] * 5 + [True]),
    "only booleans": _body([True] * 6),
    "null": _body([1.5] * 5 + [None]),
    "text as long as a row": _body(["abc", [1.5] * 3]),
    "an integer beyond 64 bits": _body([-(2**63) - 1] + [1.5] * 5),
    "an integer of 400 digits": _body([10**400] + [1.5] * 5),
    "lists too deep": b"[" * 2000,
    "an integer that float64 rounds": _body([2**53 + 1] + [1] * 5),
    "too large for FP32": _body([1e39] + [1.5] * 5),
    "a key more": _body([1.5] * 6, id="a"),
    "a shape of booleans": _body([1.5] * 3, shape=(True, 3)),
    "no rows": _body([], shape=(0, 3)),
    "the same key twice": b'{"inputs": [], ' + _body([1.5] * 6)[1:],
    "not UTF-8": _body([1.5] * 6).replace(b"x", b"\xff"),
    "something behind it": _body([1.5] * 6) + b"x",
    "not an object": b"[" + _body([1.5] * 6) + b"]",
    "a number": b"1",
    "nothing": b"",
}


@pytest.mark.parametrize("case", LEFT_TO_THE_LONG_WAY)
def test_the_quick_way_leaves_to_the_long_way(case, monkeypatch):
    monkeypatch.setattr(floatmatrix, "WORTH_BYTES", 0)
    assert floatmatrix.read_float_matrix(LEFT_TO_THE_LONG_WAY[case], MATRIX.inputs[0]) is None
    assert floatmatrix.read_float_matrix(_body([1.5] * 6), MATRIX.inputs[0]) is not None  # and works on behind it


@pytest.mark.parametrize("rows", [1, 2, 200, 20_000])
@pytest.mark.parametrize("nested", [False, True])
def test_the_quick_way_takes_flat_and_nested_data_of_any_size(rows, nested, monkeypatch):
    monkeypatch.setattr(floatmatrix, "WORTH_BYTES", 0)
    values = [[0.5 * i, i, -1e-3] for i in range(rows)]
    data = values if nested else [value for row in values for value in row]
    for _ in range(2):  # the parser is used again
        matrix = floatmatrix.read_float_matrix(_body(data, shape=(rows, 3)), MATRIX.inputs[0])
        assert matrix is not None
        np.testing.assert_array_equal(matrix, np.asarray(values).astype(np.float32))


@given(st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_no_document_raises_anything_but_refused(document):
    try:
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": document}]}).encode()
    except ValueError:
        return
    for read in (jsontext.standard_read, jsontext.read):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jsontext, "read", read)
            with contextlib.suppress(Refused):
                read_inference(body, None, MATRIX)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 250)))
def test_no_bytes_raise_anything_but_refused(body, json_bytes):
    with pytest.raises(Refused):
        read_inference(body, json_bytes, MATRIX)


def _damaged(at, put):
    body = _body([1.5] * 6)
    return body[:at] + put + body[at + len(put) :]


@given(st.one_of(st.binary(max_size=200), st.builds(_damaged, st.integers(0, 99), st.binary())))
def test_no_bytes_raise_anything_on_the_quick_way(body):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floatmatrix, "WORTH_BYTES", 0)
        assert floatmatrix.read_float_matrix(body, MATRIX.inputs[0]) is None or json.loads(body)

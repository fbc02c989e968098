"""The V2 protocol against the real server process: what is answered, and what every mistake gets."""

import gzip
import json
import socket
import struct

import numpy as np
import pytest

INFER = "/v2/models/digits/infer"


def test_the_server_says_what_it_is_and_what_its_model_takes(digits_server):
    assert digits_server.request("GET", "/v2").json["name"] == "perch-model-server"
    metadata = digits_server.request("GET", "/v2/models/digits").json
    assert metadata["versions"] == ["2-mlp"]
    assert metadata["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}]
    assert [output["name"] for output in metadata["outputs"]] == ["label", "probabilities"]
    assert digits_server.request("GET", "/v2/models/digits/versions/2-mlp").json == metadata


@pytest.mark.parametrize(
    "path", ["/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits/versions/2-mlp/ready"]
)
def test_health_and_readiness_answer_get_and_head(digits_server, path):
    assert digits_server.request("GET", path).status == 200
    head = digits_server.request("HEAD", path)
    assert (head.status, head.body) == (200, b"")


def test_the_repository_index_lists_the_version_in_service(digits_server):
    assert digits_server.request("POST", "/v2/repository/index", b"{}").json == [
        {"name": "digits", "version": "2-mlp", "state": "READY", "reason": ""}
    ]


def test_an_inference_is_the_numpy_models_own_answer(digits_server, pixels, artifacts):
    document = pixels(3)
    reply = digits_server.infer(document)
    assert reply.status == 200
    with np.load(artifacts / "digits" / "2" / "model.npz") as arrays:
        hidden = np.maximum(
            np.array(document["inputs"][0]["data"]).reshape(3, 64) @ arrays["weight_0"] + arrays["bias_0"], 0
        )
        scores = hidden @ arrays["weight_1"] + arrays["bias_1"]
    expected = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    label, probabilities = reply.json["outputs"]
    assert label == {"name": "label", "datatype": "INT64", "shape": [3], "data": scores.argmax(axis=1).tolist()}
    assert probabilities["shape"] == [3, 10]
    np.testing.assert_allclose(probabilities["data"], expected.ravel(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 8, 100])
def test_the_headers_carry_version_predictions_and_count(digits_server, pixels, n):
    reply = digits_server.infer(pixels(n))
    labels = reply.json["outputs"][0]["data"]
    assert reply.headers["x-model-version"] == "2-mlp"
    assert reply.headers["x-model-prediction"] == ",".join(map(str, labels[:32]))
    assert reply.headers["x-model-prediction-count"] == str(n)


def test_nested_data_is_the_same_as_flat_data(digits_server, pixels):
    document = pixels(2)
    data = document["inputs"][0]["data"]
    nested = pixels(2, data=[data[:64], data[64:]])
    assert digits_server.infer(nested).json == digits_server.infer(document).json


def test_integers_are_taken_for_floats(digits_server, pixels):
    document = pixels(1)
    whole = pixels(1, data=[int(value) for value in document["inputs"][0]["data"]])
    assert digits_server.infer(whole).json == digits_server.infer(document).json


def test_id_and_the_clients_own_parameters_come_back(digits_server, pixels):
    document = {**pixels(1), "id": "a-1 \u00e4", "parameters": {"tenant": "acme", "timeout": 5_000_000}}
    answer = digits_server.infer(document).json
    assert answer["id"] == "a-1 \u00e4"
    assert answer["parameters"] == {"tenant": "acme"}


def test_only_the_outputs_asked_for_come_back(digits_server, pixels):
    answer = digits_server.infer({**pixels(1), "outputs": [{"name": "label"}]}).json
    assert [output["name"] for output in answer["outputs"]] == ["label"]


def test_a_named_version_is_served_and_another_is_not_found(digits_server, pixels):
    body, headers = json.dumps(pixels(1)), {"Content-Type": "application/json; charset=utf-8"}
    assert digits_server.request("POST", "/v2/models/digits/versions/2-mlp/infer", body, headers).status == 200
    reply = digits_server.request("POST", "/v2/models/digits/versions/9/infer", body, headers)
    assert (reply.status, reply.json) == (404, {"error": "version '9' is not served; '2-mlp' is"})


def _binary(document, raw, **request):
    tensor = {key: value for key, value in document["inputs"][0].items() if key != "data"}
    text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}], **request}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    return text + raw, headers


def test_binary_tensors_in_and_out_equal_json_ones(digits_server, pixels):
    document = pixels(4)
    raw = np.array(document["inputs"][0]["data"], dtype="<f4").tobytes()
    body, headers = _binary(document, raw, parameters={"binary_data_output": True})
    reply = digits_server.request("POST", INFER, body, headers)
    size = int(reply.headers["inference-header-content-length"])
    label, probabilities = json.loads(reply.body[:size])["outputs"]
    labels = np.frombuffer(reply.body[size : size + 32], "<i8")
    scores = np.frombuffer(reply.body[size + 32 :], "<f4")
    assert (label["parameters"], probabilities["parameters"]) == ({"binary_data_size": 32}, {"binary_data_size": 160})
    expected = digits_server.infer(document).json["outputs"]
    assert labels.tolist() == expected[0]["data"]
    np.testing.assert_array_equal(scores, np.array(expected[1]["data"], np.float32))
    assert reply.headers["content-type"] == "application/octet-stream"


def test_one_output_may_be_binary_and_the_other_json(digits_server, pixels):
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}]
    reply = digits_server.infer({**pixels(1), "outputs": wanted})
    size = int(reply.headers["inference-header-content-length"])
    probabilities, label = json.loads(reply.body[:size])["outputs"]
    assert "data" not in probabilities
    assert label["data"] == [int(np.frombuffer(reply.body[size:], "<f4").argmax())]


def test_a_compressed_body_is_read(digits_server, pixels):
    body = gzip.compress(json.dumps(pixels(1)).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert digits_server.request("POST", INFER, body, headers).status == 200


_TENSOR = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [1.0] * 64}


def _with(**changes):
    return {"inputs": [{**_TENSOR, **changes}]}


MISTAKES = {
    "not json": (b"{", "not JSON"),
    "not utf-8": (b'{"id":"\xff"}', "not JSON"),
    "an array": ([], "JSON object"),
    "nothing": (b"", "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "no inputs": ({}, "inputs must be a list"),
    "inputs null": ({"inputs": None}, "inputs must be a list"),
    "no tensor": ({"inputs": []}, "missing input pixels"),
    "tensor is text": ({"inputs": ["pixels"]}, "unknown input"),
    "name unknown": (_with(name="pixel"), "unknown input 'pixel'; this model takes pixels"),
    "name is a list": (_with(name=["pixels"]), "unknown input"),
    "twice": ({"inputs": [_TENSOR, _TENSOR]}, "given twice"),
    "datatype wrong": (_with(datatype="FP64"), "datatype is 'FP64', this model takes FP32"),
    "datatype missing": (_with(datatype=None), "datatype is None"),
    "shape wrong": (_with(shape=[1, 63]), "does not fit [-1, 64]"),
    "shape rank": (_with(shape=[64]), "does not fit [-1, 64]"),
    "shape negative": (_with(shape=[-1, 64]), "non-negative"),
    "shape floats": (_with(shape=[1.0, 64]), "non-negative integers"),
    "shape bool": (_with(shape=[True, 64]), "non-negative integers"),
    "shape missing": (_with(shape=None), "non-negative integers"),
    "shape gigantic": (_with(shape=[10**15, 64]), "does not fill"),
    "no rows": (_with(shape=[0, 64], data=[]), "at least one row"),
    "too few": (_with(data=[1.0] * 63), "does not fill"),
    "too many": (_with(data=[1.0] * 65), "does not fill"),
    "nested wrongly": (_with(data=[[1.0] * 32, [1.0] * 32]), "does not fill"),
    "ragged": (_with(shape=[2, 64], data=[[1.0] * 64, [1.0] * 63]), "ragged"),
    "ragged deep": (_with(data=[[1.0] * 63 + [[1.0]]]), "ragged"),
    "text": (_with(data=["1"] * 64), "not FP32"),
    "null": (_with(data=[None] + [1.0] * 63), "not FP32"),
    "booleans": (_with(data=[True] * 64), "not FP32"),
    "objects": (_with(data=[{}] * 64), "not FP32"),
    "too large for FP32": (_with(data=[1e39] + [1.0] * 63), "not finite as FP32"),
    "too large for anything": (json.dumps(_with()).replace("1.0", "1e999", 1), ""),
    "nan": (json.dumps(_with()).replace("1.0", "NaN", 1), "not JSON"),
    "infinity": (json.dumps(_with()).replace("1.0", "-Infinity", 1), "not JSON"),
    "data missing": (_with(data=None), "data must be a list"),
    "data is text": (_with(data="1"), "data must be a list"),
    "output unknown": ({**_with(), "outputs": [{"name": "x"}]}, "unknown output 'x'; this model gives label"),
    "outputs no list": ({**_with(), "outputs": {"a": 1}}, "outputs must be a list"),
    "output no object": ({**_with(), "outputs": ["label"]}, "unknown output"),
    "id a number": ({**_with(), "id": 7}, "id is 7; it must be a string"),
    "parameters a list": ({**_with(), "parameters": [1]}, "parameters is [1]; it must be an object"),
    "timeout text": ({**_with(), "parameters": {"timeout": "1"}}, "microseconds"),
    "shared memory": (_with(parameters={"shared_memory_region": "x"}), "shared memory is not supported"),
    "binary size alone": (_with(parameters={"binary_data_size": 256}), "both data and binary_data_size"),
    "a long name": (_with(name="x" * 10_000), "unknown input"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_clients_mistake_is_a_400_with_a_sentence(digits_server, mistake):
    document, sentence = MISTAKES[mistake]
    reply = digits_server.infer(document)
    assert reply.status == 400, reply.body
    assert list(reply.json) == ["error"]
    assert sentence in reply.json["error"]
    assert "Traceback" not in reply.json["error"]
    assert len(reply.body) < 1000


BINARY_MISTAKES = {
    "truncated": (lambda body, _: body[:-4], {}, "binary_data_size is 256, the body holds 252 raw bytes"),
    "too long": (lambda body, _: body + b"1234", {}, "4 bytes follow the last binary tensor"),
    "header beyond the body": (lambda body, _: body, {"Inference-Header-Content-Length": "99999"}, "the body has"),
    "header too short": (lambda body, _: body, {"Inference-Header-Content-Length": "10"}, "not JSON"),
    "header zero": (lambda body, _: body, {"Inference-Header-Content-Length": "0"}, "the body has"),
    "header text": (lambda body, _: body, {"Inference-Header-Content-Length": "12a"}, "must be a number"),
    "header negative": (lambda body, _: body, {"Inference-Header-Content-Length": "-1"}, "must be a number"),
    "not finite": (
        lambda body, size: body[:size] + struct.pack("<f", float("nan")) + body[size + 4 :],
        {},
        "not finite",
    ),
}


@pytest.mark.parametrize("mistake", BINARY_MISTAKES)
def test_a_mistake_in_a_binary_body_is_a_400(digits_server, pixels, mistake):
    bend, changed, sentence = BINARY_MISTAKES[mistake]
    body, headers = _binary(pixels(1), np.ones(64, "<f4").tobytes())
    size = int(headers["Inference-Header-Content-Length"])
    reply = digits_server.request("POST", INFER, bend(body, size), {**headers, **changed})
    assert reply.status == 400, reply.body
    assert sentence in reply.json["error"]


def test_a_size_that_does_not_fit_the_shape_is_a_400(digits_server, pixels):
    body, headers = _binary(pixels(2), np.ones(64, "<f4").tobytes())
    reply = digits_server.request("POST", INFER, body, headers)
    assert (reply.status, reply.json) == (
        400,
        {"error": "input 'pixels': 256 bytes, but shape [2, 64] needs 512"},
    )


def test_without_a_header_length_the_whole_body_is_json(digits_server, pixels):
    body, headers = _binary(pixels(1), np.ones(64, "<f4").tobytes())
    del headers["Inference-Header-Content-Length"]
    assert digits_server.request("POST", INFER, body, headers).status == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/digits/what", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/digits/versions/1", 404),
        ("GET", "/v2/models/%ff%00/ready", 404),
        ("GET", "/perch/faults", 404),
        ("GET", INFER, 405),
        ("DELETE", "/v2", 405),
        ("GET", "/v2/repository/index", 405),
        ("POST", "/v2/health/live", 405),
    ],
)
def test_an_unknown_path_or_method_is_told_so(digits_server, method, path, status):
    reply = digits_server.request(method, path)
    assert reply.status == status
    assert list(reply.json) == ["error"]


def test_another_content_type_is_a_415_and_none_is_json(digits_server, pixels):
    body = json.dumps(pixels(1))
    reply = digits_server.request("POST", INFER, body, {"Content-Type": "text/plain"})
    assert (reply.status, list(reply.json)) == (415, ["error"])
    assert digits_server.request("POST", INFER, body).status == 200


def test_a_huge_body_is_a_413_whether_its_length_is_told_or_not(digits_server):
    blob = b"[" + b"1," * 600_000
    for body in (blob, iter([blob[:500_000], blob[500_000:]])):  # the second goes in chunks
        reply = digits_server.request("POST", INFER, body, {"Content-Type": "application/json"})
        assert (reply.status, reply.json) == (413, {"error": "the body is larger than 1000000 bytes"})


def _raw_exchange(server, *parts):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(20)
        raw.connect(str(server.socket))
        replies = []
        for part in parts:
            raw.sendall(part)
            replies.append(raw.recv(65536))
        return replies


def test_a_client_that_waits_for_100_continue_gets_it(digits_server, pixels):
    body = json.dumps(pixels(1)).encode()
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    first, second = _raw_exchange(digits_server, head, body)
    assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_client_that_announces_too_much_is_refused_before_it_sends(digits_server):
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1000000000\r\n\r\n".encode()
    (reply,) = _raw_exchange(digits_server, head)
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_malformed_http_ends_the_connection_and_nothing_else(digits_server, pixels):
    (reply,) = _raw_exchange(digits_server, b"GARBAGE\r\n\r\n")
    assert reply.startswith(b"HTTP/1.0 400")
    assert b"Traceback" not in reply
    assert digits_server.infer(pixels(1)).status == 200


def test_one_connection_carries_many_requests_with_errors_between(digits_server, pixels):
    connection = digits_server.connect()
    headers = {"Content-Type": "application/json"}
    statuses = [
        digits_server.exchange(connection, "POST", INFER, body, headers).status
        for body in (
            json.dumps(pixels(1)),
            "{",
            json.dumps(pixels(2)),
            json.dumps(_with(shape=[3])),
            json.dumps(pixels(1)),
        )
    ]
    connection.close()
    assert statuses == [200, 400, 200, 400, 200]


def test_pipelined_requests_are_answered_in_order(digits_server, pixels):
    body = json.dumps(pixels(1)).encode()
    post = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    get = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(20)
        raw.connect(str(digits_server.socket))
        raw.sendall(post + get)
        received = b""
        while part := raw.recv(65536):
            received += part
    assert received.index(b'"outputs"') < received.index(b'{"live":true}')
    assert received.count(b"HTTP/1.1 200 OK") == 2

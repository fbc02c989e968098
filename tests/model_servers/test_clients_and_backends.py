"""The ONNX backend, the training program, and clients that are not ours."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from model_servers.errors import ArtifactError
from model_servers.manifest import Manifest, write_artifact
from model_servers.model import load
from model_servers.tensors import TensorSpec


def test_the_onnx_perceptron_answers_as_the_numpy_one(artifacts):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    rng = np.random.default_rng(5)
    pixels = {"pixels": (rng.random((500, 64)) * 16).astype(np.float32)}
    ours = load(artifacts / "digits" / "2").run(pixels, {})
    theirs = load(artifacts / "digits-onnx" / "2").run(pixels, {})
    np.testing.assert_allclose(theirs["probabilities"], ours["probabilities"], atol=1e-5)
    np.testing.assert_array_equal(theirs["label"], ours["label"])


def test_the_onnx_perceptron_is_served_over_http(start_server, artifacts, pixels):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    server = start_server(artifacts / "digits-onnx" / "2", "--drain", "0")
    reply = server.infer(pixels(3))
    assert (reply.status, reply.headers["x-model-version"]) == (200, "2-mlp-onnx")


def test_a_graph_that_is_none_is_refused_in_one_line(artifacts, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    from model_servers.manifest import read_manifest

    manifest = read_manifest(artifacts / "digits-onnx" / "2")
    write_artifact(tmp_path, manifest, {"model.onnx": b"not a graph"})
    with pytest.raises(ArtifactError, match="onnxruntime cannot load it") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_without_onnxruntime_the_refusal_says_what_to_install(artifacts, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArtifactError, match=r"pip install 'perch\[onnx\]'"):
        load(artifacts / "digits-onnx" / "2")


def test_training_twice_gives_the_same_bytes_and_the_shipped_models_accuracy(tmp_path, artifacts):
    pytest.importorskip("sklearn", reason="the extra `train` is not installed")
    from model_servers.train import train

    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert first == second
    for number in ("1", "2"):
        for name in ("model.npz", "manifest.json"):
            assert (tmp_path / "a" / number / name).read_bytes() == (tmp_path / "b" / number / name).read_bytes()
        shipped, trained = load(artifacts / "digits" / number), load(tmp_path / "a" / number)
        # Another kind of processor may add in another order, which can move the last digits but not the model.
        assert trained.manifest.metrics["accuracy"] == pytest.approx(shipped.manifest.metrics["accuracy"], abs=0.02)


def test_serving_needs_neither_sklearn_nor_scipy_nor_onnx(artifacts):
    program = (
        "import sys, pathlib, model_servers.__main__, model_servers.model as m;"
        f"m.load(pathlib.Path({str(artifacts / 'digits' / '2')!r}));"
        "print([name for name in ('sklearn', 'scipy', 'onnx', 'onnxruntime', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_model_shown_on_the_page_works_and_floats_are_shown_with_six_digits(start_server, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "any-model-server.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    weights = io.BytesIO()
    np.save(weights, np.array([1 / 3, 1.0]))
    x, score = TensorSpec("x", "FP64", (-1, 2)), TensorSpec("score", "FP64", (-1,))
    manifest = Manifest("own", "2024-11-03", "python", (x,), (score,), "score", options={"entry": "model.py:load"})
    write_artifact(tmp_path, manifest, {"model.py": code.encode(), "weights.npy": weights.getvalue()})
    server = start_server(tmp_path, "--drain", "0")
    tensor = {"name": "x", "shape": [3, 2], "datatype": "FP64", "data": [1, 0, 0, 1e7, 3, 0]}
    reply = server.infer({"inputs": [tensor]}, "own")
    assert reply.json["outputs"][0]["data"] == [1 / 3, 1e7, 1.0]
    assert reply.headers["x-model-prediction"] == "0.333333,1e+07,1"
    assert reply.headers["x-model-version"] == "2024-11-03"


def test_a_model_that_asks_for_parameters_gets_each_requests_own(start_server, tmp_path, python_model):
    code = """
def load(directory):
    return lambda inputs, parameters: {"y": inputs["x"] * parameters.get("factor", 1)}
"""
    spec = [("x", "INT64", [-1])], [("y", "INT64", [-1])]
    server = start_server(python_model(tmp_path, code, *spec, options={"parameters": True}), "--drain", "0")
    tensor = {"name": "x", "shape": [1], "datatype": "INT64", "data": [7]}

    def ask(factor):
        return server.infer({"inputs": [tensor], "parameters": {"factor": factor}}, "own").json["outputs"][0]["data"]

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(40))) == [[7 * factor] for factor in range(40)]


@pytest.fixture(scope="module")
def triton(start_server, artifacts):
    client = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    server = start_server(artifacts / "digits" / "2", "--drain", "0", tcp=True)
    with client.InferenceServerClient(server.address) as connected:
        yield client, connected


def test_the_triton_client_reads_health_and_metadata(triton):
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.get_server_metadata()["name"] == "perch-model-server"
    assert client.get_model_metadata("digits", "2-mlp")["inputs"][0]["name"] == "pixels"
    assert client.get_model_repository_index()[0]["state"] == "READY"


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_the_triton_client_infers_in_both_encodings(triton, artifacts, binary, compression):
    module, client = triton
    pixels = (np.arange(192, dtype=np.float32) % 17).reshape(3, 64)
    tensor = module.InferInput("pixels", [3, 64], "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    outputs = [module.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities")]
    result = client.infer(
        "digits", [tensor], outputs=outputs, request_id="r1", request_compression_algorithm=compression
    )
    expected = load(artifacts / "digits" / "2").run({"pixels": pixels}, {})
    np.testing.assert_array_equal(result.as_numpy("label"), expected["label"])
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected["probabilities"], atol=1e-6)
    assert result.get_response()["id"] == "r1"


def test_the_triton_client_gets_our_sentence_for_its_mistake(triton):
    module, client = triton
    tensor = module.InferInput("pixels", [1, 63], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 63), np.float32))
    with pytest.raises(Exception, match=r"shape \[1, 63\] does not fit \[-1, 64\]"):
        client.infer("digits", [tensor])

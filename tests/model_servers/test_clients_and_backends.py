"""The ONNX backend, the training program, and clients that are not ours."""

import subprocess
import sys

import numpy as np
import pytest

from model_servers.errors import ArtifactError
from model_servers.model import load


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
    from model_servers.manifest import read_manifest, write_artifact

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


@pytest.fixture
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

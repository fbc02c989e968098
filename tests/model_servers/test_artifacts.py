"""Version directories that cannot be served: one sentence, exit 1; and the command line's own errors."""

import json
import shutil
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest

from model_servers.__main__ import read_arguments
from model_servers.errors import ArtifactError
from model_servers.manifest import read_manifest
from model_servers.model import load
from model_servers.versions import newest


@pytest.fixture
def version(tmp_path, artifacts):
    """A copy of the shipped perceptron, free to be broken."""
    return shutil.copytree(artifacts / "digits" / "2", tmp_path / "2")


def _edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def _rehash(directory, blob):
    from hashlib import sha256

    (directory / "model.npz").write_bytes(blob)
    _edit(directory, files={"model.npz": sha256(blob).hexdigest()})


def _arrays(directory, **changes):
    from model_servers.manifest import packed

    with np.load(directory / "model.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    _rehash(directory, packed({name: value for name, value in {**arrays, **changes}.items() if value is not None}))


def _pickled(directory):
    import io

    buffer = io.BytesIO()
    np.savez(buffer, weight_0=np.array([{"a": 1}], dtype=object))
    _rehash(directory, buffer.getvalue())


BROKEN = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "manifest no json": (lambda d: (d / "manifest.json").write_text("{"), "not JSON"),
    "manifest a list": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json"),
    "format unknown": (lambda d: _edit(d, format=2), "this server reads format 1"),
    "a name with a slash": (lambda d: _edit(d, name="a/b"), "name is 'a/b'"),
    "a version with a line break": (lambda d: _edit(d, version="1\r\nx: y"), "use letters, digits"),
    "no outputs": (lambda d: _edit(d, outputs=[]), "outputs must list"),
    "a datatype unknown": (
        lambda d: _edit(d, inputs=[{"name": "x", "datatype": "FP8", "shape": [1]}]),
        "'FP8' is none",
    ),
    "a shape of zero": (lambda d: _edit(d, inputs=[{"name": "x", "datatype": "FP32", "shape": [0]}]), "shape [0]"),
    "prediction no output": (lambda d: _edit(d, prediction="x"), "'x', which is no output"),
    "backend unknown": (lambda d: _edit(d, backend="torch"), "'torch' is none of"),
    "examples too narrow": (lambda d: _edit(d, examples={"pixels": [[1, 2]]}), "examples do not fit"),
    "examples text": (lambda d: _edit(d, examples={"pixels": [["a"] * 64]}), "examples do not fit"),
    "file missing": (lambda d: (d / "model.npz").unlink(), "No such file"),
    "file corrupt": (lambda d: _flip(d / "model.npz"), "the manifest says"),
    "file cut short": (lambda d: (d / "model.npz").write_bytes(b"PK"), "the manifest says"),
    "file not listed": (lambda d: _edit(d, files={}), "does not name model.npz"),
    "no npz": (lambda d: _rehash(d, b"hello"), "not a readable .npz"),
    "pickle inside": (_pickled, "not a readable .npz"),
    "an array missing": (lambda d: _arrays(d, bias_1=None), "do not form dense layers"),
    "layers that do not fit": (lambda d: _arrays(d, bias_1=np.zeros(9, np.float32)), "do not form dense layers"),
    "a wrong width": (lambda d: _arrays(d, weight_0=np.zeros((63, 32), np.float32)), "fails on its own example"),
    "weights not finite": (lambda d: _arrays(d, bias_1=np.full(10, np.nan, np.float32)), "not finite"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_version_is_refused_with_a_sentence_that_names_it(version, fault):
    damage, sentence = BROKEN[fault]
    damage(version)
    with pytest.raises(ArtifactError) as error:
        load(newest(version))
    assert sentence in str(error.value)
    assert str(version) in str(error.value)
    assert "\n" not in str(error.value)


PYTHON_FAULTS = {
    "no entry": ("", {"entry": None}, "needs options"),
    "no such file": ("", {"entry": "other.py:load"}, "does not name other.py"),
    "no such function": ("x = 1", {}, "no attribute 'load'"),
    "a syntax error": ("def load(:", {}, "SyntaxError"),
    "load raises": ("def load(d): raise OSError('no weights')", {}, "no weights"),
    "no callable": ("def load(d): return 5", {}, "int, not a callable"),
    "an output missing": ("def load(d): return lambda i: {}", {}, "output 'y' is NoneType"),
    "rows lost": ("def load(d): return lambda i: {'y': i['x'][:0]}", {}, "shape [0] for 1 rows"),
}


@pytest.mark.parametrize("fault", PYTHON_FAULTS)
def test_a_faulty_model_of_ones_own_is_refused_with_its_own_error(tmp_path, python_model, fault):
    code, options, sentence = PYTHON_FAULTS[fault]
    directory = python_model(tmp_path, code, [("x", "FP32", [-1])], [("y", "FP32", [-1])], options=options)
    with pytest.raises(ArtifactError) as error:
        load(directory)
    assert sentence in str(error.value)


def test_the_highest_number_is_the_newest_version(tmp_path, artifacts):
    for name in ("9", "10", "1", "broken"):
        shutil.copytree(artifacts / "digits" / "1", tmp_path / name)
    (tmp_path / "broken" / "manifest.json").unlink()
    assert newest(tmp_path).name == "10"


def test_the_shipped_manifests_tell_accuracy_and_hashes(artifacts):
    accuracy = {}
    for directory in (artifacts / "digits" / "1", artifacts / "digits" / "2"):
        manifest = read_manifest(directory)
        assert manifest.metrics["held_out"] == 599
        accuracy[manifest.version] = manifest.metrics["accuracy"]
    assert 0.9 < accuracy["1-logistic"] < accuracy["2-mlp"] < 1
    assert sum(path.stat().st_size for path in artifacts.rglob("*") if path.is_file()) < 200_000


def _run(*arguments):
    command = [sys.executable, "-m", "model_servers", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_model_that_cannot_be_served_ends_the_start_with_one_line_and_exit_1(version, tmp_path):
    _flip(version / "model.npz")
    done = _run(version, "--listen", f"unix:{tmp_path}/s")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"model_servers: {version}/model.npz: sha256 is ")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_named_and_exits_1(artifacts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = _run(artifacts / "digits" / "1", "--listen", address)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"model_servers: cannot listen on {address}: Address already in use; stop what uses it or choose another\n"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--listen", "nowhere"], "neither unix:PATH nor HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "neither unix:PATH nor HOST:PORT"),
        (["--arm", "both", "--listen", "unix:x"], "--arm"),
        (["--listen", "unix:x", "--drain", "-1"], "between 0 and 3600"),
        (["--listen", "unix:x", "--fault", "error_rate=1"], "--fault needs --allow-faults"),
        (["--listen", "unix:x", "--allow-faults", "--fault", "speed=1"], "unknown fault 'speed'"),
        (["--listen", "unix:x", "--statsd", "nope"], "--statsd"),
        ([], "--listen"),
    ],
)
def test_usage_errors_exit_2(artifacts, options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        read_arguments([str(artifacts / "digits" / "1"), *options])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_unix_socket_is_private_and_a_stale_one_is_replaced(start_server, artifacts, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = start_server(artifacts / "digits" / "1", "--drain", "0", path=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    done = _run(artifacts / "digits" / "1", "--listen", f"unix:{path}")
    assert done.returncode == 1
    assert "another process serves there" in done.stderr
    assert server.request("GET", "/v2/health/ready").status == 200
    assert server.stop() == 0
    assert not path.exists()

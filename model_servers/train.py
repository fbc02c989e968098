"""Trains the two digits models on scikit-learn's bundled data and writes them as artifacts.

`python -m model_servers.train [--out DIR] [--onnx]` makes DIR/1 (logistic regression, the stable model), DIR/2 (a small
multilayer perceptron, the canary) and with --onnx DIR-onnx/2, the same perceptron as an ONNX graph. Fixed seeds, one
thread, weights rounded to float32: with the locked versions and one kind of processor the files are the same bit for
bit. This is the only module that needs scikit-learn.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model_servers.dense import dense_softmax
from model_servers.manifest import ARRAYS, Manifest, packed, write_artifact
from model_servers.onnxexport import dense_softmax_graph
from model_servers.onnxmodel import GRAPH
from model_servers.tensors import Tensor, TensorSpec

ARTIFACTS = Path(__file__).parent / "artifacts" / "digits"
SEED = 20261124
PIXEL_MAX = 16.0  # the data set's pixels run from 0 to 16
EXAMPLES = 8  # rows kept in the manifest for warm-up


@dataclass(frozen=True, slots=True)
class Digits:
    """Two thirds to learn from, one third held out; pixels float64 [n, 64] in 0..16, labels int64 [n]."""

    train_pixels: Tensor
    test_pixels: Tensor
    train_labels: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The bundled 1,797 handwritten digits, split stratified by label with a fixed seed."""
    from sklearn.datasets import load_digits as bundled  # noqa: PLC0415  only training needs scikit-learn
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = bundled(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=1 / 3, random_state=SEED, stratify=labels)
    return Digits(*parts)


def train_logistic(digits: Digits) -> dict[str, Tensor]:
    """One dense layer: multinomial logistic regression on pixels / 16."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    model = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8)
    model.fit(digits.train_pixels / PIXEL_MAX, digits.train_labels)
    return _layers([model.coef_.T], [model.intercept_])


def train_mlp(digits: Digits) -> dict[str, Tensor]:
    """Two dense layers, 64 > 32 > 10, rectified, on pixels / 16."""
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

    model = MLPClassifier((32,), alpha=1e-3, learning_rate_init=5e-3, max_iter=300, tol=1e-5, random_state=SEED)
    model.fit(digits.train_pixels / PIXEL_MAX, digits.train_labels)
    return _layers(model.coefs_, model.intercepts_)


def _layers(weights: list[Any], biases: list[Any]) -> dict[str, Tensor]:
    """Named float32 arrays; the scaling of the pixels is folded into the first layer, so clients send raw pixels."""
    scaled = [weights[0] / PIXEL_MAX, *weights[1:]]
    arrays: dict[str, Tensor] = {}
    for index, (weight, bias) in enumerate(zip(scaled, biases, strict=True)):
        arrays[f"weight_{index}"] = np.ascontiguousarray(weight, dtype=np.float32)
        arrays[f"bias_{index}"] = np.ascontiguousarray(bias, dtype=np.float32)
    return arrays


def digits_manifest(version: str, arrays: dict[str, Tensor], digits: Digits) -> Manifest:
    """The manifest of a digits model, with its accuracy on the held-out third and a few of those rows as examples."""
    predict = dense_softmax(arrays, "pixels")
    found = predict({"pixels": digits.test_pixels.astype(np.float32)}, {})["label"]
    accuracy = float(np.mean(found == digits.test_labels))
    return Manifest(
        name="digits",
        version=version,
        backend="dense-softmax",
        inputs=(TensorSpec("pixels", "FP32", (-1, 64)),),
        outputs=(TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 10))),
        prediction="label",
        examples={"pixels": digits.test_pixels[:EXAMPLES].astype(int).tolist()},
        metrics={"accuracy": round(accuracy, 6), "held_out": len(digits.test_labels)},
    )


def train(out: Path, *, onnx: bool = False) -> list[Manifest]:
    """Writes the version directories under `out` and returns their manifests."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # noqa: PLC0415  scikit-learn brings it

    digits = load_digits()
    manifests = []
    with threadpool_limits(limits=1):  # the order of additions, and so the last bit, depends on the number of threads
        for number, version, fit in (("1", "1-logistic", train_logistic), ("2", "2-mlp", train_mlp)):
            arrays = fit(digits)
            manifest = digits_manifest(version, arrays, digits)
            manifests.append(write_artifact(out / number, manifest, {ARRAYS: packed(arrays)}))
    if onnx:
        graph = dense_softmax_graph(arrays, "pixels")
        same = replace(manifest, version=f"{manifest.version}-onnx", backend="onnx")
        manifests.append(write_artifact(out.with_name(f"{out.name}-onnx") / "2", same, {GRAPH: graph}))
    return manifests


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m model_servers.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of the version directories")
    parser.add_argument("--onnx", action="store_true", help="also the perceptron as ONNX, in DIR-onnx (needs onnx)")
    given = parser.parse_args()
    try:
        manifests = train(given.out, onnx=given.onnx)
    except ModuleNotFoundError as error:
        raise SystemExit(f"training needs {error.name}: pip install 'perch[train,onnx]'") from None
    for manifest in manifests:
        metrics = manifest.metrics
        print(f"{manifest.version}: accuracy {metrics['accuracy']:.4f} on {metrics['held_out']} held-out digits")  # noqa: T201


if __name__ == "__main__":
    main()

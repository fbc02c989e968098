"""The held-out digits that come with perch; digits.md says where they are from."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("digits.npz")


@dataclass(frozen=True, slots=True)
class Digit:
    """One image as the body of an inference request, and what it shows."""

    body: bytes
    label: str


def load_digits() -> list[Digit]:
    """All of them, in the order of the file."""
    with np.load(FILE, allow_pickle=False) as arrays:
        pixels, labels = arrays["pixels"].tolist(), arrays["labels"].tolist()
    return [Digit(inference(row), str(label)) for row, label in zip(pixels, labels, strict=True)]


def inference(pixels: list[int]) -> bytes:
    """An Open Inference Protocol request of one image, 64 values from 0 to 16."""
    image = {"name": "pixels", "shape": [1, len(pixels)], "datatype": "FP32", "data": pixels}
    return json.dumps({"inputs": [image]}, separators=(",", ":")).encode()

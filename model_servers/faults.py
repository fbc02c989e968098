"""Faults on purpose, for rehearsals: a canary that errs, slows down, hangs, drifts or leaks. Off unless allowed.

A fault set is given at start (`--fault error_rate=0.1`, several times) or through PUT /perch/faults; both replace the
whole set. Times in milliseconds.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from model_servers.errors import Refused
from model_servers.manifest import Manifest
from model_servers.tensors import Tensor

LONGEST_MS = 600_000.0
LEAK_LIMIT_BYTES = 1 << 30  # a rehearsal must not take the machine down


class Injected(Exception):  # noqa: N818  a fault that was asked for, not an error
    """The request fails because `error_rate` says so."""


@dataclass(frozen=True, slots=True)
class Faults:
    """One set. The defaults are: no fault."""

    error_rate: float = 0.0  # share of requests answered 500
    hang_rate: float = 0.0  # share of requests that never get an answer
    latency_ms: float = 0.0  # added to each answer: the mean of the distribution
    latency_kind: str = "fixed"  # fixed, uniform (0 to twice the mean) or exponential
    label_map: Mapping[str, str] = field(default_factory=dict)  # predictions to replace, as text: {"3": "8"}
    score_shift: float = 0.0  # added to every value of every float output
    leak_bytes: int = 0  # memory kept per request, up to 1 GiB in all
    decay_ms: float = 0.0  # latency added per 1,000 requests answered since the set was put in force
    seed: int = 0


def read_faults(document: object) -> Faults:
    """A fault set from a JSON object. Raises Refused with a sentence that names the field."""
    if not isinstance(document, dict):
        raise Refused("a fault set is a JSON object")
    known = {entry.name for entry in fields(Faults)}
    for name, value in document.items():
        if name not in known:
            raise Refused(f"unknown fault {name!r}; there are {', '.join(sorted(known))}")
        _check(name, value)
    return Faults(**document)


def parse_fault(text: str) -> tuple[str, Any]:
    """`name=value` of the command line; label_map as `3:8,5:6`. Raises Refused."""
    name, equals, value = text.partition("=")
    if not equals:
        raise Refused(f"{text!r} is not NAME=VALUE")
    if name == "label_map":
        return name, dict(pair.split(":", 1) for pair in value.split(",") if ":" in pair)
    if name == "latency_kind":
        return name, value
    try:
        return name, int(value) if name in {"leak_bytes", "seed"} else float(value)
    except ValueError:
        raise Refused(f"{name}: {value!r} is not a number") from None


def _check(name: str, value: object) -> None:
    match name:
        case "error_rate" | "hang_rate":
            fits = _number(value, 0, 1)
        case "latency_ms" | "decay_ms":
            fits = _number(value, 0, LONGEST_MS)
        case "score_shift":
            fits = _number(value, -1e9, 1e9)
        case "leak_bytes" | "seed":
            fits = type(value) is int and 0 <= value <= LEAK_LIMIT_BYTES
        case "latency_kind":
            fits = value in {"fixed", "uniform", "exponential"}
        case _:
            fits = isinstance(value, dict) and all(isinstance(target, str) for target in value.values())
    if not fits:
        raise Refused(f"fault {name} cannot be {value!r}")


def _number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


class FaultBox:
    """The set in force, its random numbers and what it has leaked; another set is another box."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._random = random.Random(faults.seed)  # noqa: S311  a rehearsal that can be repeated, no secret
        self._answered = 0
        self._leaked: list[bytes] = []

    async def before(self) -> None:
        """Errs, hangs, waits and leaks as the set says. Raises Injected."""
        faults = self.faults
        self._answered += 1
        if faults.leak_bytes and faults.leak_bytes * len(self._leaked) < LEAK_LIMIT_BYTES:
            self._leaked.append(b"\x01" * faults.leak_bytes)
        if self._random.random() < faults.hang_rate:
            await asyncio.Event().wait()
        delay_ms = self._delay_ms(faults)
        if delay_ms:
            await asyncio.sleep(delay_ms / 1000)
        if self._random.random() < faults.error_rate:
            raise Injected

    def after(self, outputs: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
        """The outputs, bent as the set says."""
        faults = self.faults
        if faults.score_shift:
            outputs = {name: _shifted(array, faults.score_shift) for name, array in outputs.items()}
        if faults.label_map:
            bent = _mapped(outputs[manifest.prediction], faults.label_map)
            outputs = {**outputs, manifest.prediction: bent}
        return outputs

    def _delay_ms(self, faults: Faults) -> float:
        mean_ms = faults.latency_ms
        decay_ms = faults.decay_ms * self._answered / 1000
        match faults.latency_kind:
            case "uniform":
                mean_ms = self._random.uniform(0, 2 * mean_ms)
            case "exponential" if mean_ms:
                mean_ms = self._random.expovariate(1 / mean_ms)
        return min(mean_ms + decay_ms, LONGEST_MS)


def _shifted(array: Tensor, shift: float) -> Tensor:
    return (array + shift).astype(array.dtype) if array.dtype.kind == "f" else array


def _mapped(array: Tensor, mapping: Mapping[str, str]) -> Tensor:
    """Predictions whose text is a key of `mapping` replaced; a target the datatype cannot hold is left out."""
    bent = array.copy()
    for source, target in mapping.items():
        if array.dtype.kind == "O":
            hit = np.array([item == source.encode() for item in array.ravel()], dtype=bool).reshape(array.shape)
            bent[hit] = target.encode()
        else:
            bent[array.astype(str) == source] = array.dtype.type(float(target))
    return bent

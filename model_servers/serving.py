"""One version in service: reading a request, its call through the batcher, writing its answer; and warming up.

Warm means that this very path has been run with the manifest's examples until its latency settled.

Warm-up rule: requests of one row are answered, each fifth one with a full batch. The path has settled when, of the
one-row requests, the median of the last 8 is at most 1.2 times the lowest median of any 8 in a row before. At least 24
and at most 400 requests, and no longer than `longest_s`; what has not settled by then is served and said to be so.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from model_servers import jsontext
from model_servers.answers import write_answer
from model_servers.batching import Batcher, BatchSeen, Limits, Waiting
from model_servers.model import Model, Tensors, example_inputs
from model_servers.protocol import Inference, read_inference
from model_servers.tensors import Tensor

INLINE_MS = 2.0  # a full batch that takes longer is computed in a thread, so that the loop goes on answering
_WINDOW = 8
_FEWEST, _MOST = 24, 400
_SETTLED = 1.2


@dataclass(frozen=True, slots=True)
class Warmth:
    """How warming up went. Times of one-row requests in milliseconds."""

    requests: int
    seconds: float
    first_ms: float
    settled_ms: float
    settled: bool


@dataclass(frozen=True, slots=True)
class Served:
    """A warm version; published by one assignment and read once per request."""

    model: Model
    batcher: Batcher
    executor: Executor | None
    warmth: Warmth

    @property
    def threaded(self) -> bool:
        """Whether the model runs off the event loop."""
        return self.executor is not None

    async def retire(self) -> None:
        """Lets the last requests of a replaced version finish, then frees its thread."""
        while not self.batcher.idle:  # noqa: ASYNC110  an event would cost every batch something, this costs nobody
            await asyncio.sleep(0.05)
        if self.executor is not None:
            self.executor.shutdown(wait=False)


def queued(model: Model, inference: Inference, deadline_s: float) -> Waiting:
    """A read request as the batcher takes it. `deadline_s` is of the loop's clock."""
    return Waiting(inference.inputs, inference.parameters, inference.rows, _key(model, inference), deadline_s)


def _key(model: Model, inference: Inference) -> Any:
    """What must be equal for two requests to share a call."""
    manifest = model.manifest
    if not manifest.batched:
        return id(inference)  # never shared
    if manifest.fixed and not inference.parameters:
        return None
    shapes = tuple(inference.inputs[spec.name].shape[1:] for spec in manifest.inputs)
    uses = manifest.options.get("parameters") is True
    return (shapes, jsontext.write(inference.parameters) if uses else b"")


async def warm_up(
    model: Model, limits: Limits, seen: Callable[[BatchSeen], None] | None, longest_s: float = 5.0
) -> Served:
    """Measures where the model should run, then runs the real path until it has settled; once, however slow it is."""
    start_s = perf_counter()
    full = limits.max_rows if model.manifest.batched else 1
    slow = await asyncio.to_thread(_fastest_ms, model, full) > INLINE_MS
    executor = ThreadPoolExecutor(1, thread_name_prefix="model") if slow else None
    batcher = Batcher(model.run, limits, executor, seen)
    single, whole = _example_body(model, 1), _example_body(model, full)
    taken_ms: list[float] = []
    settled = False
    requests = 0
    while not requests or (requests < _MOST and perf_counter() - start_s < longest_s and not settled):
        requests += 1
        body = whole if requests % 5 == 0 else single
        took_ms = await _time_ms(model, batcher, body)
        if body is single:
            taken_ms.append(took_ms)
        settled = requests >= _FEWEST and _has_settled(taken_ms)
    warmth = Warmth(requests, perf_counter() - start_s, taken_ms[0], median(taken_ms[-_WINDOW:]), settled)
    return Served(model, batcher, executor, warmth)


def _has_settled(taken_ms: list[float]) -> bool:
    medians = [median(taken_ms[i : i + _WINDOW]) for i in range(len(taken_ms) - _WINDOW + 1)]
    return len(medians) > 1 and medians[-1] <= _SETTLED * min(medians[:-1])


async def _time_ms(model: Model, batcher: Batcher, body: bytes) -> float:
    start_s = perf_counter()
    inference = read_inference(body, None, model.manifest)
    deadline_s = asyncio.get_running_loop().time() + 60
    write_answer(inference, await batcher.infer(queued(model, inference, deadline_s)), model.manifest)
    return (perf_counter() - start_s) * 1000


def _fastest_ms(model: Model, rows: int) -> float:
    """The shortest of up to three calls with `rows` rows; a slow model is called once."""
    inputs: Tensors = example_inputs(model.manifest, rows)
    fastest_ms = np.inf
    for _ in range(3):
        start_s = perf_counter()
        model.run(inputs, {})
        fastest_ms = min(fastest_ms, (perf_counter() - start_s) * 1000)
        if fastest_ms > 100 * INLINE_MS:
            break
    return fastest_ms


def _example_body(model: Model, rows: int) -> bytes:
    """A JSON request with the manifest's examples, as a client would send it."""
    arrays = example_inputs(model.manifest, rows)
    return jsontext.write({"inputs": [_tensor(spec.metadata(), arrays[spec.name]) for spec in model.manifest.inputs]})


def _tensor(metadata: dict[str, Any], array: Tensor) -> dict[str, Any]:
    flat = array.ravel().tolist()
    data = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in flat]
    return {**metadata, "shape": list(array.shape), "data": data}

"""Micro-batching: requests that are there at the same time share one call of the model.

When a batch leaves. A request never waits for company that is not already on its way. The model is called as soon as
it is free and one of these holds:

1. nobody else is on the way: no other request's body is still arriving. A lone request leaves at once;
2. `max_rows` rows are waiting;
3. the oldest waiting request has waited `max_wait_s`.

Requests that arrive in one pass of the event loop, or the next, are all there before the first of them leaves, and
those that arrive while the model works leave together when it is free: under load batches form by themselves.

Only requests of one key (equal shapes behind the rows, equal parameters where the model reads them) share a call. When
a shared call fails, each of its requests is tried alone, so that a poisoned one fails by itself. A request whose client
went away, or whose deadline passed, leaves its place in the queue and is not computed.
"""

import asyncio
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any

import numpy as np

from model_servers.errors import Refused
from model_servers.tensors import Tensor

Tensors = Mapping[str, Tensor]
Run = Callable[[Tensors, Mapping[str, Any]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one model's queue."""

    max_rows: int = 128  # of one call; a single request with more still goes, alone
    max_wait_s: float = 0.002
    max_queue: int = 1024  # requests that wait; more are answered 503


@dataclass(frozen=True, slots=True)
class BatchSeen:
    """What one call of the model looked like, for telemetry."""

    requests: int
    rows: int
    queue_s: float  # how long its oldest request had waited
    inference_s: float


@dataclass(slots=True, eq=False)
class Waiting:
    """One queued request."""

    inputs: Tensors
    parameters: Mapping[str, Any]
    rows: int
    key: Hashable
    deadline_s: float  # of the loop's clock
    queued_s: float = 0.0
    answer: asyncio.Future[dict[str, Tensor]] = field(init=False)


Result = dict[str, Tensor] | Exception


class Batcher:
    """The queue in front of one model version. Lives on one event loop.

    `executor` None calls the model on the loop, right for calls much shorter than a millisecond; else one call at a
    time runs there.
    """

    def __init__(
        self,
        run: Run,
        limits: Limits,
        executor: Executor | None = None,
        seen: Callable[[BatchSeen], None] | None = None,
    ) -> None:
        self._run = run
        self._limits = limits
        self._executor = executor
        self._seen = seen
        self._loop = asyncio.get_running_loop()
        self._queue: dict[Waiting, None] = {}  # in order of arrival; a dict so that any place can be freed at once
        self._arriving = 0
        self._running = False
        self._leaving = False  # a call of _leave is scheduled

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Marks a request whose body is still on its way, for at most `max_wait_s`: a slow one delays nobody longer."""
        self._arriving += 1
        expiry = self._loop.call_later(self._limits.max_wait_s, self._arrived)
        try:
            yield
        finally:
            if not expiry.cancelled() and expiry.when() > self._loop.time():
                expiry.cancel()
                self._arrived()

    async def infer(self, waiting: Waiting) -> dict[str, Tensor]:
        """The outputs for one request. Raises Refused (503 full, 504 too late) or what the model raised for it."""
        if len(self._queue) >= self._limits.max_queue:
            raise Refused("the queue is full; try again in a second", HTTPStatus.SERVICE_UNAVAILABLE)
        waiting.queued_s = self._loop.time()
        waiting.answer = self._loop.create_future()
        self._queue[waiting] = None
        self._leave_soon()
        try:
            if self._executor is None:  # nothing waits longer than the pass of the loop that is going on
                return await waiting.answer
            async with asyncio.timeout_at(waiting.deadline_s):
                return await waiting.answer
        except TimeoutError:
            raise _too_late() from None
        finally:
            self._queue.pop(waiting, None)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._queue and not self._running

    def _arrived(self) -> None:
        self._arriving -= 1
        self._leave_soon()

    def _leave_soon(self) -> None:
        if not self._leaving and not self._running and self._queue:
            self._leaving = True
            # Not this pass of the loop but the end of the next: what the sockets hold by now joins in. An idle loop
            # runs through an empty pass in microseconds, so that a lone request does not notice.
            self._loop.call_soon(self._loop.call_soon, self._leave)

    def _leave(self) -> None:
        self._leaving = False
        if self._running or not self._queue or not self._due():
            return
        batch = self._take()
        if not batch:
            self._leave_soon()
        elif self._executor is None:
            self._answer(batch, compute(self._run, batch))
        else:
            self._running = True
            future = self._loop.run_in_executor(self._executor, compute, self._run, batch)
            future.add_done_callback(lambda done: self._finish(batch, done))

    def _due(self) -> bool:
        if not self._arriving:
            return True
        left_s = next(iter(self._queue)).queued_s + self._limits.max_wait_s - self._loop.time()
        if left_s <= 0 or sum(waiting.rows for waiting in self._queue) >= self._limits.max_rows:
            return True
        self._loop.call_later(left_s, self._leave_soon)
        return False

    def _take(self) -> list[Waiting]:
        """The oldest request and those that may share its call, off the queue; those that are too late get told."""
        now_s = self._loop.time()
        batch: list[Waiting] = []
        rows = 0
        for waiting in list(self._queue):
            if rows >= self._limits.max_rows:
                break
            if waiting.answer.done():
                del self._queue[waiting]
            elif waiting.deadline_s <= now_s:
                del self._queue[waiting]
                waiting.answer.set_exception(_too_late())
            elif not batch or (waiting.key == batch[0].key and rows + waiting.rows <= self._limits.max_rows):
                del self._queue[waiting]
                batch.append(waiting)
                rows += waiting.rows
        return batch

    def _finish(self, batch: list[Waiting], done: asyncio.Future[tuple[list[Result], float]]) -> None:
        self._running = False
        if done.cancelled() or done.exception() is not None:
            failure = RuntimeError("the executor was shut down")
            self._answer(batch, ([failure] * len(batch), 0.0))
        else:
            self._answer(batch, done.result())

    def _answer(self, batch: list[Waiting], computed: tuple[list[Result], float]) -> None:
        results, inference_s = computed
        for waiting, result in zip(batch, results, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(result, Exception):
                waiting.answer.set_exception(result)
            else:
                waiting.answer.set_result(result)
        if self._seen is not None:
            queue_s = max(self._loop.time() - batch[0].queued_s - inference_s, 0.0)
            self._seen(BatchSeen(len(batch), sum(w.rows for w in batch), queue_s, inference_s))
        self._leave_soon()


def compute(run: Run, batch: list[Waiting]) -> tuple[list[Result], float]:
    """One result per request of the batch, in its order, and the seconds it took. Never raises."""
    start_s = perf_counter()
    try:
        results: list[Result] = [*_together(run, batch)]
    except Exception as error:  # noqa: BLE001  any error of a model is that request's answer
        results = [error] if len(batch) == 1 else [_alone(run, waiting) for waiting in batch]
    return results, perf_counter() - start_s


def _together(run: Run, batch: list[Waiting]) -> list[dict[str, Tensor]]:
    first = batch[0]
    if len(batch) == 1:
        return [run(first.inputs, first.parameters)]
    merged = {name: np.concatenate([waiting.inputs[name] for waiting in batch]) for name in first.inputs}
    outputs = run(merged, first.parameters)
    results = []
    start = 0
    for waiting in batch:
        stop = start + waiting.rows
        results.append({name: array[start:stop] for name, array in outputs.items()})
        start = stop
    return results


def _alone(run: Run, waiting: Waiting) -> Result:
    try:
        return run(waiting.inputs, waiting.parameters)
    except Exception as error:  # noqa: BLE001  as above
        return error


def _too_late() -> Refused:
    return Refused("the deadline passed before the model was free", HTTPStatus.GATEWAY_TIMEOUT)

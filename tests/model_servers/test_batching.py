"""The micro-batcher alone, on a real event loop: who leaves when, and who gets what."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from model_servers.batching import Batcher, Limits, Waiting
from model_servers.errors import Refused


class Doubling:
    """Doubles its rows, remembers each call, fails on -1, and waits for `gate` if it is given one."""

    def __init__(self, gate=None):
        self.calls = []
        self.gate = gate
        self.started = threading.Event()

    def __call__(self, inputs, parameters):
        """One call of the model."""
        rows = inputs["x"]
        self.calls.append((rows[:, 0].tolist(), parameters))
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if -1 in rows:
            raise ValueError("poison")
        return {"y": rows * 2}


def waiting(*values, key=None, deadline_s=None, parameters=None):
    rows = np.array([[value] for value in values])
    loop_s = asyncio.get_running_loop().time()
    return Waiting({"x": rows}, parameters or {}, len(values), key, loop_s + 600 if deadline_s is None else deadline_s)


async def results(batcher, *requests):
    return await asyncio.gather(*(batcher.infer(request) for request in requests), return_exceptions=True)


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def test_requests_of_one_pass_share_a_call_and_each_gets_its_own_rows():
    model = Doubling()
    answers = await results(Batcher(model, Limits()), waiting(1), waiting(2, 3), waiting(4))
    assert model.calls == [([1, 2, 3, 4], {})]
    assert [answer["y"][:, 0].tolist() for answer in answers] == [[2], [4, 6], [8]]


async def test_a_lone_request_leaves_at_once_whatever_max_wait_says():
    batcher = Batcher(Doubling(), Limits(max_wait_s=3600))
    async with asyncio.timeout(10):
        answer = await batcher.infer(waiting(1))
    assert answer["y"].tolist() == [[2]]


async def test_a_request_waits_for_one_whose_body_is_arriving_and_shares_its_call():
    model = Doubling()
    batcher = Batcher(model, Limits(max_wait_s=3600))
    with batcher.arriving():
        first = asyncio.create_task(batcher.infer(waiting(1)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert model.calls == []
    await batcher.infer(waiting(2))
    await first
    assert model.calls == [([1, 2], {})]


async def test_a_full_batch_does_not_wait_for_anybody():
    model = Doubling()
    batcher = Batcher(model, Limits(max_wait_s=3600, max_rows=2))
    with batcher.arriving():
        await results(batcher, waiting(1), waiting(2))
    assert model.calls == [([1, 2], {})]


async def test_a_body_that_never_arrives_holds_others_for_max_wait_only():
    batcher = Batcher(Doubling(), Limits(max_wait_s=0.01))
    with batcher.arriving():
        async with asyncio.timeout(10):
            await batcher.infer(waiting(1))
            while batcher._arriving:  # noqa: ASYNC110  its mark expires by itself; later requests do not wait for it
                await asyncio.sleep(0.001)
    assert batcher._arriving == 0


async def test_max_rows_bounds_a_call_and_a_larger_request_goes_alone():
    model = Doubling()
    await results(Batcher(model, Limits(max_rows=2)), waiting(1), waiting(2, 3, 4), waiting(5))
    assert [values for values, _ in model.calls] == [[1, 5], [2, 3, 4]]


async def test_only_requests_of_one_key_share_a_call():
    model = Doubling()
    requests = [
        waiting(1, key="a", parameters={"k": 1}),
        waiting(2, key="b", parameters={"k": 2}),
        waiting(3, key="a", parameters={"k": 1}),
    ]
    await results(Batcher(model, Limits()), *requests)
    assert model.calls == [([1, 3], {"k": 1}), ([2], {"k": 2})]


async def test_a_poisoned_request_fails_alone():
    answers = await results(Batcher(Doubling(), Limits()), waiting(1), waiting(-1), waiting(3))
    assert answers[0]["y"].tolist() == [[2]]
    assert isinstance(answers[1], ValueError)
    assert answers[2]["y"].tolist() == [[6]]


async def test_a_full_queue_is_a_503(thread):
    gate = threading.Event()
    model = Doubling(gate)
    batcher = Batcher(model, Limits(max_queue=1), thread)
    running = asyncio.create_task(batcher.infer(waiting(1)))
    await asyncio.to_thread(model.started.wait, 20)
    queued = asyncio.create_task(batcher.infer(waiting(2)))
    await asyncio.sleep(0)
    with pytest.raises(Refused, match="queue is full") as refusal:
        await batcher.infer(waiting(3))
    assert refusal.value.status == 503
    gate.set()
    await asyncio.gather(running, queued)
    assert batcher.idle


async def test_a_client_that_goes_away_frees_its_place_and_is_not_computed(thread):
    gate = threading.Event()
    model = Doubling(gate)
    batcher = Batcher(model, Limits(max_queue=1), thread)
    running = asyncio.create_task(batcher.infer(waiting(1)))
    await asyncio.to_thread(model.started.wait, 20)
    gone = asyncio.create_task(batcher.infer(waiting(2)))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    after = asyncio.create_task(batcher.infer(waiting(3)))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(running, after)
    assert [values for values, _ in model.calls] == [[1], [3]]


async def test_a_request_whose_deadline_passes_is_a_504_even_while_the_model_hangs(thread):
    gate = threading.Event()
    model = Doubling(gate)
    batcher = Batcher(model, Limits(), thread)
    running = asyncio.create_task(batcher.infer(waiting(1)))
    await asyncio.to_thread(model.started.wait, 20)
    now_s = asyncio.get_running_loop().time()
    with pytest.raises(Refused, match="deadline") as refusal:
        await batcher.infer(waiting(2, deadline_s=now_s + 0.01))
    assert refusal.value.status == 504
    gate.set()
    await running
    assert [values for values, _ in model.calls] == [[1]]


async def test_a_request_that_is_already_too_late_is_not_computed():
    model = Doubling()
    answers = await results(Batcher(model, Limits()), waiting(1, deadline_s=0.0), waiting(2))
    assert isinstance(answers[0], Refused)
    assert model.calls == [([2], {})]


async def test_requests_that_arrive_while_the_model_works_leave_together(thread):
    gate = threading.Event()
    model = Doubling(gate)
    batcher = Batcher(model, Limits(), thread)
    first = asyncio.create_task(batcher.infer(waiting(1)))
    await asyncio.to_thread(model.started.wait, 20)
    later = [asyncio.create_task(batcher.infer(waiting(value))) for value in (2, 3, 4)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *later)
    assert [values for values, _ in model.calls] == [[1], [2, 3, 4]]


async def test_thousands_of_requests_of_all_sizes_get_their_own_answers(thread):
    batcher = Batcher(Doubling(), Limits(max_rows=16, max_queue=10_000), thread)
    requests = [tuple(range(i, i + 1 + i % 5)) for i in range(3_000)]
    answers = await results(batcher, *(waiting(*values) for values in requests))
    assert [answer["y"][:, 0].tolist() for answer in answers] == [[2 * v for v in values] for values in requests]
    assert batcher.idle

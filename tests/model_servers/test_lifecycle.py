"""The process as Envoy and its supervisor see it: warming, draining, reloading."""

import json
import shutil
import signal
import threading
import time

import pytest

from model_servers.batching import Limits
from model_servers.model import load
from model_servers.serving import warm_up

GATED = """
import pathlib, time

def load(directory):
    flag = pathlib.Path({flag!r})

    def predict(inputs):
        if (inputs["x"] > 1).any():
            flag.with_suffix(".started").touch()
            while not flag.exists():
                time.sleep(0.01)
        else:
            time.sleep({pause_s})
        return {{"y": inputs["x"]}}

    return predict
"""
DEADLINE_S = 60
SLOW_S = 0.003  # above the 2 ms at which a model moves to a thread


@pytest.fixture
def gated(tmp_path, python_model):
    """A model that holds a request with x > 1 until `flag` exists; slow enough to run in a thread."""
    flag = tmp_path / "go"
    code = GATED.format(flag=str(flag), pause_s=SLOW_S)
    directory = python_model(tmp_path / "model", code, [("x", "FP32", [-1])], [("y", "FP32", [-1])])
    return directory, flag


def _ask(server, value):
    document = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [value]}]}
    return server.infer(document, "own")


def _refuses(server):
    connection = server.connect()
    try:
        connection.connect()
    except OSError:
        return True
    finally:
        connection.close()
    return False


def _wait_until(condition):
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"waited {DEADLINE_S} s in vain"
        threading.Event().wait(0.01)


def test_sigterm_is_not_ready_at_once_but_answers_while_it_drains(start_server, artifacts, pixels):
    server = start_server(artifacts / "digits" / "2", "--drain", "3600")
    connection = server.connect()
    assert server.exchange(connection, "GET", "/v2/health/ready").status == 200
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    for path in ("/v2/health/ready", "/v2/models/digits/ready"):
        reply = server.request("GET", path)
        assert (reply.status, reply.json["reason"]) == (503, "draining")
    assert server.request("GET", "/v2/health/live").status == 200
    body = json.dumps(pixels(1))
    reply = server.exchange(connection, "POST", "/v2/models/digits/infer", body, {"Content-Type": "application/json"})
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    connection.close()


def test_the_drain_is_over_after_two_check_intervals_and_nothing_is_left(start_server, artifacts):
    server = start_server(artifacts / "digits" / "2", "--check-interval", "0.5")
    began_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for("draining").endswith(" for 1 s")
    assert server.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - began_s >= 1
    assert not server.socket.exists()
    assert server.process.stderr.read() == b""


def test_a_request_in_flight_outlives_the_listener(start_server, gated):
    directory, flag = gated
    server = start_server(directory, "--drain", "0", "--deadline", "3600")
    assert "in a thread" in server.ready_line
    replies = []
    client = threading.Thread(target=lambda: replies.append(_ask(server, 5.0)))
    client.start()
    _wait_until(flag.with_suffix(".started").exists)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    _wait_until(lambda: not _connects(server))
    flag.touch()
    client.join(DEADLINE_S)
    assert [reply.status for reply in replies] == [200]
    assert server.process.wait(DEADLINE_S) == 0


def _connects(server):
    connection = server.connect()
    try:
        connection.connect()
    except OSError:
        return False
    finally:
        connection.close()
    return True


def test_a_second_signal_cuts_the_drain_short(start_server, artifacts):
    server = start_server(artifacts / "digits" / "1", "--drain", "3600")
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    assert server.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("closed", [False, True], ids=["at once", "once the listener is closed"])
def test_a_second_signal_does_not_wait_for_a_request_that_never_ends(start_server, artifacts, pixels, closed):
    server = start_server(artifacts / "digits" / "1", "--drain", "0", "--allow-faults", "--fault", "hang_rate=1")
    connection = server.connect()
    connection.request("POST", "/v2/models/digits/infer", json.dumps(pixels(1)))
    server.request("GET", "/v2/health/live")  # by now the first request is in its hang
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    if closed:
        _wait_until(lambda: _refuses(server))
    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(10) == 0  # shorter than the 15 s that requests in flight are given
    finally:
        connection.close()


def test_a_model_without_a_row_axis_gets_one_request_per_call(start_server, tmp_path, python_model):
    code = """
def load(directory):
    def predict(inputs):
        assert inputs["x"].shape == (3,)
        return {"y": inputs["x"].sum(keepdims=True)}
    return predict
"""
    directory = python_model(tmp_path, code, [("x", "INT32", [3])], [("y", "INT32", [1])])
    server = start_server(directory, "--drain", "0")
    document = {"inputs": [{"name": "x", "shape": [3], "datatype": "INT32"}]}
    replies = {}

    def ask(number):
        document_n = {"inputs": [{**document["inputs"][0], "data": [number] * 3}]}
        replies[number] = server.infer(document_n, "own").json["outputs"][0]["data"]

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(DEADLINE_S)
    assert replies == {number: [3 * number] for number in range(20)}


def test_a_server_is_alive_but_not_ready_while_it_warms(start_server, tmp_path, python_model):
    flag = tmp_path / "go"
    code = f"""
import pathlib, threading, time
def load(directory):
    def predict(inputs):
        if threading.current_thread() is not threading.main_thread():
            while not pathlib.Path({str(flag)!r}).exists():
                time.sleep(0.01)
        return {{"y": inputs["x"]}}
    return predict
"""
    directory = python_model(tmp_path / "model", code, [("x", "FP32", [-1])], [("y", "FP32", [-1])])
    server = start_server(directory, "--drain", "0", ready=False)
    _wait_until(lambda: _connects(server))
    assert server.request("GET", "/v2/health/live").status == 200
    reply = server.request("GET", "/v2/health/ready")
    assert (reply.status, reply.json) == (503, {"ready": False, "reason": "warming up"})
    early = _ask(server, 1.0)
    assert (early.status, early.headers["retry-after"]) == (503, "1")
    assert early.headers["x-model-not-warm"] == "1"  # Envoy asks another server
    assert server.request("POST", "/v2/repository/index").json[0]["state"] == "UNAVAILABLE"
    flag.touch()
    server.wait_for("ready")
    assert server.request("GET", "/v2/health/ready").status == 200
    assert _ask(server, 1.0).status == 200


async def test_a_model_whose_first_call_takes_longer_than_warming_up_may_is_warmed_with_one_request(artifacts):
    """Loading weights on the first call takes some models longer than that; they are served all the same."""
    served = await warm_up(load(artifacts / "digits" / "1"), Limits(), None, longest_s=0.0)
    assert (served.warmth.requests, served.warmth.settled) == (1, False)
    assert served.warmth.first_ms == served.warmth.settled_ms > 0


def test_a_new_version_is_warmed_beside_the_old_one_and_swapped_without_a_failed_request(
    start_server, artifacts, tmp_path, pixels
):
    root = tmp_path / "digits"
    shutil.copytree(artifacts / "digits" / "1", root / "1")
    server = start_server(root, "--reload-interval", "0.05", "--drain", "0")
    seen, stop = [], threading.Event()

    def ask():
        connection = server.connect()
        body, headers = json.dumps(pixels(1)), {"Content-Type": "application/json"}
        while not stop.is_set():
            reply = server.exchange(connection, "POST", "/v2/models/digits/infer", body, headers)
            seen.append((reply.status, reply.headers["x-model-version"], reply.json["model_version"]))
        connection.close()

    client = threading.Thread(target=ask)
    client.start()
    _wait_until(lambda: len(seen) > 20)
    shutil.copytree(artifacts / "digits" / "2", root / "2")
    line = server.wait_for("reloaded")
    after = len(seen)
    _wait_until(lambda: len(seen) > after + 20)
    stop.set()
    client.join(DEADLINE_S)
    assert "2-mlp" in line
    assert "MiB" in line
    assert "warm after" in line
    assert set(seen) == {(200, "1-logistic", "1-logistic"), (200, "2-mlp", "2-mlp")}
    assert seen == sorted(seen)  # once swapped, never back
    index = server.request("POST", "/v2/repository/index").json
    assert [(entry["version"], entry["state"]) for entry in index] == [
        ("1-logistic", "UNAVAILABLE"),
        ("2-mlp", "READY"),
    ]


def test_a_bad_new_version_leaves_the_old_one_in_service_until_it_is_whole(start_server, artifacts, tmp_path, pixels):
    root = tmp_path / "digits"
    shutil.copytree(artifacts / "digits" / "1", root / "1")
    server = start_server(root, "--reload-interval", "0.05", "--drain", "0")
    whole = (artifacts / "digits" / "2" / "model.npz").read_bytes()
    torn = shutil.copytree(artifacts / "digits" / "2", tmp_path / "torn")
    (torn / "model.npz").write_bytes(whole[:5000])
    torn.rename(root / "2")  # a copy that is still going on, as one state of it
    line = json.loads(server.process.stderr.readline())
    assert (line["event"], line["level"]) == ("version_rejected", "error")
    assert "sha256" in line["error"]
    assert server.infer(pixels(1)).headers["x-model-version"] == "1-logistic"
    (root / "2" / "model.npz").write_bytes(whole)
    server.wait_for("reloaded")
    assert server.infer(pixels(1)).headers["x-model-version"] == "2-mlp"


def test_a_new_version_that_fails_while_warming_is_refused_and_the_old_one_serves_on(
    start_server, tmp_path, python_model
):
    fine = "def load(d): return lambda i: {'y': i['x']}"
    faulty = """
def load(directory):
    def predict(inputs):
        assert len(inputs["x"]) == 1, "one row only"
        return {"y": inputs["x"]}
    return predict
"""
    spec = [("x", "FP32", [-1])], [("y", "FP32", [-1])]
    python_model(tmp_path / "1", fine, *spec, version="1")
    server = start_server(tmp_path, "--reload-interval", "0.05", "--drain", "0")
    python_model(tmp_path / "2", faulty, *spec, version="2")
    line = json.loads(server.process.stderr.readline())
    assert line["event"] == "version_rejected"
    assert "one row only" in line["error"]
    assert _ask(server, 1.0).headers["x-model-version"] == "1"
    alone = start_server(tmp_path / "2", ready=False)
    assert alone.process.wait(DEADLINE_S) == 1
    assert (
        alone.process.stderr.read().decode().startswith(f"model_servers: {tmp_path}/2: version 2 fails while warming")
    )


def test_the_last_version_stays_in_service_when_its_folder_is_removed(start_server, artifacts, tmp_path, pixels):
    root = tmp_path / "digits"
    shutil.copytree(artifacts / "digits" / "1", root)
    server = start_server(root, "--reload-interval", "0.02", "--drain", "0")
    shutil.rmtree(root)
    shutil.copytree(artifacts / "digits" / "2", root)
    server.wait_for("reloaded")
    shutil.rmtree(root)
    threading.Event().wait(0.2)  # several looks at the missing folder
    assert server.infer(pixels(1)).headers["x-model-version"] == "2-mlp"


def test_a_deadline_from_envoy_or_the_client_is_a_504(start_server, gated):
    directory, flag = gated
    server = start_server(directory, "--drain", "0", "--deadline", "3600")
    document = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [5.0]}]}
    by_envoy = server.infer(document, "own", {"x-envoy-expected-rq-timeout-ms": "50"})
    by_client = server.infer({**document, "parameters": {"timeout": 50_000}}, "own")
    assert (by_envoy.status, by_client.status) == (504, 504)
    assert "deadline" in by_envoy.json["error"]
    flag.touch()
    _wait_until(lambda: _ask(server, 1.0).status == 200)


def test_a_full_queue_is_a_503_with_retry_after(start_server, gated):
    directory, flag = gated
    server = start_server(directory, "--drain", "0", "--deadline", "3600", "--max-queue", "1")
    replies = []
    clients = [threading.Thread(target=lambda: replies.append(_ask(server, 5.0))) for _ in range(3)]
    clients[0].start()
    _wait_until(flag.with_suffix(".started").exists)
    for client in clients[1:]:  # one of these waits, the other finds the queue full
        client.start()
    _wait_until(lambda: replies)
    refused = replies[0]
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert "queue is full" in refused.json["error"]
    flag.touch()
    for client in clients:
        client.join(DEADLINE_S)
    assert sorted(reply.status for reply in replies) == [200, 200, 503]


def test_a_failing_model_is_a_500_without_a_traceback_and_one_line_in_the_log(start_server, tmp_path, python_model):
    code = """
from model_servers.errors import Refused
def load(directory):
    def predict(inputs):
        if (inputs["x"] == 3).any():
            raise Refused("three is not supported")
        if (inputs["x"] == 2).any():
            raise RuntimeError("secret detail")
        return {"y": 1 / (inputs["x"] - 1e9)} if (inputs["x"] != 4).all() else {"y": inputs["x"] * float("nan")}
    return predict
"""
    directory = python_model(tmp_path, code, [("x", "FP32", [-1])], [("y", "FP32", [-1])])
    server = start_server(directory, "--drain", "0")
    document = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [2.0]}]}
    reply = server.infer(document, "own", {"x-request-id": "r-1"})
    assert reply.status == 500
    assert reply.json == {"error": "the model failed on this request; the server's log says why"}
    line = json.loads(server.process.stderr.readline())
    assert (line["event"], line["request_id"], line["version"]) == ("inference_failed", "r-1", "1")
    assert "secret detail" in line["error"]
    assert "model.py:" in line["where"]
    refused = _ask(server, 3.0)
    assert (refused.status, refused.json) == (400, {"error": "three is not supported"})
    assert _ask(server, 4.0).status == 500
    assert json.loads(server.process.stderr.readline())["event"] == "bad_output"
    assert _ask(server, 1.0).status == 200

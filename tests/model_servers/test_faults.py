"""Faults for rehearsals: only where allowed, and only what was asked for."""

import json
import select
import time
from pathlib import Path

import pytest

from model_servers.errors import Refused
from model_servers.faults import parse_fault, read_faults


@pytest.fixture(scope="module")
def faulty_server(start_server, artifacts):
    return start_server(artifacts / "digits" / "2", "--allow-faults", "--fault", "error_rate=1", "--drain", "0")


def _set(server, **faults):
    reply = server.request("PUT", "/perch/faults", json.dumps(faults))
    assert reply.status == 200, reply.body
    return reply.json["faults"]


def test_a_fault_from_the_command_line_is_in_force_and_readiness_is_not_touched(faulty_server, pixels):
    assert faulty_server.request("GET", "/perch/faults").json["faults"]["error_rate"] == 1
    reply = faulty_server.infer(pixels(1))
    assert (reply.status, reply.json) == (500, {"error": "a fault was injected"})
    assert faulty_server.request("GET", "/v2/health/ready").status == 200
    _set(faulty_server)
    assert faulty_server.infer(pixels(1)).status == 200


def test_an_error_rate_is_a_share_and_the_same_seed_gives_the_same_errors(faulty_server, pixels):
    runs = []
    for _ in range(2):
        _set(faulty_server, error_rate=0.5, seed=7)
        runs.append([faulty_server.infer(pixels(1)).status for _ in range(40)])
    assert runs[0] == runs[1]
    assert 8 <= runs[0].count(500) <= 32


def test_a_label_map_changes_predictions_in_body_and_header(faulty_server, pixels):
    _set(faulty_server)
    label = faulty_server.infer(pixels(1)).json["outputs"][0]["data"][0]
    _set(faulty_server, label_map={str(label): "77"})
    reply = faulty_server.infer(pixels(1))
    assert reply.json["outputs"][0]["data"] == [77]
    assert reply.headers["x-model-prediction"] == "77"


def test_a_score_shift_moves_float_outputs_alone(faulty_server, pixels):
    _set(faulty_server)
    label, before = (output["data"] for output in faulty_server.infer(pixels(1)).json["outputs"])
    _set(faulty_server, score_shift=2.0)
    shifted_label, after = (output["data"] for output in faulty_server.infer(pixels(1)).json["outputs"])
    assert shifted_label == label
    assert after == pytest.approx([value + 2 for value in before], abs=1e-6)


def test_a_hang_never_answers_until_the_client_gives_up(faulty_server, pixels):
    _set(faulty_server, hang_rate=1)
    connection = faulty_server.connect()
    connection.connect()
    connection.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        faulty_server.exchange(connection, "POST", "/v2/models/digits/infer", json.dumps(pixels(1)))
    connection.close()
    _set(faulty_server)
    assert faulty_server.infer(pixels(1)).status == 200


def test_a_leak_grows_memory_and_another_set_frees_it(faulty_server, pixels):
    def rss():
        return int(Path(f"/proc/{faulty_server.process.pid}/statm").read_text().split()[1]) * 4096

    _set(faulty_server)
    before = rss()
    _set(faulty_server, leak_bytes=8 << 20)
    for _ in range(10):
        faulty_server.infer(pixels(1))
    assert rss() - before > 60 << 20
    _set(faulty_server)
    assert rss() - before < 40 << 20


@pytest.mark.parametrize("faults", [{"latency_ms": 200.0}, {"decay_ms": 200_000.0}])
def test_added_latency_is_really_added(faulty_server, pixels, faults):
    _set(faulty_server, **faults)
    began_s = time.monotonic()
    assert faulty_server.infer(pixels(1)).status == 200
    assert time.monotonic() - began_s >= 0.199  # uvloop counts whole milliseconds


def test_while_one_request_is_held_by_its_added_latency_others_go_on(faulty_server, pixels):
    _set(faulty_server, latency_ms=600_000.0)
    held = faulty_server.connect()
    held.request("POST", "/v2/models/digits/infer", json.dumps(pixels(1)))
    assert faulty_server.request("GET", "/v2/health/live").status == 200  # by now the first request is in its latency
    _set(faulty_server)
    assert faulty_server.infer(pixels(1)).status == 200
    assert select.select([held.sock], [], [], 0) == ([], [], [])
    held.close()


@pytest.mark.parametrize(
    "faults",
    [
        [],
        {"error_rate": 2},
        {"error_rate": True},
        {"latency_ms": -1},
        {"latency_kind": "normal"},
        {"speed": 1},
        {"label_map": {"1": 2}},
        {"leak_bytes": 1.5},
    ],
)
def test_a_fault_that_makes_no_sense_is_a_400(faulty_server, faults):
    reply = faulty_server.request("PUT", "/perch/faults", json.dumps(faults))
    assert (reply.status, list(reply.json)) == (400, ["error"])


def test_faults_cannot_be_set_through_a_proxy(faulty_server):
    reply = faulty_server.request("PUT", "/perch/faults", "{}", {"x-request-id": "a"})
    assert reply.status == 403


def test_the_command_line_form_reads_every_field():
    assert read_faults(
        dict(map(parse_fault, ["label_map=3:8,5:6", "latency_ms=5", "latency_kind=exponential", "seed=3"]))
    )
    for text in ("error_rate", "error_rate=x"):
        with pytest.raises(Refused):
            parse_fault(text)

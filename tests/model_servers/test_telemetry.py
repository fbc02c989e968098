"""What a real server process sends to a real StatsD listener."""

import contextlib
import re
import socket

import pytest

LINE = re.compile(
    r"^(?P<name>[a-z_.]+):(?P<value>-?[0-9.]+)\|(?P<kind>c|g|ms)(\|@[0-9.]+)?\|#(?P<tags>[a-z_]+:[^,|]+(,[a-z_]+:[^,|]+)*)$"
)


@pytest.fixture
def statsd():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        yield listener


def _lines(statsd):
    """Every line of a process that has ended, as {(name, tags): [values]}: on loopback all of it is there by then."""
    found = {}
    with contextlib.suppress(BlockingIOError):
        while True:
            for line in statsd.recv(65536).decode().splitlines():
                match = LINE.match(line)
                assert match, line
                tags = dict(tag.split(":", 1) for tag in match["tags"].split(","))
                found.setdefault((match["name"], tuple(sorted(tags.items()))), []).append(float(match["value"]))
    return found


def test_requests_predictions_and_times_arrive_tagged_by_arm_model_and_version(start_server, artifacts, statsd, pixels):
    address = f"127.0.0.1:{statsd.getsockname()[1]}"
    server = start_server(artifacts / "digits" / "2", "--arm", "canary", "--statsd", address, "--drain", "0")
    labels = [label for _ in range(3) for label in server.infer(pixels(5)).json["outputs"][0]["data"]]
    assert server.infer({}).status == 400
    server.stop()  # what has gathered is sent before the end
    names = {
        "requests",
        "predictions",
        "batch_rows",
        "batch_requests",
        "queue_ms",
        "inference_ms",
        "rss_bytes",
        "warm_ms",
    }
    found = _lines(statsd)  # of each second: a test that was slow finds more than one
    assert {f"perch.model.{name}" for name in names} <= {name for name, _ in found}
    ours = {"cohort": "canary", "model": "digits"}
    assert all(ours.items() <= dict(tags).items() for _, tags in found)
    versioned = {**ours, "model_version": "2-mlp"}

    def total(name, **tags):
        return sum(found.get((f"perch.model.{name}", tuple(sorted({**versioned, **tags}.items()))), [0]))

    assert (total("requests", status="200"), total("requests", status="400")) == (3, 1)
    assert not any(name == "perch.model.errors" for name, _ in found)  # a client's mistake is none
    for label in set(labels):
        assert total("predictions", prediction=str(label)) == labels.count(label)
    assert total("reloads", result="ok") == 1
    assert total("warm_ms") > 0


def test_a_dead_statsd_is_no_bodys_problem(start_server, artifacts, pixels):
    server = start_server(artifacts / "digits" / "1", "--statsd", "127.0.0.1:9", "--drain", "0")
    assert server.infer(pixels(1)).status == 200
    assert server.stop() == 0
    assert server.process.stderr.read() == b""

"""What a whole system sends to StatsD, against the table: no line that is not in it, no row that is never sent."""

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from ports import free_ports

from extproc.metricnames import BY_NAME, METRICS, SERVE_METRICS, Kind

NEVER_SENT = {"request.dropped": "needs more than the limits; tests/service/test_requestmetrics.py goes beyond them"}
KINDS = {Kind.COUNTER: "c", Kind.GAUGE: "g", Kind.TIMER: "ms"}
ARTIFACTS = Path(__file__).parents[2] / "model_servers" / "artifacts" / "digits"
FRAGILE = """
def load(directory):
    def predict(inputs):
        pixels = inputs["pixels"]
        if (pixels[:, 0] < 0).any():
            raise RuntimeError("negative light")
        return {"label": (pixels.sum(axis=1) % 10).astype("int64")}

    return predict
"""
RULES = [{"name": "staff", "when": {"header": "x-tenant", "in": ["acme"]}, "serve": "canary"}]


class StatsD:
    """A StatsD server on a port of 127.0.0.1: keeps (name, type, tag names) of every line. It may go and come back."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, frozenset[str]]] = set()
        (self.port,) = free_ports(1)
        self.socket = self.bound(self.port)
        threading.Thread(target=self.hear, args=(self.socket,), daemon=True).start()

    def bound(self, port: int) -> socket.socket:
        """A socket that hears until it is shut down."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        listener.bind(("127.0.0.1", port))
        listener.settimeout(0.2)
        return listener

    def hear(self, listener: socket.socket) -> None:
        """Takes what comes, but for what Envoy sends of its own."""
        while listener.fileno() >= 0:
            with contextlib.suppress(TimeoutError, OSError):
                lines = listener.recv(65_536).decode().split("\n")
                self.seen.update(what_is(line) for line in lines if not line.startswith("envoy."))

    def pause(self) -> None:
        """Nobody is there any more."""
        self.socket.close()

    def resume(self) -> None:
        """Somebody is there again, at the same port."""
        self.socket = self.bound(self.port)
        threading.Thread(target=self.hear, args=(self.socket,), daemon=True).start()

    def names(self) -> set[str]:
        """The names of all lines so far."""
        return {name for name, _, _ in self.seen.copy()}  # a thread goes on adding

    def tagged(self) -> set[tuple[str, str]]:
        """(name, tag name) of all tags so far."""
        return {(name.removeprefix("perch."), tag) for name, _, tags in self.seen.copy() for tag in tags}


def what_is(line: str) -> tuple[str, str, frozenset[str]]:
    """Name, type and tag names of a line; `x-bad` and the line for one that is none."""
    head, _, tags = line.partition("|#")
    name, _, rest = head.partition(":")
    kind = rest.split("|")[1] if "|" in rest else "x-bad"
    return name, kind, frozenset(tag.partition(":")[0] for tag in tags.split(",") if tag)


@contextlib.contextmanager
def listening() -> Iterator[StatsD]:
    """A StatsD while inside."""
    statsd = StatsD()
    try:
        yield statsd
    finally:
        statsd.socket.close()


async def test_every_line_is_in_the_table_and_every_row_of_it_is_sent(tools):
    flag = {"salt": tools.salt, "canary": 50, "rules": RULES}
    with listening() as statsd, tools.folder() as place:
        models = tools.digits(
            stable=["unix:digits-stable.sock"],
            canary=["unix:digits-canary.sock"],
            deadline_s=3,
            artifacts={"stable": str(fragile(place / "stable")), "canary": str(ARTIFACTS / "2")},
        )
        environment = {"PERCH_STATSD": f"127.0.0.1:{statsd.port}"}
        with tools.running(models, tools.flag_file(digits=flag), environment=environment) as system:
            async with tools.client_of(system) as client:
                await asyncio.to_thread(system.serve_flags, tools.flag_file(digits=flag | {"canary": 60}))
                stable = await ordinary(client)
                await told_by_serve(client, statsd)
                await reported(system, client)
                await broken(client, stable)
                await unreadable(system)
                await faults(system, client, stable)
                wanted = {f"perch.{metric.name}" for metric in METRICS if metric.name not in NEVER_SENT}
                later = {"perch.metrics.dropped", "perch.request.mismatched"}
                # Before StatsD goes away: a count that is sent while nobody hears it is not sent again.
                await asyncio.to_thread(until_seen, tools, statsd, wanted - later)
                await asyncio.to_thread(lost_lines, tools, statsd)
                await misrouted(system, client, statsd)
                await asyncio.to_thread(until_seen, tools, statsd, wanted)
    for name, kind, tags in statsd.seen:
        metric = BY_NAME[name.removeprefix("perch.")]
        assert (name.partition(".")[0], kind) == ("perch", KINDS[metric.kind]), name
        assert set(metric.tags) <= tags <= {*metric.tags, *metric.sometimes}, name
    assert {name for name in NEVER_SENT if f"perch.{name}" in statsd.names()} == set()
    sometimes = {(metric.name, tag) for metric in METRICS for tag in metric.sometimes}
    assert sometimes <= statsd.tagged()


def until_seen(tools: Any, statsd: StatsD, wanted: set[str]) -> None:
    """Waits for these names; fails with those that are missing."""
    with contextlib.suppress(AssertionError):
        tools.until(lambda: wanted <= statsd.names(), "every row of the table", 30)
    assert wanted - statsd.names() == set()


def fragile(folder: Path) -> Path:
    """Artifacts of a model that breaks where the first pixel is negative."""
    folder.mkdir()
    shipped = json.loads((ARTIFACTS / "1" / "manifest.json").read_text())
    content = FRAGILE.encode()
    (folder / "model.py").write_bytes(content)
    manifest = {name: shipped[name] for name in ("format", "name", "inputs", "prediction", "examples")} | {
        "version": "standin-stable",
        "backend": "python",
        "outputs": [shipped["outputs"][0]],
        "files": {"model.py": hashlib.sha256(content).hexdigest()},
        "options": {"entry": "model.py:load"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


async def ordinary(client: Any) -> str:
    """Enough traffic for everything that wants some: decisions, predictions of both arms. One of stable's users."""
    answers = await client.all([f"user-{i}" for i in range(1_200)])
    assert set(answers.values()) == {"200 stable", "200 canary"}
    assert (await ask(client, headers={"x-tenant": "acme"})).headers["x-model-cohort"] == "canary"
    return next(user for user, answer in answers.items() if answer == "200 stable")


async def told_by_serve(client: Any, statsd: StatsD) -> None:
    """Asks until serve has told all that only it can tell: it does so each second, and is to be killed before long."""
    wanted = {(metric.name, tag) for metric in SERVE_METRICS for tag in (*metric.tags, *metric.sometimes)}
    async with asyncio.timeout(60):
        while not wanted <= statsd.tagged():
            await ask(client)
            await ask(client, headers={"x-tenant": "acme"})


async def ask(client: Any, **changed: Any) -> Any:
    """One request like all others, but for what is changed; its answer, read."""
    url = f"http://127.0.0.1:{client.system.port}/v2/models/digits/infer"
    headers = {"x-user-id": "user-6", "content-type": "application/json"} | changed.pop("headers", {})
    async with client.session.post(url, data=changed.pop("data", client.small), headers=headers, **changed) as answer:
        await answer.read()
        return answer


async def reported(system: Any, client: Any) -> None:
    """Values about requests that were answered."""
    ids = [(await client.infer(f"user-{i}")).headers["x-request-id"] for i in range(20)]
    body = [{"request_id": one, "flag": "digits", "name": "accuracy", "value": 1} for one in ids]
    url = f"http://127.0.0.1:{system.control_port}/v1/outcomes"
    async with client.session.post(url, json=body) as answer:
        assert (await answer.json())["accepted"] == 20


async def broken(client: Any, stable: str) -> None:
    """The server's own error."""
    body = json.loads(client.small)
    body["inputs"][0]["data"][0] = -1
    assert (await ask(client, data=json.dumps(body), headers={"x-user-id": stable})).status == 500


async def unreadable(system: Any) -> None:
    """A stream of the access log that says nothing that can be read."""
    (run,) = system.temporary.glob("perch-*")
    async with grpc.aio.insecure_channel(f"unix:{run}/als.sock") as channel:
        send = channel.stream_unary("/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs")
        await send(iter([b"\xff\xff\xff"]))


async def faults(system: Any, client: Any, stable: str) -> None:
    """Everything that can become of a request when what it needs does not answer, or its client does not wait."""
    with system.unsupervised():
        system.signal(signal.SIGSTOP, "digits-stable")
        with contextlib.suppress(TimeoutError):
            await ask(client, headers={"x-user-id": stable}, timeout=aiohttp.ClientTimeout(total=0.3))
        assert (await client.infer(stable)).status == 504
        system.signal(signal.SIGCONT, "digits-stable")
        await client.until(stable, "200 stable")
        system.signal(signal.SIGSTOP, "control")  # which would soon have canary's users decided as held at stable
        system.signal(signal.SIGKILL, "digits-canary")
        for _ in range(20):
            assert str(await client.infer("user-6")) == "200 stable"
        system.signal(signal.SIGKILL, "serve")
        assert str(await client.infer(stable)) == "200 stable"
        system.signal(signal.SIGCONT, "control")
    await asyncio.to_thread(system.until_settled)


def lost_lines(tools: Any, statsd: StatsD) -> None:
    """StatsD goes away until everybody has sent something in vain, and hears of it afterwards."""

    def went_and_came() -> bool:
        statsd.pause()
        threading.Event().wait(1.5)  # everybody sends something each second
        statsd.resume()
        threading.Event().wait(1.5)
        dropped = [tags for name, _, tags in statsd.seen if name == "perch.metrics.dropped"]
        return {"why"} in dropped and any("model" in tags for tags in dropped)

    tools.until(went_and_came, "the lines that were lost to be told, by a model server and by another process")


async def misrouted(system: Any, client: Any, statsd: StatsD) -> None:
    """A route that sends each arm's users to the other one's servers, as a person who edits Envoy's files might."""
    (path,) = system.temporary.glob("perch-*/envoy/rds.yaml")
    new = path.with_name("rds.new")
    text = path.read_text()
    assert "digits_canary_or_stable" in text
    new.write_text(
        text.replace("digits_canary_or_stable", "X")
        .replace("digits_stable", "digits_canary")
        .replace("X", "digits_stable")
    )
    new.replace(path)
    async with asyncio.timeout(60):
        while "perch.request.mismatched" not in statsd.names():
            await asyncio.gather(*(client.infer(f"user-{i}") for i in range(20)))

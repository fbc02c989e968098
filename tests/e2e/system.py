"""One `perch up` on free ports, steered from outside, as an operator or a fault would: by signals, files and HTTP.

Its calls block; an async test puts the slow ones into a thread, so that its clients go on asking meanwhile.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str, within_s: float = DEADLINE_S) -> Any:
    """The first true answer of `condition`; fails with `what` after the deadline."""
    end_s = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < end_s, f"waited {within_s:g} s for: {what}"
        time.sleep(0.1)
    return answer


@dataclass
class System:
    """One `perch up`: its folder, its ports, its processes."""

    folder: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    control_port: int = 0
    admin_port: int = 0
    process: subprocess.Popen[bytes] | None = None
    ever: dict[int, str] = field(default_factory=dict)
    disturbed: bool = False

    def __post_init__(self) -> None:
        """Makes what `perch up` is given, and a folder of temporary files that must be empty in the end."""
        self.port, self.control_port, self.admin_port = free_ports(3)
        self.temporary.mkdir()

    @property
    def root(self) -> Path:
        """The project's folder, from which everything is run."""
        return ROOT

    @property
    def temporary(self) -> Path:
        """Where the run folder and other temporary files go."""
        return self.folder / "tmp"

    @property
    def flags(self) -> Path:
        """The flag file."""
        return self.folder / "flags.yaml"

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.folder / "state"

    def configure(self, models: dict[str, Any], flags: str) -> None:
        """Writes models.yaml and the flag file."""
        (self.folder / "models.yaml").write_text(yaml.safe_dump(models))
        self.flags.write_text(flags)

    def command(self) -> list[str]:
        """`perch up` as a person would type it."""
        ports = ("--port", self.port, "--control-port", self.control_port, "--admin", self.admin_port)
        files = ("--flags", self.flags, "--models", self.folder / "models.yaml", "--state", self.state)
        return [sys.executable, "-m", "extproc", "up", *map(str, (*ports, *files)), *self.options]

    def environ(self) -> dict[str, str]:
        """A clean environment; the mark in it finds every process of this system again."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")}
        return own | {"TMPDIR": str(self.temporary), "E2E_MARK": str(self.folder)} | self.environment

    def begin(self) -> None:
        """Starts it and waits for nothing."""
        with (self.folder / "out").open("ab") as out:
            self.process = subprocess.Popen(
                self.command(), cwd=ROOT, env=self.environ(), stdout=out, stderr=out, start_new_session=True
            )

    def start(self) -> None:
        """Starts it and waits for the line to paste, then for every server."""
        before = len(self.output)
        self.begin()
        until(lambda: "curl" in self.output[before:] or not self.runs, "the table of `perch up`")
        assert self.runs, self.output
        self.until_settled()

    @property
    def runs(self) -> bool:
        """Whether `perch up` itself runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def output(self) -> str:
        """What `perch up` has said so far."""
        path = self.folder / "out"
        return path.read_text() if path.exists() else ""

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ends `perch up` as Ctrl-C in a terminal does: the signal goes to its whole group. Its exit code."""
        assert self.process is not None
        if self.runs:
            self.roles()
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, number)
        return self.process.wait(DEADLINE_S)

    # --- its processes ---

    def roles(self) -> dict[str, int]:
        """The process of every role: serve, control, envoy, and the model servers by the name of their socket."""
        found = {}
        for pid in _descendants(self.process.pid if self.process else 0):
            name = _role(_read(f"/proc/{pid}/cmdline").split("\0"))
            self.ever[pid] = name
            if name and name not in found:
                found[name] = pid
        return found

    def signal(self, number: signal.Signals, *names: str) -> None:
        """Sends a signal to roles, and waits until the killed are dead and the stopped stand still."""
        self.disturbed = True
        roles = self.roles()
        pids = [roles[name] for name in names]
        for pid in pids:
            os.kill(pid, number)
        if number is signal.SIGKILL:
            until(lambda: not any(map(_is_alive, pids)), f"the death of {names}")
        if number is signal.SIGSTOP:
            until(lambda: all(_state(pid) == "T" for pid in pids), f"{names} standing still")

    @contextlib.contextmanager
    def unsupervised(self) -> Iterator[None]:
        """While inside, nothing that dies is started again: `perch up` itself stands still."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    # --- its interfaces ---

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of a GET at a port of 127.0.0.1; status 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()
        except OSError:
            return 0, ""

    def status(self) -> dict[str, Any]:
        """`GET /v1/status`; empty while control does not answer."""
        code, body = self.get(self.control_port, "/v1/status")
        return json.loads(body) if code == 200 else {}

    def counters(self, pattern: str) -> dict[str, int]:
        """Envoy's counters and gauges that match a regular expression; empty while it does not answer."""
        code, body = self.get(self.admin_port, f"/stats?format=json&filter={quote(pattern)}")
        stats = json.loads(body)["stats"] if code == 200 else []
        return {one["name"]: one["value"] for one in stats if isinstance(one.get("value"), int)}

    def counter(self, name: str) -> int:
        """One of Envoy's counters, which must exist."""
        return self.counters(f"^{re.escape(name)}$")[name]

    def healthy(self) -> Counter[str]:
        """How many hosts of each cluster Envoy would use; empty while it does not answer."""
        code, body = self.get(self.admin_port, "/clusters?format=json")
        clusters = json.loads(body).get("cluster_statuses", ()) if code == 200 else ()
        return Counter({one["name"]: sum(map(_is_healthy, one.get("host_statuses", ()))) for one in clusters})

    def until_settled(self) -> None:
        """Waits until Envoy finds every server healthy, and no flag is held.

        After a disturbance Envoy's opinion may be from before it: every server must have passed a check since, and none
        failed one.
        """
        models = yaml.safe_load((self.folder / "models.yaml").read_text())
        wanted = {f"{name}_{arm}": len(model[arm]) for name, model in models.items() for arm in ("stable", "canary")}
        wanted["perch"] = 1
        since = self.checks()

        def all_healthy() -> bool:
            nonlocal since
            now, healthy = self.checks(), self.healthy()
            if any(now[f"{name}.failure"] > since[f"{name}.failure"] for name in wanted):
                since = now
            checked = all(now[f"{name}.success"] - since[f"{name}.success"] >= n for name, n in wanted.items())
            return all(healthy[name] >= n for name, n in wanted.items()) and (checked or not self.disturbed)

        until(all_healthy, f"every server healthy: {wanted}")
        until(lambda: self.status().get("ready") and not self.held(), "no flag held")
        self.disturbed = False

    def checks(self) -> Counter[str]:
        """Health checks so far: `CLUSTER.success` and `CLUSTER.failure`."""
        counted = self.counters(r"^cluster\..*\.health_check\.(success|failure)$")
        return Counter({name.removeprefix("cluster.").replace("health_check.", ""): n for name, n in counted.items()})

    def held(self) -> list[str]:
        """Flags that are held at 0, as the status says."""
        return [key for key, flag in self.status().get("flags", {}).items() if flag["held"]]

    def edit_flags(self, text: str) -> None:
        """Replaces the flag file as an editor does, by a rename."""
        new = self.flags.with_name("flags.yaml.new")
        new.write_text(text)
        new.replace(self.flags)

    def serve_flags(self, text: str) -> None:
        """Replaces the flag file and waits until it is served: serve then keeps it under its version."""
        self.edit_flags(text)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        until(lambda: any(self.state.glob(f"rulesets/{digest}.*.json")), f"version {digest} served")

    def events(self, kind: str) -> list[str]:
        """The texts of one kind of event in the audit file."""
        lines = (json.loads(line) for line in (self.state / "audit.jsonl").read_text().splitlines())
        return [line["text"] for line in lines if line["event"] == kind]

    # --- its end ---

    def assert_nothing_left(self) -> None:
        """No process, no socket, no temporary file, no listening port."""
        until(lambda: not self.left_processes(), "the end of every process")
        assert [str(path) for path in self.temporary.rglob("*")] == []
        for port in (self.port, self.control_port, self.admin_port):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))

    def left_processes(self) -> list[str]:
        """Processes of this system that run, by their environment or because they were its children once."""
        mark = f"E2E_MARK={self.folder}"
        marked = [pid for pid in _all_pids() if mark in _read(f"/proc/{pid}/environ").split("\0")]
        children = [pid for pid, name in self.ever.items() if name == "guard" and _is_alive(pid)]
        return [_read(f"/proc/{pid}/cmdline").replace("\0", " ") for pid in (*marked, *children) if _is_alive(pid)]

    def report(self) -> str:
        """The last lines of everything that was written."""
        logs = {path.name: path.read_text(errors="replace") for path in sorted(self.state.glob("logs/*.log"))}
        texts = {f"perch up (port {self.port})": self.output} | logs
        return "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in texts.items())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_alive(pid: int) -> bool:
    """Whether it runs. One that is dead and not yet waited for has closed everything once its last thread is gone."""
    try:
        return _state(pid) not in ("", "Z", "X") or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False


def _state(pid: int) -> str:
    """The kernel's letter for it; empty if there is none."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1]


def _descendants(pid: int) -> Iterator[int]:
    for child in _read(f"/proc/{pid}/task/{pid}/children").split():
        yield int(child)
        yield from _descendants(int(child))


def _role(argv: list[str]) -> str:
    """What a process is, from its command line; empty for one that is none of ours yet or not of interest."""
    match argv:
        case [_, "-I", "-S", program, "guard", *_] if program.endswith("supervisor_child.py"):
            return "guard"
        case [_, "-m", "extproc", role, *_]:
            return role
        case [_, "-m", "model_servers", *rest]:
            return Path(rest[rest.index("--listen") + 1]).stem
        case [program, "-c", *_] if Path(program).name == "envoy":
            return "envoy"
    return ""


def _is_healthy(host: dict[str, Any]) -> bool:
    health = host.get("health_status", {})
    return health.get("eds_health_status") == "HEALTHY" and not any(
        health.get(flag) for flag in ("failed_active_health_check", "pending_active_hc", "failed_outlier_check")
    )

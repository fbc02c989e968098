"""The system in containers, steered as an operator would: by Docker Compose, files on the host, and its ports.

Docker Compose talks to podman. Health checks are run from here, since podman leaves them to systemd, which a build
machine may not have.
"""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "model_servers" / "artifacts" / "digits"
DEADLINE_S = 90.0
SALT = "digits-2026-11"
TOKEN = "a token for the compose tests"
TRIES = 5
LATE = "http.edge.ext_proc.perch."
CLUSTERS = ("perch", "digits_stable", "digits_canary")


def until(condition: Callable[[], Any], what: str, within_s: float = DEADLINE_S) -> Any:
    """The first true answer of `condition`; fails with `what` after the deadline."""
    end_s = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < end_s, f"waited {within_s:g} s for: {what}"
        time.sleep(0.1)
    return answer


def flag_file(canary: float) -> str:
    """The text of a flag file with one flag at a percentage; no two texts are equal."""
    return json.dumps({"version": 1, "flags": {"digits": {"salt": SALT, "canary": canary}}}) + f"\n# {time.time_ns()}\n"


def example() -> bytes:
    """A V2 request of one digit."""
    pixels = json.loads((ARTIFACTS / "1" / "manifest.json").read_text())["examples"]["pixels"][0]
    return json.dumps({"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": pixels}]}).encode()


def is_dead(pid: int) -> bool:
    """Whether a process has closed everything: it is gone, or a zombie without further threads."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except OSError:
        return True


@dataclass(frozen=True)
class Answer:
    """What one client got; status 0 means that the connection failed."""

    user: str
    status: int
    arm: str | None = None
    version: str | None = None
    text: str = ""


@dataclass
class Stack:
    """One project of Docker Compose: its folder on the host, its ports, its engine."""

    engine: dict[str, str]
    folder: Path
    project: str = "perch-test"
    overlay: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the folders that are mounted: flags, models, a token; readable for the user of the containers."""
        self.port, self.control_port, self.prometheus_port = free_ports(3, at="0.0.0.0")
        self.folder.chmod(0o755)
        self.flags.parent.mkdir()
        self.flags.write_text(flag_file(20))
        shutil.copytree(ARTIFACTS / "2", self.canary)
        (self.folder / "token").write_text(f"{TOKEN}\n")
        self.settings |= {
            "COMPOSE_PROJECT_NAME": self.project,
            "PERCH_IMAGE": self.engine["IMAGE"],
            "PERCH_PORT": str(self.port),
            "PERCH_CONTROL_PORT": str(self.control_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "PERCH_FLAGS_DIR": str(self.flags.parent),
            "PERCH_CANARY_DIR": str(self.canary),
            "PERCH_TOKEN_FILE": str(self.folder / "token"),
            "DOCKER_HOST": f"unix://{self.engine['RUN']}/podman.sock",
        }

    @property
    def flags(self) -> Path:
        """The flag file on the host."""
        return self.folder / "flags" / "flags.yaml"

    @property
    def canary(self) -> Path:
        """The canary's artifacts on the host."""
        return self.folder / "canary-2"

    # --- the engine

    def environ(self) -> dict[str, str]:
        """The environment of engine and Docker Compose; none of ours leaks into it."""
        own = {name: text for name, text in os.environ.items() if not name.startswith(("PERCH_", "COMPOSE_"))}
        return own | self.engine | self.settings

    def run(self, *command: str, check: bool = True, within_s: float = 180) -> str:
        """What a command prints; the test fails with it if the command does."""
        done = subprocess.run(
            command, env=self.environ(), capture_output=True, text=True, timeout=within_s, check=False, cwd=ROOT
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def compose(self, *command: str, check: bool = True) -> str:
        """Docker Compose on the shipped files."""
        files = [f"--file=compose/{name}" for name in ("compose.yaml", *self.overlay)]
        return self.run(self.engine["COMPOSE"], *files, *command, check=check)

    def up(self, *services: str) -> None:
        """`docker compose up`, until every container is healthy."""
        with self.health_checks():
            self.compose("up", "--no-build", "--detach", "--wait", *services)

    @contextlib.contextmanager
    def health_checks(self) -> Iterator[None]:
        """While inside, those containers that are not yet healthy are asked each second."""
        stop = threading.Event()

        def ask() -> None:
            while not stop.wait(1):
                listed = ("ps", "--format", "{{.ID}} {{.Status}}", "--filter", self.mine())
                for line in self.run("podman", *listed, check=False).splitlines():
                    if "(healthy)" not in line and not stop.is_set():
                        self.run("podman", "healthcheck", "run", line.split()[0], check=False)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            stop.set()
            asking.join()

    def mine(self) -> str:
        """The filter for containers of this project."""
        return f"label=com.docker.compose.project={self.project}"

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine knows of each container, by its name without the project: `envoy-1`, `model-canary-2`."""
        ids = self.run("podman", "ps", "--all", "--quiet", "--filter", self.mine()).split()
        known = json.loads(self.run("podman", "inspect", *ids)) if ids else []
        return {one["Name"].removeprefix(f"{self.project}-"): one for one in known}

    def exec(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a container."""
        whole = ("podman", "exec", f"{self.project}-{container}", *command)
        return subprocess.run(whole, env=self.environ(), capture_output=True, text=True, timeout=60, check=False)

    def kill(self, container: str) -> int:
        """Kills the main process, as a crash would. Returns its id once its sockets are closed."""
        pid = int(self.containers()[container]["State"]["Pid"])
        assert pid > 0, container
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_dead(pid), f"the end of {container}")
        return pid

    def until_again(self, container: str, before: int) -> None:
        """Waits until the engine has started it again, with another process."""

        def runs() -> bool:
            state = self.containers()[container]["State"]
            return state["Status"] == "running" and state["Pid"] not in (0, before)

        until(runs, f"{container} started again")

    def report(self) -> str:
        """The last lines of every container."""
        names = self.containers()
        return "\n".join(
            f"--- {name} {known['State']['Status']}\n"
            + self.run("podman", "logs", "--tail", "30", f"{self.project}-{name}", check=False)
            for name, known in names.items()
        )

    # --- through the ports

    def infer(self, user: str, connection: http.client.HTTPConnection | None = None) -> Answer:
        """One inference by one user."""
        own = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"x-user-id": user, "content-type": "application/json"}
        try:
            own.request("POST", "/v2/models/digits/infer", body=EXAMPLE, headers=headers)
            answer = own.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            own.close()
            return Answer(user, 0, text=repr(error))
        finally:
            if connection is None:
                own.close()
        arm, version = answer.getheader("x-model-cohort"), answer.getheader("x-model-version")
        return Answer(user, answer.status, arm, version, "" if answer.status == 200 else text)

    def arms(self, users: Iterable[str]) -> dict[str, str | None]:
        """Who serves each user; every answer must be a 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        answers = [self.infer(user, connection) for user in users]
        connection.close()
        assert [one for one in answers if one.status != 200] == []
        return {one.user: one.arm for one in answers}

    def lateness(self) -> Counter[str]:
        """How often Envoy let a request pass without an answer from perch, and how often perch ran out of time."""
        names = [f"{LATE}{name}" for name in ("failure_mode_allowed", "message_timeouts")]
        found: Counter[str] = until(lambda: self.counters("^({})$".format("|".join(names))), "Envoy's counters")
        assert set(found) == set(names)
        return found

    def late_since(self, before: Counter[str]) -> int:
        """How many requests Envoy has sent to stable because the machine was so busy that perch was late.

        None where perch ran out of time for no request: then it was something else, which is no excuse.
        """
        now = self.lateness()
        grown = {name.removeprefix(LATE): now[name] - before[name] for name in now}
        return grown["failure_mode_allowed"] if grown["message_timeouts"] else 0

    def infer_in_time(self, user: str) -> Answer:
        """One inference by one user about whom perch was heard: asked again where perch was late for Envoy."""
        for _ in range(TRIES):
            before = self.lateness()
            answer = self.infer(user)
            if not self.late_since(before):
                return answer
            self.until_settled()
        raise AssertionError(f"perch was late {TRIES} times")

    def assert_served(self, wanted: dict[str, str]) -> None:
        """Asks for every user once, in their order: each must get the wanted arm.

        Of canary's users no more may be on stable than perch was late with, and they are asked again.
        """
        for _ in range(TRIES):
            before = self.lateness()
            astray = {user: arm for user, arm in self.arms(wanted).items() if arm != wanted[user]}
            self.assert_excused(set(astray.items()), before)
            if not astray:
                return
            wanted = {user: wanted[user] for user in astray}
            self.until_settled()
        raise AssertionError(f"perch was late {TRIES} times, at last for {sorted(wanted)}")

    def assert_excused(self, astray: Collection[tuple[str, str | None]], before: Counter[str]) -> None:
        """All who got another arm than theirs got stable, and perch was late with as many requests."""
        assert {arm for _, arm in astray} <= {"stable"}, astray
        assert len(astray) <= (late := self.late_since(before)), f"perch was late with {late}: {astray}"

    def get(self, path: str, **request: Any) -> tuple[int, str]:
        """Status and body of the control API; status 0 while nobody answers."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.control_port}{path}", **request)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()
        except OSError:
            return 0, ""

    def status(self) -> dict[str, Any]:
        """`GET /v1/status`; empty while control does not answer."""
        code, body = self.get("/v1/status")
        return json.loads(body) if code == 200 else {}

    def prometheus(self, query: str) -> list[Any]:
        """What Prometheus answers to a query; empty while it has no such series or does not answer."""
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query?query={quote(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except OSError:
            return []

    def counters(self, pattern: str) -> Counter[str]:
        """Envoy's counters and gauges, through control; empty while one of both does not answer."""
        code, body = self.get(f"/envoy/stats?format=json&filter={quote(pattern)}")
        stats = json.loads(body)["stats"] if code == 200 else []
        return Counter({one["name"]: one["value"] for one in stats if isinstance(one.get("value"), int)})

    def until_settled(self) -> None:
        """Waits until Envoy finds two servers of everything healthy and no flag is held.

        Envoy's opinion may be from before a disturbance: every server must have passed two checks since now, and none
        have failed one.
        """
        since = self.checks()

        def settled() -> bool:
            nonlocal since
            now = self.checks()
            if not all(now[f"{name}.membership_{kind}"] == 2 for name in CLUSTERS for kind in ("healthy", "total")):
                return False
            if any(now[f"{name}.health_check.failure"] != since[f"{name}.health_check.failure"] for name in CLUSTERS):
                since = now
            passed = (now[f"{name}.health_check.success"] - since[f"{name}.health_check.success"] for name in CLUSTERS)
            status = self.status()
            held = any(flag["held"] for flag in status.get("flags", {}).values())
            return all(count >= 4 for count in passed) and bool(status.get("ready")) and not held

        until(settled, "every server healthy and no flag held")

    def checks(self) -> Counter[str]:
        """Envoy's health checks and their result, by `CLUSTER.health_check.success` and the like."""
        found = self.counters(r"^cluster\..*\.(membership_(healthy|total)|health_check\.(success|failure))$")
        return Counter({name.removeprefix("cluster."): count for name, count in found.items()})

    def set_canary(self, percent: float, *, in_place: bool = False) -> None:
        """Edits the flag file on the host, by a rename as editors do or in place, and waits until it is served."""
        new = flag_file(percent)
        if in_place:
            self.flags.write_text(new)
        else:
            beside = self.flags.with_name("flags.yaml.new")
            beside.write_text(new)
            beside.replace(self.flags)
        until(lambda: self.effective() == percent, f"{percent} % for users")

    def effective(self) -> float | None:
        """The share that is in effect, as control says."""
        return self.status().get("flags", {}).get("digits", {}).get("effective_percent")


EXAMPLE = example()


class Clients:
    """Users who ask again and again while the body runs, some at the same time, each group on a connection of its own.

    `between` keeps them from asking, so that no request is under way: what a killed process was just answering is lost,
    as with every server.
    """

    def __init__(self, stack: Stack, users: Sequence[str], at_once: int = 4) -> None:
        self.answers: list[Answer] = []
        self._stack = stack
        self._stop = threading.Event()
        self._turns = [threading.Lock() for _ in range(at_once)]
        groups = [(turn, users[n::at_once]) for n, turn in enumerate(self._turns)]
        self._threads = [threading.Thread(target=self._ask, args=group) for group in groups]

    def __enter__(self) -> Self:
        """Begins to ask, and returns when every group has had its first answers."""
        for thread in self._threads:
            thread.start()
        self.until_more()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends after the answers that are under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, turn: threading.Lock, users: Sequence[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._stack.port, timeout=30)
        for user in itertools.cycle(users):
            with turn:
                self.answers.append(self._stack.infer(user, connection))
            if self._stop.wait(0.01):
                break
        connection.close()

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Nobody has a request under way inside."""
        with contextlib.ExitStack() as held:
            for turn in self._turns:
                held.enter_context(turn)
            yield

    def until_more(self) -> None:
        """Waits for answers after now."""
        enough = len(self.answers) + 40
        until(lambda: len(self.answers) > enough, "more answers")

    def failed(self) -> list[Answer]:
        """What was no 200."""
        return [one for one in self.answers if one.status != 200]

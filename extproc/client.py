"""Reports labels and business KPIs to perch from an application: a queue, a thread, and nothing that gets in the way.

    from extproc.client import OutcomesClient

    with OutcomesClient("http://127.0.0.1:8900") as outcomes:
        outcomes.report("accuracy", True, request_id=response.headers["x-request-id"])
        outcomes.report("revenue", 12.5, unit="user-6", flag="digits")

Needs the standard library alone.
"""

import atexit
import http.client
import json
import logging
import os
import threading
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

FIRST_RETRY_S, MAX_RETRY_S = 0.2, 10.0
MAX_ANSWER = 1 << 20
MAX_LINE = 1 << 14
"""Bytes of a report, several times what the server's limits on its texts come to."""

AGAIN = {408, 425, 429}
"""Besides 5xx, what a server says that would take the same later."""


@dataclass(slots=True)
class Sent:
    """What became of the reports so far.

    `accepted` as the server says: joined, waiting for their request, repeated, or late. `refused`: by the server, or
    for a value that is no number. `dropped`: the queue was full, or the client closed. `lost`: not delivered before it
    was closed.
    """

    accepted: int = 0
    refused: int = 0
    dropped: int = 0
    lost: int = 0


class DeliveryError(Exception):
    """The server could not be reached or asks to come again."""


@dataclass(slots=True, eq=False)
class OutcomesClient:
    """Sends reports to the control API at `url` in batches, each until it is delivered. Thread-safe; forks are fine.

    `report` never blocks and never raises. At most `max_queued` reports wait; while the server is away, newer ones are
    dropped and counted. A batch leaves when it has `batch` reports or after `every_s`. `token` is sent as a bearer
    token. Raises ValueError for a URL that is none.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    batch: int = 500
    every_s: float = 1.0
    max_queued: int = 100_000
    timeout_s: float = 10.0
    _sent: Sent = field(default_factory=Sent, init=False)
    _changed: threading.Condition = field(init=False, repr=False)
    _abandoned: threading.Event = field(init=False, repr=False)
    _waiting: deque[bytes] = field(init=False, repr=False)
    _under_way: int = field(default=0, init=False)
    _hurry: bool = field(default=False, init=False)
    _closed: bool = field(default=False, init=False)
    _process: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        odd = parts.query or parts.fragment or parts.username is not None
        if parts.scheme not in {"http", "https"} or not parts.hostname or odd:
            raise ValueError(f"{self.url!r} is no URL of a control API; write for example http://127.0.0.1:8900")
        _ = parts.port  # raises ValueError
        self._begin()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Locks, an empty queue and a thread for this process."""
        self._changed, self._abandoned = threading.Condition(), threading.Event()
        self._waiting, self._under_way, self._process = deque(), 0, os.getpid()
        threading.Thread(target=self._run, name="perch-outcomes", daemon=True).start()

    def report(
        self, name: str, value: Any, *, request_id: str = "", unit: str = "", flag: str = "", key: str = ""
    ) -> bool:
        """Queues one value about a request or a unit; False if it cannot be queued. `flag` is needed with a unit.

        Reports of a request are the same if name and key are; those of a unit get a key of their own if none is given,
        so that what is sent twice counts once.
        """
        try:
            number = value if isinstance(value, bool | int | float) else float(value)
            outcome = {"name": name, "value": number, "request_id": request_id, "unit": unit, "flag": flag, "key": key}
            if unit and not key:
                outcome["key"] = uuid.uuid4().hex
            line = json.dumps({part: given for part, given in outcome.items() if given != ""}, allow_nan=False)
            if len(line) > MAX_LINE:
                raise ValueError(f"{len(line)} bytes are no report")  # noqa: TRY301  told as what else is wrong
        except Exception as error:  # noqa: BLE001  whatever the application hands in, it goes on
            log.warning("not reported: %s: %s", name, error)
            return self._count_refused()
        return self._queue(line.encode())

    def _count_refused(self) -> bool:
        with self._changed:
            self._sent.refused += 1
        return False

    def _queue(self, line: bytes) -> bool:
        if self._process != os.getpid():
            self._begin()
        with self._changed:
            if self._closed or len(self._waiting) >= self.max_queued:
                self._sent.dropped += 1
                return False
            self._waiting.append(line)
            if len(self._waiting) in {1, self.batch}:
                self._changed.notify_all()
            return True

    @property
    def sent(self) -> Sent:
        """What became of the reports so far."""
        with self._changed:
            return replace(self._sent)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Sends what is queued now; whether all of it was delivered in time."""
        if self._process != os.getpid():
            return True
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._waiting and not self._under_way, timeout_s)
            self._hurry = False
            return done

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is queued, for at most this long; what is left is lost, counted, and told in the log."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not self.flush(timeout_s):
            self._abandoned.set()
            with self._changed:
                self._sent.lost += len(self._waiting) + self._under_way
                self._waiting.clear()
                lost = self._sent.lost
            log.warning("%d outcomes were not delivered to %s", lost, self.url)
        with self._changed:
            self._changed.notify_all()

    # --- the thread ---

    def _run(self) -> None:
        while lines := self._next_batch():
            self._deliver(lines)
            with self._changed:
                self._under_way = 0
                self._changed.notify_all()

    def _next_batch(self) -> list[bytes]:
        """Blocks until there is one; empty when the client is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(
                lambda: len(self._waiting) >= self.batch or self._hurry or self._closed, self.every_s
            )
            lines = [self._waiting.popleft() for _ in range(min(self.batch, len(self._waiting)))]
            self._under_way = len(lines)
            return lines

    def _deliver(self, lines: list[bytes]) -> None:
        """Tries until the server has answered, or the client is closed."""
        delay_s, told = FIRST_RETRY_S, False
        while not self._abandoned.is_set():
            try:
                accepted = self._post(b"\n".join(lines))
            except DeliveryError as error:
                if not told:
                    log.warning("%s; outcomes are kept and sent again", error)
                told = True
                self._abandoned.wait(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_S)
                continue
            with self._changed:
                if not self._abandoned.is_set():
                    self._sent.accepted += accepted
                    self._sent.refused += len(lines) - accepted
            return

    def _post(self, body: bytes) -> int:
        """How many were accepted. Raises DeliveryError if the same should be sent again."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        headers = {"content-type": "application/x-ndjson"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        try:
            connection.request("POST", f"{parts.path.rstrip('/')}/v1/outcomes", body, headers)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryError(f"{self.url} cannot be reached: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if answer.status >= 500 or answer.status in AGAIN:
            raise DeliveryError(f"{self.url} answers {answer.status}")
        return self._accepted(answer.status, content)

    def _accepted(self, status: int, content: bytes) -> int:
        try:
            told = json.loads(content)
            accepted, refused, errors = int(told["accepted"]), int(told["refused"]), told["errors"]
        except (ValueError, TypeError, KeyError, RecursionError):
            log.warning("%s answers %d to outcomes, which are given up: %.200r", self.url, status, content)
            return 0
        if refused:
            log.warning("%d of %d outcomes were refused: %.200r", refused, accepted + refused, errors)
        return accepted

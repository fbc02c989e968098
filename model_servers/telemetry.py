"""What a model server tells StatsD, and its log of errors.

`perch.model.*`, tagged with cohort (the server's `--arm`), model and model_version:

    requests     counter, tag status         batch_rows, batch_requests   per call of the model
    errors       counter, 5xx only           queue_ms, inference_ms       per call of the model
    predictions  counter, tag prediction     rss_bytes                    gauge
    reloads      counter, tag result         warm_ms                      gauge, the last warm-up

`predictions` counts classes; a float prediction is rounded to one significant digit, which makes the counter a
histogram with logarithmic bins. At most 64 values of the tag are kept per version, further ones count as `other`.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from extproc.metrics import Metrics
from model_servers.batching import BatchSeen

_CLASSES = 64
_LINES_PER_S = 20  # of the error log
_STATM = Path("/proc/self/statm")


class Telemetry:
    """Counts in plain ints on the request path; `flush` sends them. A dead StatsD costs nothing."""

    def __init__(self, metrics: Metrics, *, on: bool) -> None:
        self._metrics = metrics
        self._on = on
        self._requests: dict[tuple[str, int], int] = {}
        self._predictions: dict[str, Counter[Any]] = {}
        self._second = 0
        self._lines = 0

    def answered(self, version: str, status: int) -> None:
        """One inference request got this status."""
        key = (version, status)
        self._requests[key] = self._requests.get(key, 0) + 1

    def predicted(self, version: str, predictions: list[Any]) -> None:
        """The predictions of one response."""
        if not self._on:
            return
        counts = self._predictions.setdefault(version, Counter())
        for value in predictions:
            word = f"{value:.1g}" if isinstance(value, float) else value
            counts[word if word in counts or len(counts) < _CLASSES else "other"] += 1

    def batch(self, seen: BatchSeen, version: str) -> None:
        """One call of the model."""
        if not self._on:
            return
        self._metrics.timing("model.batch_rows", seen.rows, model_version=version)
        self._metrics.timing("model.batch_requests", seen.requests, model_version=version)
        self._metrics.timing("model.queue_ms", seen.queue_s * 1000, model_version=version)
        self._metrics.timing("model.inference_ms", seen.inference_s * 1000, model_version=version)

    def reloaded(self, version: str, result: str, warm_s: float = 0.0) -> None:
        """A new version was accepted (result `ok`) or not (`rejected`)."""
        self._metrics.count("model.reloads", 1, model_version=version, result=result)
        if warm_s:
            self._metrics.gauge("model.warm_ms", warm_s * 1000, model_version=version)

    def failed(self, event: str, **fields: Any) -> None:
        """One JSON line on stderr for an error; beyond 20 in a second they are only counted."""
        second = int(time.time())
        if second != self._second:
            if self._lines > _LINES_PER_S:
                _write_line(event="errors_not_logged", count=self._lines - _LINES_PER_S)
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= _LINES_PER_S:
            _write_line(event=event, **fields)

    def flush(self) -> None:
        """Sends what has gathered since the last flush."""
        requests, self._requests = self._requests, {}
        for (version, status), n in requests.items():
            self._metrics.count("model.requests", n, model_version=version, status=str(status))
            if status >= 500:
                self._metrics.count("model.errors", n, model_version=version)
        for version, counts in self._predictions.items():
            for value, n in counts.items():
                word = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
                self._metrics.count("model.predictions", n, model_version=version, prediction=word[:64])
        self._zero()
        self._metrics.gauge("model.rss_bytes", rss_bytes())
        self._metrics.flush()

    def _zero(self) -> None:
        """Keeps the known classes, so that the bound of 64 holds over the life of the process."""
        for counts in self._predictions.values():
            for value in counts:
                counts[value] = 0


def rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _write_line(**fields: Any) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "level": "error", **fields}
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()

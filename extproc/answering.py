"""One process that answers Envoy: a transport, what it answers with, and the counters of what it answered."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from extproc.core.flags import Exposure, Flag, effective_percent
from extproc.core.ruleset import Choice
from extproc.metrics import Metrics
from extproc.receiver import Received
from extproc.wire.answer import Answerer


class Transport(Protocol):
    """What every ext_proc transport can do."""

    async def start(self, listen: str) -> str:
        """Listens; returns the address it got. Raises OSError."""

    async def stop(self, grace_s: float) -> None:
        """Drains and closes."""


MakeTransport = Callable[[Callable[[bytes], bytes], Callable[[], bool]], Transport]


@dataclass(slots=True)
class Answering:
    """Answers with the last ruleset it was given. Not serving, as the health check sees it, until one was good."""

    metrics: Metrics
    answerer: Answerer
    serving: bool = False
    _told: list[int] = field(default_factory=list, init=False)

    def publish(self, received: Received) -> None:
        """Serves this ruleset from the next request on."""
        self.count_decisions()
        self.answerer.published = received.published
        self._told = [0] * len(received.published.counts)
        self.serving = True

    def count_decisions(self) -> None:
        """Hands to StatsD what was decided since the last call: a walk over plain integers, off the request path."""
        published = self.answerer.published
        self._told = self._told or [0] * len(published.counts)
        for choice in published.ruleset.choices:
            n = published.counts[choice.index]
            if n != self._told[choice.index]:
                self.metrics.count("decision.count", n - self._told[choice.index], **tags_of(choice))
                self._told[choice.index] = n


def tags_of(choice: Choice) -> dict[str, str]:
    """The tags of a decision's counter. A rule has one only where a rule decided."""
    tags = {"cohort": choice.cohort.value, "flag": choice.flag, "model": choice.model, "reason": choice.reason.value}
    if choice.rule:
        tags["rule"] = choice.rule
    return {key: value or "none" for key, value in tags.items()}


def gauge_flags(metrics: Metrics, version: str, flags: Iterable[tuple[Flag, Exposure | None]]) -> None:
    """The ruleset's version and every flag's percentage as gauges, told by the one process that owns the flag file."""
    metrics.gauge("decision.ruleset", 1, version=version)
    for flag, exposure in flags:
        percent = float(effective_percent(flag, exposure))
        metrics.gauge("decision.canary_percent", percent, flag=flag.key, model=flag.model)

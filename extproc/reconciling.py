"""Reconciles what serve decided, what the access log says and what Envoy counted, every ten seconds."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from extproc.core.decided import Decided
from extproc.core.reconcile import Difference, Evidence, LogCounts, Reconciliation, Sent
from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable

EVERY_S = 10.0
SETTLE_S = 1.6
"""Two flushes of Envoy's log are one second; serve reports every second. What ended before is known after this."""
_COUNTERS = r"^(cluster\..+_(stable|canary)\.upstream_rq_(total|active)|http\.edge\.downstream_rq_active)$"


@dataclass(slots=True)
class Reconciler:
    """Compares and tells. `models` maps a flag to its model; `tell` is (kind, text, warning).

    `server` is the model whose stable answers for the server as a whole, the first one of the models file.
    """

    admin: EnvoyAdmin
    decided: Decided
    log: LogCounts
    models: Callable[[], Mapping[str, str]]
    server: str
    tell: Callable[[str, str, bool], None]
    found: Reconciliation = field(default_factory=Reconciliation)
    _told: dict[str, Difference] = field(default_factory=dict)

    async def run(self) -> None:
        """Compares until cancelled: for the first time as soon as Envoy answers, before its first request if it can."""
        while await self._sent() is None:  # noqa: ASYNC110  nobody tells us that another process has come up
            await asyncio.sleep(0.2)
        for _ in range(20):  # they come within a second or two; without a serve or a flag there is still Envoy
            if self.decided.heard() and self.models():
                break
            await asyncio.sleep(0.1)
        while True:
            began_s = time.monotonic()
            await self.compare()
            await asyncio.sleep(max(0.0, began_s + EVERY_S - time.monotonic()))

    async def compare(self) -> None:
        """One comparison; takes SETTLE_S seconds."""
        decided, heard, before = self.decided.by_flag(), self.decided.heard(), await self._sent()
        self.log.cut(time.time())
        after = await self._sent()
        try:
            await asyncio.sleep(SETTLE_S)
            logged = self.log.logged(self.server)
        finally:
            self.log.join()
        again = self.decided.heard()
        evidence = Evidence(
            decided=decided,
            later=self.decided.by_flag(),
            processes=frozenset(one for one, seq in heard.items() if again.get(one, seq) > seq),
            logged=logged,
            before=before,
            after=after,
        )
        self.found.compare(self.models(), evidence)
        for flag, difference in self.found.differences.items():
            self._alert(flag, difference)

    def alerts(self) -> list[str]:
        """What somebody should look into, a line each."""
        return [f"{flag}: {text}" for flag, found in self.found.differences.items() for text in found.alerts()]

    def _alert(self, flag: str, found: Difference) -> None:
        """Tells what is beyond the threshold when it is new, and again when it has doubled."""
        told = self._told.get(flag, Difference())
        grew = any(getattr(found, name) >= 2 * getattr(told, name) > 0 for name in ("lost", "surplus", "mismatched"))
        if found.alerts() and (grew or len(found.alerts()) > len(told.alerts())):
            self._told[flag] = found
            for text in found.alerts():
                self.tell("reconciliation", f"{flag}: {text}", True)

    async def _sent(self) -> Sent | None:
        """Envoy's counters; None while it does not answer."""
        try:
            counters = await self.admin.counters(_COUNTERS)
            began_s = time.monotonic() - await self.admin.age_s()
        except EnvoyUnreachable:
            return None
        finished: dict[str, int] = {}
        for name, value in counters.items():
            _, _, rest = name.partition("cluster.")
            cluster, _, what = rest.rpartition(".")
            model, _, arm = cluster.rpartition("_")
            if arm in {"stable", "canary"} and not model.endswith("_canary_or"):
                finished[model] = finished.get(model, 0) + (value if what == "upstream_rq_total" else -value)
        return Sent(finished, counters.get("http.edge.downstream_rq_active", 0), began_s)

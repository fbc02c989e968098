"""Reconciles what serve decided, what the access log says and what Envoy counted, every ten seconds."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import inf
from typing import Any

from extproc.core.decided import Decided
from extproc.core.logcounts import LogCounts
from extproc.core.reconcile import EVERY_S, RECENT_S, Evidence, Reconciliation, Sent
from extproc.envoyadmin import EnvoyAdmin, EnvoyUnreachable

SETTLE_S = 1.6
"""Two flushes of Envoy's log are one second; serve reports every second. What ended before is known after this."""
LATE_S = 0.4
"""If Envoy or this process stood still for longer meanwhile, what it had to say may still be on its way."""
STALE_S = 60.0
"""Without a comparison for so many seconds, that itself is an alert."""
_LOOK_S = 0.2
_QUIET_LOOKS = 4
_COUNTERS = r"^(cluster\..+_(stable|canary)\.upstream_rq_(total|active)|http\.edge\.downstream_rq_active)$"
_OVER = {
    "lost": "no request is missing in the access log",
    "surplus": "no request in the access log is of an unknown origin",
    "mismatched": "no request was served by another arm than decided",
    "failed_open": "ext_proc answered in time",
}


@dataclass(slots=True)
class Reconciler:
    """Compares and tells. `models` maps a flag to its model; `tell` is (kind, text, warning).

    `server` is the model whose stable answers for the server as a whole, the first one of the models file. `since_s` is
    when counting began, `compared_s` the instant of the last comparison, in seconds since 1970; None before the first.
    """

    admin: EnvoyAdmin
    decided: Decided
    log: LogCounts
    models: Callable[[], Mapping[str, str]]
    server: str
    tell: Callable[[str, str, bool], None]
    found: Reconciliation = field(default_factory=Reconciliation)
    since_s: float | None = None
    compared_s: float | None = None
    _compared_at_s: float = field(default=inf, init=False)
    _told: dict[tuple[str, str], int] = field(default_factory=dict)

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
        """One comparison; takes SETTLE_S seconds, and more on a machine that is too busy."""
        decided, heard, before, cut_s = self.decided.by_flag(), self.decided.heard(), await self._sent(), time.time()
        self.log.cut(cut_s)
        after = await self._sent()
        try:
            await self._settle()
            least, most = self.log.logged(self.server)
        finally:
            self.log.join()
        again = self.decided.heard()
        evidence = Evidence(
            decided=decided,
            later=self.decided.by_flag(),
            processes=frozenset(one for one, seq in heard.items() if again.get(one, seq) > seq),
            least=least,
            most=most,
            before=before,
            after=after,
        )
        if self.found.compare(self.models(), evidence):
            self.since_s, self.compared_s = self.since_s or cut_s, cut_s
            self._compared_at_s = time.monotonic()
            self._tell_alerts()

    async def _settle(self) -> None:
        """Returns after SETTLE_S seconds, of which neither Envoy nor this process stood still in the last ones."""
        began_s = time.monotonic()
        looked = deque([began_s], maxlen=_QUIET_LOOKS + 1)
        quiet_s = _QUIET_LOOKS * _LOOK_S + LATE_S
        while len(looked) <= _QUIET_LOOKS or looked[-1] - began_s < SETTLE_S or looked[-1] - looked[0] > quiet_s:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(EnvoyUnreachable):  # gone: it says nothing more
                await self.admin.age_s()
            looked.append(time.monotonic())

    def status(self, flag: str) -> dict[str, Any] | None:
        """What was found about a flag, with the times, in UTC; None before the first comparison."""
        found = self.found.differences.get(flag)
        if found is None or self.since_s is None or self.compared_s is None:
            return None
        return {**asdict(found), "since": _time(self.since_s), "compared": _time(self.compared_s)}

    def alerts(self) -> list[str]:
        """What somebody should look into, a line each."""
        found = [f"{flag}: {text}" for flag, one in self.found.lately().items() for text in one.alerts().values()]
        silent_s = time.monotonic() - self._compared_at_s
        if silent_s > STALE_S:
            found.append(f"the access log was not compared for {silent_s:.0f} s: Envoy's admin does not answer in time")
        return found

    def _tell_alerts(self) -> None:
        """Tells what is beyond the threshold when it is new, again when it has doubled, and when it is over."""
        lately = self.found.lately()
        for flag, found in lately.items():
            for name, text in found.alerts().items():
                n, told = getattr(found, name), self._told.get((flag, name), 0)
                if n >= 2 * told:
                    self._told[flag, name] = n
                    self.tell("reconciliation", f"{flag}: {text}", True)
        for flag, name in [*self._told]:
            if flag not in lately or name not in lately[flag].alerts():
                del self._told[flag, name]
                text = f"over: in the last {RECENT_S / 60:.0f} minutes {_OVER[name]}, or too few to tell"
                self.tell("reconciliation", f"{flag}: {text}", False)

    async def _sent(self) -> Sent | None:
        """Envoy's counters; None while it does not answer, or so late that its age tells nothing."""
        asked_s = time.monotonic()
        try:
            counters = await self.admin.counters(_COUNTERS)
            began_s = time.monotonic() - await self.admin.age_s()
        except EnvoyUnreachable:
            return None
        if time.monotonic() - asked_s > LATE_S:
            return None
        finished: dict[str, int] = {}
        for name, value in counters.items():
            _, _, rest = name.partition("cluster.")
            cluster, _, what = rest.rpartition(".")
            model, _, arm = cluster.rpartition("_")
            if arm in {"stable", "canary"} and not model.endswith("_canary_or"):
                finished[model] = finished.get(model, 0) + (value if what == "upstream_rq_total" else -value)
        return Sent(finished, counters.get("http.edge.downstream_rq_active", 0), began_s)


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")

"""When control compares, and what it tells of it; what a comparison finds is in tests/core/test_reconcile.py."""
# ruff: noqa: D102  methods here are named after what they do

import asyncio
import re
from dataclasses import dataclass, field

import pytest

from extproc import reconciling
from extproc.core.decided import Decided
from extproc.core.logcounts import LogCounts
from extproc.core.reconcile import EVERY_S, RECENT_S
from extproc.envoyadmin import EnvoyUnreachable
from extproc.reconciling import STALE_S, Reconciler


@dataclass
class Clock:
    """Time that passes only where somebody waits: a machine that stands still changes nothing of it."""

    now_s: float = 1_000.0

    def monotonic(self):
        return self.now_s

    def time(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds
        await asyncio.sleep(0)


@dataclass
class Admin:
    """Stands for Envoy's admin interface: `finished` attempts of digits; `answers` is how long each look takes."""

    clock: Clock
    finished: int = 0
    gone: bool = False
    answers: list[float] = field(default_factory=list)
    looks: int = 0

    async def counters(self, _pattern):
        if self.gone:
            raise EnvoyUnreachable("gone")
        return {"cluster.digits_stable.upstream_rq_total": self.finished}

    async def age_s(self):
        if self.gone:
            raise EnvoyUnreachable("gone")
        self.looks += 1
        age_s = self.clock.now_s
        await self.clock.sleep(self.answers.pop(0) if self.answers else 0)
        return age_s


class Desk:
    """A reconciler, what it asks, and what it told."""

    def __init__(self, clock):
        self.clock, self.admin, self.told = clock, Admin(clock), []
        self.reconciler = Reconciler(
            self.admin,
            Decided(),
            LogCounts(),
            lambda: {"digits": "digits"},
            "digits",
            lambda *one: self.told.append(one),
        )

    async def compare(self, times=1):
        for _ in range(times):
            await self.reconciler.compare()


@pytest.fixture
def desk(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(reconciling, "time", clock)
    monkeypatch.setattr(reconciling, "asyncio", clock)
    return Desk(clock)


async def test_an_alert_is_told_when_it_begins_when_it_has_doubled_and_when_it_is_over(desk):
    await desk.compare()
    assert desk.told == []
    desk.admin.finished = 20
    await desk.compare(2)
    sentence = (
        "digits: 20 of 20 requests of the last 5 minutes are missing in the access log; its numbers are incomplete"
    )
    assert desk.told == [("reconciliation", sentence, True)]
    assert desk.reconciler.alerts() == [sentence]
    desk.admin.finished = 39
    await desk.compare()
    assert len(desk.told) == 1
    desk.admin.finished = 40
    await desk.compare()
    assert [text.split()[1] for _, text, _ in desk.told] == ["20", "40"]
    desk.told.clear()
    await desk.compare(int(RECENT_S / EVERY_S) + 1)
    assert [(text.split(":")[1], warning) for _, text, warning in desk.told] == [(" over", False)]
    assert desk.reconciler.alerts() == []
    assert desk.reconciler.status("digits")["lost"] == 40


async def test_a_comparison_waits_until_envoy_has_answered_in_time_for_a_while(desk):
    desk.admin.answers = [0, 0, 0, 0, 0, 0, 2.0]  # two to read the counters, and then the fifth look
    await desk.compare()
    assert desk.admin.looks >= 2 + 5 + 4
    assert desk.reconciler.status("digits")["lost"] == 0


async def test_an_envoy_that_stands_still_at_the_first_look_is_waited_for_like_any_other(desk):
    desk.admin.answers = [0, 0, 2.0]  # two to read the counters, and then the first look, which takes all the time
    await desk.compare()
    assert desk.admin.looks >= 2 + 1 + 4
    assert desk.reconciler.status("digits")["lost"] == 0


async def test_counters_that_come_late_are_not_compared(desk):
    desk.admin.answers = [0.6]
    await desk.compare()
    assert desk.reconciler.status("digits") is None
    await desk.compare()
    assert desk.reconciler.status("digits")["compared"].endswith("+00:00")


async def test_that_nothing_is_compared_any_more_is_an_alert(desk):
    await desk.compare()
    since = desk.reconciler.status("digits")["since"]
    desk.admin.gone = True
    await desk.compare()
    assert desk.reconciler.alerts() == []
    await desk.clock.sleep(STALE_S)
    (alert,) = desk.reconciler.alerts()
    assert re.match(r"the access log was not compared for 6\d s", alert)
    assert desk.reconciler.status("digits")["since"] == since

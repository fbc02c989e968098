"""When control compares, and what it tells of it; what a comparison finds is in tests/core/test_reconcile.py."""
# ruff: noqa: D102  methods here are named after what they do

import asyncio
from dataclasses import dataclass, field

import pytest

from extproc import reconciling
from extproc.core.decided import Decided
from extproc.core.logcounts import LogCounts
from extproc.core.reconcile import EVERY_S, RECENT_S
from extproc.envoyadmin import EnvoyUnreachable
from extproc.reconciling import Reconciler


@dataclass
class Admin:
    """Stands for Envoy's admin interface: `finished` attempts of digits; `answers` is how long each look takes."""

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
        await asyncio.sleep(self.answers.pop(0) if self.answers else 0)
        return 0


class Desk:
    """A reconciler, what it asks, and what it told."""

    def __init__(self):
        self.admin, self.told = Admin(), []
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
    """Its looks are a hundredth as far apart, so that minutes pass in a test."""
    monkeypatch.setattr(reconciling, "SETTLE_S", 0.016)
    monkeypatch.setattr(reconciling, "_LOOK_S", 0.002)
    return Desk()


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
    desk.admin.answers = [0, 0, 0, 0, 0, 0, 0.6]  # two to read the counters, and then the fifth look
    await desk.compare()
    assert desk.admin.looks >= 2 + 5 + 4
    assert desk.reconciler.status("digits")["lost"] == 0


async def test_an_envoy_that_stands_still_at_the_first_look_is_waited_for_like_any_other(desk):
    desk.admin.answers = [0, 0, 0.6]  # two to read the counters, and then the first look, which takes all the time
    await desk.compare()
    assert desk.admin.looks >= 2 + 1 + 4
    assert desk.reconciler.status("digits")["lost"] == 0


async def test_counters_that_come_late_are_not_compared(desk):
    desk.admin.answers = [0.6]
    await desk.compare()
    assert desk.reconciler.status("digits") is None
    await desk.compare()
    assert desk.reconciler.status("digits")["compared"].endswith("+00:00")


async def test_that_nothing_is_compared_any_more_is_an_alert(desk, monkeypatch):
    await desk.compare()
    since = desk.reconciler.status("digits")["since"]
    monkeypatch.setattr(reconciling, "STALE_S", 0.0)
    desk.admin.gone = True
    await desk.compare()
    (alert,) = desk.reconciler.alerts()
    assert alert.startswith("the access log was not compared for 0 s")
    assert desk.reconciler.status("digits")["since"] == since

"""Compares four counts of the same requests: decided by serve, assigned and served by the log, sent on by Envoy.

A log may lose entries without saying so, a route may send a request elsewhere than it was decided, an Envoy may run
that nobody knows of. Each shows as a difference. What is said here is a lower bound: requests under way, retries and
decisions that came too late are taken out in the direction that excuses the difference, so one that remains is one.
Without traffic during the comparison it is exact.

The log is compared as of an instant that lies two flush intervals back, when all it had to say of it has arrived;
Envoy's counters are read just before that instant and just after it.

There are two comparisons, each blind where the other sees: serve's decisions with the log, and Envoy's counters with
the log. A process of serve that began or fell silent leaves it open what it decided last, an Envoy that began again
what the one before it counted last: then only that comparison starts anew, and what it had found is kept.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from math import inf

from extproc.core.logcounts import Logged

EVERY_S = 10.0
"""Seconds between two comparisons."""
RECENT_S = 300.0
"""An alert tells of what was found in so many seconds, and ends with them."""
ALERT_SHARE = 0.001
"""Share of the requests from which a difference is an alert, if it is ALERT_LEAST at least."""
ALERT_LEAST = 10
_SAME_S = 2.0
"""Envoy tells its age in whole seconds; one that began at another time than this is another one."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Envoy's counters: attempts that the member clusters of each model have finished, and requests under way.

    `began_s` is when Envoy began, on any clock that does not step, in seconds.
    """

    finished: Mapping[str, int] = field(default_factory=dict)
    under_way: int = 0
    began_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that one comparison needs.

    `decided` are the decisions by flag that were known at its instant, `later` those known when the log had settled;
    `processes` names the processes that reported theirs before it and again after it. `least` and `most` are what the
    log may have said as of the instant, `before` and `after` Envoy's counters around it, None for no answer.
    """

    decided: Mapping[str, int]
    later: Mapping[str, int]
    processes: frozenset[object]
    least: Logged
    most: Logged
    before: Sent | None
    after: Sent | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What one flag's reconciliation found, since the log has been read.

    `decided` are decisions since then: those that the log has, those that it owes, less those of nobody we know.
    `lost` are entries that the log owes; `surplus` entries that nobody we know of can have caused: another Envoy, or
    another serve; `mismatched` requests that went elsewhere than decided, a fall-back to stable not among them;
    `failed_open` those of the flag's model that got stable since ext_proc did not answer.
    """

    decided: int = 0
    assigned: int = 0
    served: int = 0
    lost: int = 0
    surplus: int = 0
    mismatched: int = 0
    failed_open: int = 0

    def since(self, before: "Difference") -> "Difference":
        """What has come since then."""
        return Difference(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def alerts(self) -> dict[str, str]:
        """What is beyond the threshold, by its name here, as sentences; of what was found in RECENT_S seconds."""
        of = max(self.decided, self.assigned, self.lost)
        lately = f"of the last {RECENT_S / 60:.0f} minutes"
        sentences = {
            "lost": f"{self.lost} of {of} requests {lately} are missing in the access log; its numbers are incomplete",
            "surplus": f"{self.surplus} requests {lately} are in the access log that no known process caused; "
            "a second Envoy?",
            "mismatched": f"{self.mismatched} of {of} requests {lately} were served by another arm than decided; "
            "see Envoy's routes",
            "failed_open": f"{self.failed_open} of {of + self.failed_open} requests {lately} got stable, as ext_proc "
            "did not answer in time; is serve up?",
        }
        least = max(ALERT_LEAST, ALERT_SHARE * of)
        return {name: text for name, text in sentences.items() if getattr(self, name) >= least}


@dataclass(slots=True)
class Rises:
    """How much a number has risen in all, while it is known only between two bounds. A fall does not make good for it.

    Between an upper bound and a lower one that comes later it has risen by the second less the first, if not more.
    Falls count once they are certain and as large as an alert, so that no jitter of the bounds adds up.
    """

    _kept: int = 0
    _rise: int = 0
    _low: float = inf

    @property
    def total(self) -> int:
        """All that is certain."""
        return self._kept + self._rise

    def add(self, least: int, most: int) -> None:
        """Takes the bounds of now."""
        self._rise = int(max(self._rise, least - self._low))
        if most <= self._low + self._rise - (ALERT_LEAST if self._rise else 0):
            self.begin_again()
            self._low = most

    def begin_again(self) -> None:
        """The number goes on from elsewhere."""
        self._kept, self._rise, self._low = self.total, 0, inf


@dataclass(slots=True)
class _Sides:
    """What one of the two comparisons found."""

    lost: Rises = field(default_factory=Rises)
    surplus: Rises = field(default_factory=Rises)

    def begin_again(self) -> None:
        self.lost.begin_again()
        self.surplus.begin_again()


@dataclass(slots=True)
class _Balance:
    """One flag: what serve's decisions and what Envoy's counters show, and the sums of the latest comparisons."""

    latest: deque[Difference]
    decided: _Sides = field(default_factory=_Sides)
    sent: _Sides = field(default_factory=_Sides)


@dataclass(slots=True)
class Reconciliation:
    """Compares again and again. Counting begins with the first comparison."""

    _balances: dict[str, _Balance] = field(default_factory=dict)
    _last: Evidence | None = None

    @property
    def differences(self) -> dict[str, Difference]:
        """By flag, as of the last comparison."""
        return {flag: balance.latest[-1] for flag, balance in self._balances.items()}

    def lately(self) -> dict[str, Difference]:
        """By flag, what was found within RECENT_S seconds."""
        return {flag: balance.latest[-1].since(balance.latest[0]) for flag, balance in self._balances.items()}

    def compare(self, flags: Mapping[str, str], evidence: Evidence) -> bool:
        """Takes one comparison in. `flags` maps a flag to its model. False if Envoy did not answer: it told nothing."""
        now, last = evidence, self._last
        if now.before is None or now.after is None:
            return False
        # What one process or one Envoy did in its last moments nobody has read.
        anew = last is not None and now.processes != last.processes
        restarted_within = _another(now.before, now.after)
        restarted = restarted_within or _another(last.after if last is not None else None, now.before)
        self._balances = {flag: self._balances.get(flag) or _Balance(deque()) for flag in flags}
        for flag, balance in self._balances.items():
            if anew:
                balance.decided.begin_again()
            if restarted:
                balance.sent.begin_again()
            _compare_decided(balance.decided, flag, flags[flag], now, last)
            if not restarted_within:
                _compare_sent(balance.sent, flags[flag], now.before, now.after, now)
            _sum_up(balance, flag, flags[flag], now.least, first=last is None)
        self._last = now
        return True


def _another(last: Sent | None, now: Sent) -> bool:
    """Whether the counters are not those of the Envoy that answered before."""
    if last is None:
        return False
    restarted = abs(now.began_s - last.began_s) > _SAME_S
    return restarted or any(n > now.finished.get(model, 0) for model, n in last.finished.items())


def _compare_decided(sides: _Sides, flag: str, model: str, now: Evidence, last: Evidence | None) -> None:
    """Serve's decisions with the log. Until they are reported, and while their requests are under way, they differ.

    A request without a decision in the log may have been decided all the same, in vain: Envoy no longer waited. The
    decision may come to be known after its entry, so an entry excuses none of it before the next comparison.
    """
    under_way = now.before.under_way if now.before is not None else 0
    least, most = now.least.assigned.get(flag, 0), now.most.assigned.get(flag, 0)
    decided, later = now.decided.get(flag, 0), now.later.get(flag, 0)
    before = last.least.undecided.get(model, 0) if last is not None else 0
    sides.lost.add(decided - most - now.most.undecided.get(model, 0) - under_way, later - least - before)
    sides.surplus.add(least - later, most - decided + under_way)


def _compare_sent(sides: _Sides, model: str, before: Sent, after: Sent, now: Evidence) -> None:
    """Envoy's counters with the log. What is under way may have finished an attempt; not every attempt was sent."""
    least, most = now.least, now.most
    sent, sent_later = before.finished.get(model, 0), after.finished.get(model, 0)
    sides.lost.add(sent - most.attempts.get(model, 0) - before.under_way, sent_later - least.attempts.get(model, 0))
    sides.surplus.add(least.answered.get(model, 0) - sent_later, most.answered.get(model, 0) - sent + before.under_way)


def _sum_up(balance: _Balance, flag: str, model: str, logged: Logged, *, first: bool) -> None:
    """Both comparisons count the same requests: the one that found more is nearer to the truth."""
    assigned = logged.assigned.get(flag, 0)
    decided, sent = balance.decided, balance.sent
    found = Difference(
        decided=assigned + decided.lost.total - decided.surplus.total,
        assigned=assigned,
        served=logged.served.get(model, 0),
        lost=max(decided.lost.total, sent.lost.total),
        surplus=max(decided.surplus.total, sent.surplus.total),
        mismatched=logged.mismatched.get(flag, 0),
        failed_open=logged.failed_open.get(model, 0),
    )
    if not balance.latest:  # of a flag that is new nothing is known of before
        balance.latest = deque([Difference() if first else found], maxlen=int(RECENT_S / EVERY_S) + 1)
    balance.latest.append(found)

"""What is allowed in a flag file and probably not meant: warnings, each at its place.

They never keep a file from being served.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from extproc.core.bucketing import BUCKETS
from extproc.core.conditions import Condition, Leaf, Not, Op, Subject
from extproc.core.crosschecks import walk_conditions
from extproc.core.document import Document, Path, Problem
from extproc.core.flags import Exposures, Flag, MissingUnit, Rule, SourceKind, UnitSource
from extproc.core.implication import always, covers_all, implies, never
from extproc.core.plan import plan

EARLY = "Envoy takes it off every request before perch sees it"
HOP = "it is about one connection, and Envoy does not pass it on"
NOT_FORWARDED = {
    "x-model-cohort": f"{EARLY}, since it is the header that perch sets",
    "x-force-cohort": "it is the testers', whom `allow_force: true` lets choose their arm",
    "x-request-id": "Envoy makes a new one for each request; the client's own is x-client-request-id",
    "x-forwarded-client-cert": EARLY,
    "host": "Envoy calls it :authority, which no rule can look at",
    **dict.fromkeys(("connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"), HOP),
    **dict.fromkeys(
        (
            "x-envoy-downstream-service-cluster",
            "x-envoy-downstream-service-node",
            "x-envoy-expected-rq-timeout-ms",
            "x-envoy-force-trace",
            "x-envoy-hedge-on-per-try-timeout",
            "x-envoy-ip-tags",
            "x-envoy-max-retries",
            "x-envoy-original-path",
            "x-envoy-original-url",
            "x-envoy-retriable-header-names",
            "x-envoy-retriable-status-codes",
            "x-envoy-retry-grpc-on",
            "x-envoy-retry-on",
            "x-envoy-upstream-alt-stat-name",
            "x-envoy-upstream-rq-per-try-timeout-ms",
            "x-envoy-upstream-rq-timeout-alt-response",
            "x-envoy-upstream-rq-timeout-ms",
        ),
        EARLY,
    ),
}
"""Headers that no client can bring to perch, and why."""

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"))

Warned = tuple[Path, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the advice may look at beside the file: the models' path prefixes, the day, and what is served now.

    `today` is YYYY-MM-DD. `served` None: nothing is known about it, so nothing is compared.
    """

    prefixes: Mapping[str, str]
    today: str
    served: Sequence[Flag] | None = None
    exposures: Exposures = field(default_factory=Exposures)


def advise(document: Document, flags: Sequence[Flag], known: Known) -> tuple[Problem, ...]:
    """Every warning about a good file, in the order of its lines."""
    found = [
        document.problem(path, message, of_key=len(path) == 2) for path, message in _warnings(document, flags, known)
    ]
    return tuple(sorted(found, key=lambda problem: (problem.place.line, problem.place.column)))


def _warnings(document: Document, flags: Sequence[Flag], known: Known) -> Iterator[Warned]:
    for path, condition in walk_conditions(document.data):
        yield from _condition_warnings(path, condition)
    for flag in flags:
        path = ("flags", flag.key)
        prefix = known.prefixes.get(flag.model, f"/v2/models/{flag.model}/")
        if flag.expires is not None and flag.expires < known.today:
            yield (*path, "expires"), f"expired on {flag.expires}: take the flag out, or write a later day"
        if "unit" in document.data["flags"][flag.key]:
            yield from _unit_warnings(flag, path)
        yield from _reach_warnings(flag, path, prefix)
        yield from _percentage_warnings(flag, path)
    if known.served is not None:
        for each in plan(known.served, flags, known.exposures):
            yield from ((("flags", each.key, *notice.path), notice.message) for notice in each.notices)


def _condition_warnings(path: Path, condition: Mapping[str, object]) -> Iterator[Warned]:
    """About one condition as written, whatever surrounds it."""
    header = condition.get("header")
    if isinstance(header, str):
        why = why_not_forwarded(header.lower())
        if why is not None:
            yield (*path, "header"), f"no client's {header.lower()} reaches a rule: {why}"
    method = condition.get("method")
    if isinstance(method, dict):
        for operator in ("equals", "in"):
            written = method.get(operator, [])
            for word in written if isinstance(written, list) else [written]:
                if str(word) not in METHODS and str(word).upper() in METHODS:
                    yield (*path, "method", operator), f"methods are written in capitals: {str(word).upper()}"


def why_not_forwarded(header: str) -> str | None:
    """Why a client's header of this name (lower-case) never reaches perch; None if it does once a rule names it."""
    return EARLY if header.startswith("x-perch-") else NOT_FORWARDED.get(header)


def _unit_warnings(flag: Flag, path: Path) -> Iterator[Warned]:
    for i, source in enumerate(flag.unit):
        why = why_not_forwarded(source.name) if source.kind is SourceKind.HEADER else None
        if why is not None:
            instead = "; write `random`, which says so" if source.name == "x-request-id" else ""
            yield (*path, "unit", i), f"no client's {source.name} is ever hashed: {why}{instead}"
    people = [source for source in flag.unit if source.kind is not SourceKind.RANDOM]
    if len(people) > 1:
        first = people[0].name
        message = f"people move when they get {first}, at login for instance, and before it were drawn by another unit"
        yield (*path, "unit"), f"{message}; write one unit that stays the same"


def _reach_warnings(flag: Flag, path: Path, prefix: str) -> Iterator[Warned]:
    """Rules that no request comes to, and the percentage where the rules take everybody."""
    before: list[Rule] = []
    for i, rule in enumerate(flag.rules):
        there = (*path, "rules", i)
        earlier = next((each for each in before if always(each.when, prefix) or implies(rule.when, each.when)), None)
        if earlier is not None:
            who = "everybody" if always(earlier.when, prefix) else "everybody whom this one does"
            yield there, f"the rule {rule.name} is never reached: {earlier.name} before it matches {who}"
        elif covers_all([each.when for each in before], prefix):
            yield there, f"the rule {rule.name} is never reached: the rules before it match everybody"
        elif never(rule.when, prefix):
            yield (
                (*there, "when"),
                f"the rule {rule.name} can never match: its parts, or the model's path, exclude it",
            )
        before.append(rule)
    wanted = "rollout" if flag.rollout is not None else "canary"
    if flag.percent != 0 and flag.rules and covers_all([rule.when for rule in flag.rules], prefix):
        yield (*path, wanted), "nobody can fall under this percentage: the rules before it match everybody"


def _percentage_warnings(flag: Flag, path: Path) -> Iterator[Warned]:
    """Percentages that nobody can fall under."""
    for i, rule in enumerate(flag.rules):
        there = (*path, "rules", i, "canary")
        if rule.percent == 0:
            yield there, "nobody falls under 0 %; write `serve: stable`, which says so"
        elif rule.percent is not None and rule.percent * 1000 < BUCKETS and _without_unit(rule.when, flag):
            names = ", ".join(source.name for source in flag.unit)
            yield there, f"nobody can fall under this percentage: who matches sends no {names}, and gets stable"
    for i, step in enumerate(flag.rollout.steps if flag.rollout is not None else ()):
        if step.percent == 0:
            yield (*path, "rollout", "steps", i, "canary"), "nobody falls under 0 %; begin with a higher percentage"


def _without_unit(condition: Condition, flag: Flag) -> bool:
    """Whether a request that matches can carry no unit."""
    return flag.missing_unit is MissingUnit.STABLE and all(_absent(condition, source) for source in flag.unit)


def _absent(condition: Condition, source: UnitSource) -> bool:
    if source.kind is SourceKind.RANDOM:
        return False
    subject = Subject.COOKIE if source.kind is SourceKind.COOKIE else Subject.HEADER
    return implies(condition, Not(Leaf(subject, source.name, Op.EXISTS)))

"""What rules cost that do not match: 0, 1, 10 and 100 of them, of each kind, in one run."""

import timeit
from collections.abc import Callable
from decimal import Decimal

from extproc.core.conditions import All, Condition, Leaf, Not, Op, Subject
from extproc.core.decision import decide
from extproc.core.flags import Arm, Exposures, Flag, Rule
from extproc.core.request import Request
from extproc.core.ruleset import compile_ruleset

ROUNDS = 11
CALLS = 3_000
MODELS = {"digits": "/v2/models/digits/"}
REQUEST = Request(
    {
        b":path": b"/v2/models/digits/infer",
        b":method": b"POST",
        b"x-user-id": b"user-1234567",
        b"x-tenant": b"somebody-else",
        b"x-region": b"us-east-1",
        b"x-app-version": b"1.2.3",
        b"cookie": b"sid=0123456789abcdef; theme=dark",
    }
)


def header(name: str, op: Op, value: str) -> Leaf:
    """A comparison that REQUEST does not satisfy."""
    return Leaf(Subject.HEADER, name, op, (value,))


KINDS: dict[str, Callable[[int], Condition]] = {
    "header in": lambda i: header("x-tenant", Op.IN, f"acme-{i}"),
    "header prefix": lambda i: header("x-region", Op.PREFIX, f"eu-{i}-"),
    "header regex": lambda i: header("x-tenant", Op.REGEX, f"^acme-{i}-[0-9]+$"),
    "header semver": lambda i: header("x-app-version", Op.SEMVER, f">={i + 2}.0.0"),
    "cookie in": lambda i: Leaf(Subject.COOKIE, "theme", Op.IN, (f"light-{i}",)),
    "path suffix": lambda i: Leaf(Subject.PATH, "", Op.SUFFIX, (f"/explain-{i}",)),
    "absent header": lambda i: header("x-absent", Op.IN, f"acme-{i}"),
    "all of two": lambda i: All((header("x-tenant", Op.IN, f"a-{i}"), Not(header("x-region", Op.PREFIX, "eu-")))),
    "header of its own": lambda i: header(f"x-h{i}", Op.EXISTS, ""),
    "mixed": lambda i: [KINDS["header in"], KINDS["header prefix"], KINDS["header regex"], KINDS["cookie in"]][i // 25](
        i
    ),
}


def decision(kind: str, count: int) -> Callable[[], object]:
    """A decision under `count` rules of this kind."""
    rules = tuple(Rule(name=f"r{i}", when=KINDS[kind](i), serve=Arm.CANARY) for i in range(count))
    flag = Flag(key="digits", model="digits", salt="digits", percent=Decimal(5), rules=rules)
    ruleset = compile_ruleset([flag], Exposures(), MODELS, version="bench")
    if decide(ruleset, REQUEST).choice.rule:
        raise ValueError(f"a rule of {kind} matches")
    return lambda: decide(ruleset, REQUEST)


def main() -> None:
    """Prints what the rules add to a decision without any, in microseconds and as a ratio. The least of many rounds."""
    print(f"{'':<20}{'1 rule':>12}{'10 rules':>12}{'100 rules':>12}{'100 / none':>14}")
    for kind in KINDS:
        cases = {count: decision(kind, count) for count in (0, 1, 10, 100)}
        measured: dict[int, list[float]] = {count: [] for count in cases}
        for _ in range(ROUNDS):
            for count, call in cases.items():
                measured[count].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
        least = {count: min(figures) for count, figures in measured.items()}
        added = "".join(f"{least[count] - least[0]:>9.2f} us" for count in (1, 10, 100))
        print(f"{kind:<20}{added}{least[100] / least[0]:>13.1f}x")


if __name__ == "__main__":
    main()

"""Fuzzes the flag file's loader and the rule engine: `python -m bench.fuzz --inputs 1000000`.

Inputs are bytes: good and bad flag files changed in small ways, pieces of them put together, and noise. Whatever they
are, the loader gives flags or FlagFileError, and nothing else; and of flags that it gives, every request gets an
answer, the warnings and the plan are worked out, and the file that is printed reads back as the same flags.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from extproc.core.advice import Known, advise
from extproc.core.decision import decide
from extproc.core.document import FlagFileError, Problem
from extproc.core.flags import Exposures, Flag
from extproc.core.plan import plan
from extproc.core.request import Request
from extproc.core.ruleset import compile_ruleset
from extproc.core.schema import parse
from extproc.flagprint import yaml_of
from extproc.flagread import flags_in
from extproc.flagyaml import scan_document

ROOT = Path(__file__).parents[1]
MODELS = {"digits": "/v2/models/digits/", "wine": "/v2/models/wine/"}
WORDS = (
    "canary", "rollout", "rules", "segments", "when", "all", "any", "not", "segment", "header", "cookie", "path", "in",
    "not_in", "regex", "semver", "cidr", "exists", "x-forwarded-for", "true", "null", "~", ".nan", "1e999", "-0", "0x1",
    "9" * 40, "[]", "{}", "[", "]", "{", "}", ": ", "- ", ", ", "\n", "\t", "\r", "'", '"', "\\x00", "\\uD800", "&a ",
    "*a", "<<: *a", "!!binary ", "? ", "|", ">", "%YAML 1.1\n", "---\n", "...\n", "#", "\ufeff", "\u2028", "\U0001f600",
    "steps", "soak", "99999999d", "guardrails", "kpi.x", "unit", "cookie:", "random", "salt", "a:b", "a#1", "(?i)",
    "\\\\Q", "(", "{1000}", ">=1 <2", "^0", "10.0.0.0/8", "::/0", "2027-02-30", "5.0001", "100", "yes",
)  # fmt: skip
VALUES = (b"", b"acme", b"eu-west", b"10.1.2.3", b"1.2.3", b"1.0.0-" + b"9" * 5000, b"\xff\x00", b"a=b; sid=x", b",")


def seeds() -> list[bytes]:
    """What the inputs are made from: every flag file of the repository, good and bad."""
    files = [ROOT / "flags" / "flags.yaml", *sorted((ROOT / "tests" / "golden" / "bad_flags").rglob("*.yaml"))]
    return [file.read_bytes() for file in files] + [_EVERYTHING]


_EVERYTHING = b"""\
version: 1
segments:
  staff: {any: [{header: x-tenant, in: [acme, beta]}, {cookie: tenant, equals: acme}]}
  old: {not: {header: x-app-version, semver: ">=2.1.0 <3"}}
flags:
  digits: &digits
    description: "all of it"
    owner: ml
    unit: [x-user-id, "cookie:sid", random]
    missing_unit: random
    salt: digits-2026
    allow_force: true
    expires: 2027-03-01
    rules:
      - {name: staff, when: {segment: staff}, serve: canary}
      - {name: lan, when: {header: x-forwarded-for, cidr: [10.0.0.0/8, "2001:db8::/32"]}, serve: stable}
      - {name: pilot, when: {all: [{header: x-region, prefix: eu-}, {segment: old, not: true}]}, canary: 50}
      - {name: rx, when: {header: x-tenant, regex: "^(?i)acme-[0-9]+$"}, canary: 12.5}
      - {name: p, when: {any: [{path: {suffix: /infer}}, {method: {not_in: [POST]}}]}, canary: 1}
    rollout:
      steps: [{canary: 1, soak: 5m, min_requests: 300}, {canary: 25, approval: required}, {canary: 100}]
      bake: 30m
      guardrails: {errors: {rollback_if: 1.2x, require: pass}, kpi.accuracy: {direction: up, halt_if: -2%}}
  wine: {canary: 7.125}
"""


class Inputs:
    """An endless supply of bytes that are nearly flag files, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  repeatable on purpose
        self._seeds = seeds()

    def next(self) -> bytes:
        """One input."""
        rng = self._random
        kind = rng.random()
        if kind < 0.03:
            return rng.randbytes(rng.randrange(200))
        if kind < 0.08:
            return " ".join(rng.choices(WORDS, k=rng.randrange(1, 40))).encode()
        content = bytearray(rng.choice(self._seeds) if kind < 0.5 else _EVERYTHING)
        for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
            self._change(content)
        return bytes(content)

    def _change(self, content: bytearray) -> None:
        rng = self._random
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 5, 20, 60)))
        match rng.randrange(10):
            case 0:
                content[at:end] = b""
            case 1:
                content[at:at] = rng.choice(WORDS).encode()
            case 2:
                content[at:end] = rng.choice(WORDS).encode()
            case 3:
                other = rng.choice(self._seeds)
                start = rng.randrange(len(other) + 1)
                content[at:end] = other[start : start + rng.randrange(80)]
            case 4:
                content[at:at] = content[at:end]
            case 5:
                content[at:end] = rng.randbytes(rng.randrange(3))
            case _:
                places = [i for i in range(at, len(content)) if chr(content[i]).isalnum()][:1]
                for place in places:  # a letter for a letter, a digit for a digit: often a good file again
                    content[place] = rng.choice(b"0123456789" if content[place] < 58 else b"aceirsx")

    def one_in(self, number: int) -> bool:
        """True so often."""
        return self._random.randrange(number) == 0

    def request(self) -> Request:
        """Some headers, with names that rules look at and any bytes."""
        rng = self._random
        names = (
            b"x-tenant",
            b"x-region",
            b"cookie",
            b"x-forwarded-for",
            b"x-user-id",
            b"x-app-version",
            b"x-force-cohort",
        )
        headers = {b":path": rng.choice((b"/v2/models/digits/infer", b"/v2/models/wine/\xff?")), b":method": b"POST"}
        headers |= {name: self._value() for name in names if rng.random() < 0.5}
        repeated = {name: [headers[name], self._value()] for name in headers if rng.random() < 0.1}
        return Request(headers, repeated)

    def _value(self) -> bytes:
        rng = self._random
        return rng.choice(VALUES) if rng.random() < 0.7 else rng.randbytes(rng.randrange(30))


class Target:
    """What is done with each input; remembers the last good flags, to plan from them to the next."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._before: Sequence[Flag] = ()

    def try_one(self, content: bytes) -> str:
        """`good`, or `refused`. Raises whatever must not happen."""
        try:
            document = scan_document(content)
            flags = parse(document, MODELS).flags
        except FlagFileError as error:
            _fail_unless_told(error.problems)
            return "refused"
        for warning in advise(document, flags, Known(prefixes=MODELS, today="2026-11-24", served=self._before)):
            _fail_unless_told([warning])
        for each in plan(self._before, flags, Exposures()):
            if each.users.to_canary < 0 or each.users.to_stable < 0:
                raise AssertionError(f"a share below zero: {each}")
        ruleset = compile_ruleset(flags, Exposures(), MODELS, version="fuzz", force_token="fuzz")  # noqa: S106  no secret
        for _ in range(5):
            decision = decide(ruleset, self._inputs.request())
            if decision.choice is not ruleset.choices[decision.choice.index]:
                raise AssertionError(f"a choice of another ruleset: {decision}")
        # Printing is slow, so one in four: nothing that serves does it.
        if self._inputs.one_in(4) and flags_in(yaml_of(flags).encode(), MODELS).flags != flags:
            raise AssertionError("what was printed reads back as something else")
        self._before = flags
        return "good"


def _fail_unless_told(problems: Sequence[Problem]) -> None:
    """There is at least one problem, and each is one printable line at a place."""
    if not problems:
        raise AssertionError("refused without a reason")
    for problem in problems:
        if not str(problem).isprintable() or problem.place.line < 1 or problem.place.column < 1:
            raise AssertionError(f"a problem that cannot be shown: {problem!r}")


def fuzz(count: int, seed: int, seconds: float = float("inf")) -> Counter[str]:
    """Tries `count` inputs, or as many as there is time for. Raises for the first that breaks, with its bytes."""
    inputs = Inputs(seed)
    target = Target(inputs)
    results: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for _ in range(count):
        content = inputs.next()
        try:
            results[target.try_one(content)] += 1
        except Exception as error:
            raise AssertionError(f"this input breaks it ({error!r}): {content!r}") from error
        if time.monotonic() > end:
            break
    return results


def main() -> None:
    """Says how many inputs of which kind went through."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=1_000_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=float("inf"))
    chosen = options.parse_args()
    started = time.monotonic()
    results = fuzz(chosen.inputs, chosen.seed, chosen.seconds)
    took_s = time.monotonic() - started
    print(f"{results.total():,} inputs in {took_s:.0f} s, seed {chosen.seed}: {dict(results)}, nothing broke")


if __name__ == "__main__":
    main()

"""What a decision costs: the pure core, with one flag and with 10,000, and the whole answer from bytes to bytes."""

import statistics
import timeit
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest

from extproc.core.decision import decide
from extproc.core.flags import Exposures, Flag
from extproc.core.request import Request
from extproc.core.ruleset import Ruleset, compile_ruleset
from extproc.wire.answer import Answerer, Published
from extproc.wire.replies import OTHER_PHASES, replies

ROUNDS = 15
CALLS = 20_000
HEADERS = {
    ":path": b"/v2/models/m0/infer",
    "x-user-id": b"user-1234567",
}


def ruleset_of(count: int) -> Ruleset:
    """A ruleset of `count` models with a flag each."""
    names = [f"m{i}" for i in range(count)]
    flags = [Flag(key=name, model=name, salt=name, percent=Decimal(5)) for name in names]
    return compile_ruleset(flags, Exposures(), {name: f"/v2/models/{name}/" for name in names}, version="bench.0")


def message() -> bytes:
    """A request as Envoy forwards it."""
    values = [HeaderValue(key=name, raw_value=value) for name, value in HEADERS.items()]
    return bytes(ProcessingRequest(request_headers=HttpHeaders(headers=HeaderMap(headers=values))))


def microseconds(cases: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Microseconds per call of each case, one figure a round; the cases take turns, so that noise meets all of them."""
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, call in cases.items():
            measured[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return measured


def main() -> None:
    """Prints medians with their spread, and the ratio of 10,000 flags to one."""
    one, many = ruleset_of(1), ruleset_of(10_000)
    request = Request({name.encode(): value for name, value in HEADERS.items()})
    published = Published(one, replies(one.choices, one.version), OTHER_PHASES)
    looking, reading = Answerer(published), Answerer(published)
    raw = message()
    looking(raw)
    reading.published = replace(published)  # the same without what was learned
    reading.lessons = 0
    measured = microseconds(
        {
            "decide, 1 flag": lambda: decide(one, request),
            "decide, 10,000 flags": lambda: decide(many, request),
            "answer, bytes to bytes": lambda: looking(raw),
            "answer, shape not known": lambda: reading(raw),
        }
    )
    for name, figures in measured.items():
        print(f"{name:<24} {statistics.median(figures):6.2f} us  (min {min(figures):.2f}, max {max(figures):.2f})")
    ratios = [b / a for a, b in zip(measured["decide, 1 flag"], measured["decide, 10,000 flags"], strict=True)]
    print(f"10,000 flags / 1 flag: {statistics.median(ratios):.2f}x  (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()

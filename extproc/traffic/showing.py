"""The traffic for people: a progress bar meanwhile, a table in the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from extproc.statustable import plain
from extproc.traffic.tally import NO_ANSWER, Tally

BEHIND_MS = 100
MAX_NAME, MAX_LINE = 18, 500


@contextmanager
def progress_bar(total: float) -> Iterator[Callable[[float, str], None]]:
    """What to call with how much of `total` is done and a line; draws on stderr, and only where that is a terminal."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


def line_of(tally: Tally) -> str:
    """How it goes, in one line."""
    canary = tally.cohorts.get("canary")
    share = canary.requests / tally.answered if canary and tally.answered else 0.0
    return f"{tally.sent:,} sent, {share:.1%} by canary, {_number(tally.errors, 'error')}"


def print_summary(document: dict[str, Any], console: Console) -> None:
    """The cohorts side by side, and below what else is to be known. `document` is the one of `--json`."""
    if document["cohorts"] or document["errors"]:
        console.print(table_of(document), soft_wrap=True)
    for line in lines_of(document):
        console.print(Text(plain(line, MAX_LINE)), soft_wrap=True)


def table_of(document: dict[str, Any]) -> Table:
    """The cohorts side by side, and those that had no answer, so that the errors are all there."""
    table = Table(box=None, pad_edge=False)
    for column in ("cohort", "requests", "share", "errors", "p50 ms", "p95 ms", "p99 ms", "accuracy"):
        table.add_column(column, justify="left" if column == "cohort" else "right")
    for cohort, row in document["cohorts"].items():
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        share = f"{row['requests'] / document['answered']:.1%}"
        latencies = (f"{ms:.1f}" for ms in row["latency_ms"].values())
        name = Text(plain(cohort, MAX_NAME))
        table.add_row(name, f"{row['requests']:,}", share, f"{row['errors']:,}", *latencies, accuracy)
    unanswered = document["statuses"].get(NO_ANSWER, 0)
    if unanswered:
        table.add_row(NO_ANSWER, f"{unanswered:,}", "-", f"{unanswered:,}", "-", "-", "-", "-")
    return table


def lines_of(document: dict[str, Any]) -> list[str]:
    """What does not fit into the table."""
    lines = [
        f"{document['sent']:,} sent in {document['seconds']:.0f} s, {_listed(document['statuses'])}",
        f"versions: {_listed(document['versions'])}",
    ]
    if document["skipped"]:
        lines.append(f"{document['skipped']:,} were due and not sent: too many waited for a connection")
    if document["behind_ms"] > BEHIND_MS:
        behind = document["behind_ms"] / 1000
        lines.append(f"this program was up to {behind:.1f} s behind: it cannot send so many per second")
    lines += [f"{n:,} times: {problem}" for problem, n in list(document["problems"].items())[:3]]
    labels = document.get("labels")
    if labels is not None:
        told = {name: n for name, n in labels.items() if name not in {"sent", "problem"} and n}
        lines.append(f"labels: {labels['sent']:,} sent, {_listed(told)}")
        if "problem" in labels:
            lines.append(labels["problem"])
    return lines


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items()) or "none"

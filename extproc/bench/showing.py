"""A bench for people: a table, the ratios, and a progress bar meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from extproc.bench.measuring import Progress as Step
from extproc.bench.samples import FIGURES, RATE_PER_S, Sample, medians, ratios

TITLES = {
    "requests_per_s": "requests/s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "server_us": "server CPU us",
    "envoy_us": "Envoy CPU us",
}


@contextmanager
def progress_bar() -> Iterator[Step]:
    """What to call with each step; draws on stderr, and only where that is a terminal."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def step(done: int, steps: int, what: str) -> None:
            bar.update(task, completed=done, total=steps, description=what)

        yield step


def tables(samples: Sequence[Sample]) -> list[Table]:
    """The medians by path, then the ratios."""
    title = f"Medians of {max(sample.round for sample in samples)} rounds; latency at {RATE_PER_S:,} requests/s"
    figures = Table(title=title, title_justify="left", box=None, pad_edge=False)
    figures.add_column("path")
    for figure in FIGURES:
        figures.add_column(TITLES[figure], justify="right")
    for path, row in medians(samples).items():
        cells = (f"{value:,.0f}" if (value := row[figure]) is not None else "-" for figure in FIGURES)
        figures.add_row(path, *cells)
    compared = Table(title="Ratios within a round", title_justify="left", box=None, pad_edge=False)
    compared.add_column("of")
    compared.add_column("median  (min to max)")
    for name, spread in ratios(samples).items():
        compared.add_row(name, str(spread))
    return [figures, compared]

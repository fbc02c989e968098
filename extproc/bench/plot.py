"""A bench as a picture: one strip per figure, a dot per round and a bar at the median. SVG, written as text."""

import statistics
from collections.abc import Sequence
from html import escape

from extproc.bench.samples import FIGURES, RATE_PER_S, Sample, paths_of, values

WIDTH, LEFT, RIGHT = 720, 110, 90
ROW, HEAD, GAP = 22, 34, 14
TITLES = {
    "requests_per_s": "requests/s (more is better)",
    "p50_us": f"p50 at {RATE_PER_S:,} requests/s, us",
    "p99_us": f"p99 at {RATE_PER_S:,} requests/s, us",
    "server_us": "CPU of the ext_proc server per request, us",
    "envoy_us": "CPU of Envoy per request, us",
}
COLOURS = ("#444444", "#1b7837", "#762a83", "#2166ac", "#b35806", "#8c510a")


def svg(samples: Sequence[Sample]) -> str:
    """The whole picture. Every axis begins at zero; figures that nobody measured are left out."""
    paths = paths_of(samples)
    shown = [figure for figure in FIGURES if any(values(samples, path, figure) for path in paths)]
    height = sum(HEAD + ROW * _rows(samples, figure) + GAP for figure in shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    top = 0
    for figure in shown:
        parts += _strip(samples, figure, top)
        top += HEAD + ROW * _rows(samples, figure) + GAP
    return "\n".join([*parts, "</svg>", ""])


def _rows(samples: Sequence[Sample], figure: str) -> int:
    return sum(1 for path in paths_of(samples) if values(samples, path, figure))


def _strip(samples: Sequence[Sample], figure: str, top: int) -> list[str]:
    """One figure: a row for each path that has it."""
    paths = paths_of(samples)
    largest = max(value for path in paths for value in values(samples, path, figure)) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / largest
    parts = [f'<text font-size="12" x="8" y="{top + 20}" font-weight="bold">{escape(TITLES[figure])}</text>']
    y = top + HEAD
    for path in paths:
        found = values(samples, path, figure)
        if not found:
            continue
        colour = COLOURS[paths.index(path) % len(COLOURS)]
        middle, centre = statistics.median(found), y + ROW / 2
        end = LEFT + middle * scale
        parts += [
            f'<text font-size="12" x="8" y="{centre + 4:.1f}">{escape(path)}</text>',
            f'<rect x="{LEFT}" y="{y + 4}" width="{end - LEFT:.1f}" height="{ROW - 8}" fill="{colour}" opacity=".25"/>',
            f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{y + 2}" y2="{y + ROW - 2}" stroke="{colour}" stroke-width="2"/>',
            f'<text font-size="12" x="{WIDTH - 8}" y="{centre + 4:.1f}" text-anchor="end">{middle:,.0f}</text>',
        ]
        parts += [f'<circle cx="{LEFT + v * scale:.1f}" cy="{centre:.1f}" r="3" fill="{colour}"/>' for v in found]
        y += ROW
    return parts

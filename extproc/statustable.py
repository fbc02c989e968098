"""What `perch status` shows people: `GET /v1/status` as what needs a look, then a table per flag, a row per cohort.

A control that is older or younger than this program may leave keys out: what is not there is shown as a dash, or not at
all. Every text in it is somebody else's, so none is taken for markup, and none can move the cursor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

WIDE = 132
"""Columns of the terminal from which on predictions and model versions stand in the cohort's own row."""
UNKNOWN = "-"
MAX_TEXT = 200
_LABEL = 18
_RANGE = 28
"""Characters of a range of numbers; without its upper end it says nothing."""
_TOP = 4
_LISTED = 20
_ARMS = ("stable", "canary")
_MEASURES = {"js": "JS", "wasserstein_sd": "Wasserstein/sd", "psi": "PSI", "ks": "KS"}
_COLUMNS = {
    "cohort": 6, "requests": 8, "share": 7, "fell back": 9, "over": 5, "req/s": 6, "errors": 7,
    "p50": 7, "p95": 7, "p99": 7,
}  # fmt: skip
"""Widths that make 80 columns, so that the numbers of all flags stand below each other."""
_OFTEN = 0.01
"""Share of errors or fall-backs from which on it stands out."""


Line = list[Segment]


class StatusView:
    """The whole status, as wide as the terminal is. `note` is a line above it.

    With `fit` it takes no more lines than a terminal has, and says what it leaves out. No line ends with blanks.
    """

    def __init__(self, status: Mapping[str, Any], note: str = "", *, fit: bool = False) -> None:
        self.status = status
        self.note = note
        self.fit = fit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines from top to bottom: what needs a look first, for the end may be out of sight."""

        def lines_of(*parts: RenderableType) -> list[Line]:
            return [_trimmed(line) for part in parts for line in console.render_lines(part, options, pad=False)]

        room = options.max_height - 1 if self.fit else None  # the cursor stands below the last line
        note = [Text(plain(self.note), style="bold red")] if self.note else []
        lines = lines_of(*note, _headline(self.status))
        alerts = [lines_of(_alert(alert)) for alert in alerts_of(self.status)]
        lines += _shortened(alerts, None if room is None else (room - len(lines)) // 2, lambda n: lines_of(_more(n)))
        flags = _part(self.status, "flags")
        if not flags:
            lines += lines_of(Text("no flags", style="dim"))
        wide = options.max_width >= WIDE
        forms = [[lines_of(*form) for form in _forms(str(key), _part(flags, key), wide=wide)] for key in flags]
        chosen, shortened = _chosen(forms, None if room is None else room - len(lines))
        lines += chosen
        if shortened:
            lines += lines_of(Text(f"{shortened}; `perch status` shows all", style="yellow"))
        for line in lines:
            yield from line
            yield Segment.line()


def _chosen(forms: list[list[list[Line]]], room: int | None) -> tuple[list[Line], str]:
    """The flags, each in the longest of its forms that there is room for, those above first; what was cut, if anything.

    Every flag gets its line before any gets its table, and every one its table before any gets all of it.
    """
    longest = [len(form) - 1 for form in forms]
    if room is None or sum(len(form[-1]) for form in forms) <= room:
        return [line for form in forms for line in form[-1]], ""
    free = room - 1  # a line says what was cut
    shown = forms[: max(0, free)]
    free -= len(shown)
    chosen = [0] * len(shown)
    for level in range(1, max(longest) + 1):
        for i, form in enumerate(shown):
            more = len(form[min(level, longest[i])]) - len(form[chosen[i]])
            if more <= free:
                chosen[i], free = min(level, longest[i]), free - more
    short = sum(level < longest[i] for i, level in enumerate(chosen)) + len(forms) - len(shown)
    cut = (
        f"{short} of {_number(len(forms), 'flag')} in short"
        if len(shown) == len(forms)
        else (f"{len(forms) - len(shown)} more of {_number(len(forms), 'flag')}")
    )
    return [line for form, level in zip(shown, chosen, strict=True) for line in form[level]], f"{cut}: too few lines"


def _shortened(parts: list[list[Line]], room: int | None, more: Callable[[int], list[Line]]) -> list[Line]:
    """The parts that there is room for, and how many more there are."""
    if room is None or sum(map(len, parts)) <= room:
        return [line for part in parts for line in part]
    lines: list[Line] = []
    for i, part in enumerate(parts):
        if len(lines) + len(part) >= room:
            return lines + more(len(parts) - i)
        lines += part
    return lines


def _trimmed(line: Sequence[Segment]) -> Line:
    """The line without the blanks at its end."""
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style, kept[-1].control)
    return kept


def _alert(text: str) -> Padding:
    return _line("!", Text(plain(text, 2 * MAX_TEXT), style="yellow"), width=1)


def _more(n: int) -> Padding:
    return _alert(f"{_number(n, 'more alert')}: too few lines; `perch status` shows all")


def plain(text: object, most: int = MAX_TEXT) -> str:
    """Text as it may be printed: no control characters, at most so long."""
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def alerts_of(status: Mapping[str, Any]) -> list[str]:
    """What somebody should look into, a line each."""
    problems = _part(status, "flag_file").get("problems") or ()
    alerts = [f"the last good flag file is served: {problem}" for problem in problems]
    alerts += status.get("alerts") or ()
    flags = _part(status, "flags")
    for key in flags:
        heavy = _part(_part(flags, key), "heavy_unit")
        share = heavy.get("share")
        if share:
            unit = f" ({heavy['unit']})" if heavy.get("unit") else ""
            alerts.append(f"{key}: one unit{unit} makes up {share:.0%} of the traffic; is it a person?")
    return alerts


def _part(of: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A part of the status; empty if it is not there."""
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _numbers(of: Mapping[str, Any], key: str) -> dict[str, float]:
    """A part of the status that maps texts to numbers."""
    return {name: n for name, n in _part(of, key).items() if isinstance(n, int | float)}


def _headline(status: Mapping[str, Any]) -> Text:
    """Whether it is ready, and what Envoy and its log say."""
    ready = status.get("ready")
    line = Text("ready", style="bold green")
    if not ready:
        line = Text(f"not ready: {plain(status.get('not_ready') or 'nobody says why')}", style="bold red")
    envoy, log = status.get("envoy"), _part(status, "access_log")
    if envoy is None and status.get("not_ready") != "Envoy does not answer":
        line.append("  Envoy does not answer", style="red")
    elif envoy is not None:
        n = envoy.get("failure_mode_allowed", 0)
        line.append(f"  {counted(n)} failed open", style="yellow" if n else "dim")
    if log:
        envoys = len(_part(log, "envoys"))
        line.append(f"  {counted(log.get('entries'))} log entries of {_number(envoys, 'Envoy')}", style="dim")
        if log.get("unreadable"):
            line.append(f", {counted(log['unreadable'])} unreadable", style="yellow")
    return line


def _forms(key: str, flag: dict[str, Any], *, wide: bool) -> Iterator[list[Text | Table | Padding]]:
    """The lines of one flag, from the shortest form to the whole: its head, its cohorts too, all of it."""
    head = _flag_line(key, flag)
    head.no_wrap, head.overflow = True, "ellipsis"
    yield [head]
    cohorts = _part(flag, "cohorts")
    if cohorts:
        yield [Text(), head, _cohorts(cohorts, wide=wide)]
    yield [Text(), *_flag(key, flag, wide=wide)]


def _flag(key: str, flag: dict[str, Any], *, wide: bool) -> Iterator[Text | Table | Padding]:
    """The lines of one flag."""
    yield _flag_line(key, flag)
    about = [
        f"model {plain(flag.get('model', UNKNOWN))}",
        _servers(flag),
        f"version {plain(flag.get('version', UNKNOWN))}",
    ]
    yield Text("  " + "  ".join(part for part in about if part), style="dim")
    cohorts = _part(flag, "cohorts")
    if cohorts:
        yield _cohorts(cohorts, wide=wide)
        if not wide:
            yield from _arms("predicts", cohorts, predictions_of)
            yield from _arms("version", cohorts, versions_of)
    else:
        yield Text("  no request yet", style="dim")
    drift = drift_of(_part(flag, "drift"))
    if drift:
        yield _line("drift", Text(drift))
    kpis = _part(flag, "kpis")
    for name in kpis:
        arms = _part(kpis, name)
        values = "   ".join(f"{plain(arm, 6)} {_kpi(_part(arms, arm))}" for arm in _in_order(arms))
        yield _line(plain(name, _LABEL), Text(values))
    if _part(flag, "reconciliation"):
        yield _line("log", _compared(_part(flag, "reconciliation")))


def _flag_line(key: str, flag: dict[str, Any]) -> Text:
    percent, wanted = flag.get("effective_percent"), flag.get("wanted_percent")
    line = Text(plain(key), style="bold")
    line.append(f"  canary {_percentage(percent)}", style="not bold cyan")
    if wanted is not None and wanted != percent:
        line.append(f" of {_percentage(wanted)}", style="not bold")
    state, style = "serving", "green"
    if not flag.get("enabled", True):
        state, style = "off", "red"
    elif flag.get("held"):
        state, style = "held: canary not warm", "yellow"
    line.append(f"  {state}", style=f"not bold {style}")
    if flag.get("phase"):
        line.append(f"  {plain(flag['phase'])}", style="not bold")
    return line


def _servers(flag: dict[str, Any]) -> str:
    ready = _part(flag, "ready")
    known = [f"{ready[arm]} {arm}" for arm in _ARMS if ready.get(arm) is not None]
    return f"{', '.join(known)} ready" if known else ""


def _cohorts(cohorts: dict[str, Any], *, wide: bool) -> Padding:
    """A row per cohort. What is right of `over` is of the last minute, or of all that was where that is empty."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name, width in _COLUMNS.items():
        table.add_column(name, width=width, no_wrap=True, justify="left" if name in {"cohort", "over"} else "right")
    if wide:
        table.add_column(" version", no_wrap=True, max_width=_LABEL)
        table.add_column("predicts")  # the only one that may be cut: numbers are whole or they are wrong
    for arm in _in_order(cohorts):
        row = _part(cohorts, arm)
        cells = list(_cells(plain(arm, 6), row))
        if wide:
            cells += [
                Text(f" {versions_of(row, 1)}"),
                Text(predictions_of(row), no_wrap=True, overflow="ellipsis"),
            ]
        table.add_row(*cells)
    return Padding(table, (0, 0, 0, 2), expand=False)


def _cells(arm: str, row: dict[str, Any]) -> Iterator[Text]:
    minute = _part(row, "last_minute")
    recent = minute.get("error_rate") is not None
    requests = row.get("requests")
    errors = minute.get("error_rate") if recent else _share(row.get("errors"), requests)
    fell_back = _share(row.get("fell_back"), requests)
    style = "cyan" if arm == "canary" else ""
    yield Text(arm, style=style)
    yield Text(counted(requests))
    yield Text(_ratio(row.get("share"), 1))
    yield Text(counted(row.get("fell_back")), style="yellow" if fell_back and fell_back >= _OFTEN else "")
    yield Text("1 min" if recent else "total", style="dim")
    yield Text(_rate(minute.get("requests_per_s")))
    yield Text(_ratio(errors, 2), style="red" if errors and errors >= _OFTEN else "")
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        yield Text(duration((minute if recent else row).get(name)))


def _in_order(arms: Iterable[str]) -> list[str]:
    """Stable, canary, and whatever else there may be one day."""
    return sorted(arms, key=lambda arm: (_ARMS.index(arm) if arm in _ARMS else len(_ARMS), arm))


def _arms(name: str, cohorts: dict[str, Any], shown: Callable[[dict[str, Any]], str]) -> Iterator[Padding]:
    """A line per arm that has something to show."""
    for arm in _in_order(cohorts):
        text = shown(_part(cohorts, arm))
        if text:
            yield _line(name, Text(f"{plain(arm, 6):<6} {text}"))
            name = ""


def _line(name: str, text: Text, width: int = 8) -> Padding:
    """A line below the cohorts; what does not fit goes on below its text."""
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(width=max(width, len(name)), no_wrap=True, style="dim")
    line.add_column(overflow="fold")
    line.add_row(Text(name), text)
    return Padding(line, (0, 0, 0, 2), expand=False)


def predictions_of(row: dict[str, Any]) -> str:
    """What a cohort predicts most, with the shares of it, or why that is not told; empty for nothing."""
    predictions = _numbers(row, "predictions")
    # Where as many are listed as ever are, there may be more: then the shares are those of all requests.
    total = sum(predictions.values()) if len(predictions) < _LISTED else row.get("requests")
    if not total:
        if row.get("learning") is True:
            return "(learning ranges)"
        return "(vectors)" if row.get("prediction_kind") == "vector" else ""
    most = sorted(predictions.items(), key=lambda item: (-item[1], item[0]))
    width = _RANGE if row.get("prediction_kind") == "numbers" else _LABEL
    shown = ", ".join(f"{plain(label, width) or '(empty)'} {100 * n / total:.0f} %" for label, n in most[:_TOP])
    return f"{shown}, …" if len(most) > _TOP else shown


def versions_of(row: dict[str, Any], most: int = 3) -> str:
    """The model versions that answered a cohort most; empty for none."""
    versions = _numbers(row, "model_versions")
    ordered = [plain(name, _LABEL) for name, _ in sorted(versions.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(ordered[:most]) + (", …" if len(ordered) > most else "")


def drift_of(drift: dict[str, Any]) -> str:
    """The measures that are defined, and of how many predictions; empty for none."""
    known = [f"{name} {drift[key]:.3f}" for key, name in _MEASURES.items() if drift.get(key) is not None]
    if not known:
        return ""
    sizes = [
        f"{counted(drift[key])} of {arm}" for key, arm in (("n", "canary"), ("n_stable", "stable")) if drift.get(key)
    ]
    return "   ".join(known) + (f"   ({', '.join(sizes)})" if sizes else "")


def _kpi(values: dict[str, Any]) -> str:
    mean = values.get("mean")
    return UNKNOWN if mean is None else f"{mean:.4g} ({counted(values.get('n'))})"


def _compared(found: dict[str, Any]) -> Text:
    """What was decided against what the log says."""
    line = Text(f"{counted(found.get('decided'))} decided")
    for key, name in {"lost": "lost", "surplus": "surplus", "mismatched": "served by another arm"}.items():
        if key in found:
            line.append(", ").append(f"{counted(found[key])} {name}", style="yellow" if found[key] else "")
    return line


def _share(n: Any, of: Any) -> float | None:
    return n / of if n is not None and of else None


def counted(n: float | None) -> str:
    """A whole number in at most six characters: 9,999, 12.3k, 4.56M."""
    if n is None:
        return UNKNOWN
    if n < 10_000:
        return f"{n:,.0f}"
    for unit in ("k", "M", "G", "T"):
        n /= 1_000
        if n < 999.5:
            return f"{n:.3g}{unit}"
    return f"{n:.0f}T"


def duration(ms: float | None) -> str:
    """A duration of milliseconds in at most seven characters."""
    if ms is None:
        return UNKNOWN
    for value, unit in ((ms, "ms"), (ms / 1_000, "s"), (ms / 60_000, "min")):
        if value < (999.5 if unit == "ms" else 99.5):
            return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
    return f"{ms / 3_600_000:.3g} h"


def _rate(per_s: float | None) -> str:
    if per_s is None:
        return UNKNOWN
    return counted(per_s) if per_s >= 100 else f"{per_s:.3g}"


def _ratio(share: float | None, places: int) -> str:
    return UNKNOWN if share is None else f"{100 * share:.{places}f} %"


def _percentage(percent: Any) -> str:
    return f"{percent:g} %" if isinstance(percent, int | float) else UNKNOWN


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"

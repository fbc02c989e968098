"""The table of metrics against the page that shows it; tests/e2e/test_metric_names.py compares it with what is sent."""

import re
from collections import Counter
from pathlib import Path

from extproc.core.predictions import OTHER
from extproc.metricnames import METRICS, REQUEST_METRICS, Kind, Metric, markdown_table

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def test_the_page_shows_the_table_as_it_is():
    assert markdown_table() in PAGE, (
        "docs/metrics.md: replace the table by what extproc.metricnames.markdown_table() gives"
    )


def test_a_row_shows_name_kind_tags_and_what_only_some_lines_have():
    row = markdown_table([Metric("a.b", Kind.TIMER, ("x", "y"), "what", "perch_a_b_seconds", ("z",))]).splitlines()[-1]
    assert row == "| `perch.a.b` | timer | x, y, (z) | `perch_a_b_seconds` | what |"


def test_every_name_is_there_once_and_is_a_name():
    for names in ([metric.name for metric in METRICS], [one.prometheus for one in METRICS if one.prometheus]):
        assert Counter(names).most_common(1)[0][1] == 1
        assert all(re.fullmatch(r"[a-z0-9_.]+", name) for name in names)


def test_names_for_prometheus_say_their_unit_and_their_kind_as_is_usual_there():
    assert all(metric.prometheus for metric in REQUEST_METRICS)
    for metric in REQUEST_METRICS:
        assert metric.prometheus.endswith("_total") == (metric.kind is Kind.COUNTER), metric
        assert metric.prometheus.endswith("_seconds") == metric.name.endswith("_ms"), metric


def test_every_tag_is_explained_on_the_page_or_by_its_metric():
    tags = {tag for metric in METRICS for tag in (*metric.tags, *metric.sometimes)}
    known = {"model", "version", "status", "result", "measure", "why", "what", "rule"}
    assert {tag for tag in tags - known if f"`{tag}`" not in PAGE.partition("## What the tags say")[2]} == set()


def test_the_bounds_on_the_page_are_those_of_the_code():
    from extproc import metrics, requestmetrics
    from extproc.core import kpis, windows

    bounds = PAGE.partition("## Bounds")[2].partition("## Prometheus")[0]
    numbers = {int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", bounds)}
    assert numbers == {
        windows.MAX_VERSIONS,
        windows.MAX_SERIES,
        requestmetrics.MAX_PREDICTIONS,
        requestmetrics.MAX_LABELLED,
        kpis.MAX_NAMES,
        requestmetrics.MAX_KPIS,
        requestmetrics.MAX_HISTOGRAMS,
        requestmetrics.TIMED,
        requestmetrics.LINES,
    }
    assert f"`{OTHER}`" in bounds
    assert f"first {requestmetrics.MAX_VALUE} characters" in PAGE
    assert requestmetrics.TIMINGS == metrics._SAMPLES == 64

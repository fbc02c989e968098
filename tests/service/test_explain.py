"""`perch explain`: the same decision as serve's, in a sentence and as JSON."""

import json

import pytest
from typer.testing import CliRunner

from extproc.cli import app
from extproc.core.bucketing import bucket_of, hash_prefix, hash_unit

KEYS = {"flag", "cohort", "reason", "rule", "bucket", "threshold", "version"}


@pytest.fixture
def explain(folder, service, monkeypatch):
    """Runs `perch explain` on the folder's files: (exit code, output)."""
    for name, value in service.environment(folder).items():
        monkeypatch.setenv(name, value)

    def run(*options, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(f"PERCH_{name.upper()}", value)
        ended = CliRunner().invoke(app, ["explain", "--flag", "digits", *options])
        assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.output
        return ended.exit_code, ended.output

    return run


def as_json(ended):
    code, output = ended
    assert code == 0, output
    return json.loads(output)


def exposures(folder, **entry):
    folder.put_exposures(json.dumps({"seq": 5, "flags": {"digits": {"salt": "digits", **entry}}}))


def test_the_json_has_the_keys_that_programs_rely_on(folder, service, explain):
    digest = folder.put(service.flags_yaml("33.333"))
    got = as_json(explain("--unit", "alice", "--json"))
    bucket = bucket_of(hash_unit(hash_prefix("digits"), b"alice"))
    assert set(got) >= KEYS
    assert {key: got[key] for key in KEYS} == {
        "flag": "digits", "cohort": "canary" if bucket < 33_333 else "stable", "reason": "SPLIT", "rule": None,
        "bucket": bucket, "threshold": 33_333, "version": f"{digest}.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "options", "sentence"),
    [
        ((100, ""), ["--unit", "a"], "canary: bucket {bucket} is below 100000 (100 %, salt digits)"),
        ((0, ""), ["--unit", "a"], "stable: bucket {bucket} is not below 0 (0 %, salt digits)"),
        ((5, ""), [], "stable: the request carries none of x-user-id, x-session-id; canary serves 5 %"),
        ((100, ""), [], "canary: the request carries none of x-user-id, x-session-id; canary serves 100 %"),
        ((5, "unit: ['cookie:sid', random]"), [], "stable: the request carries none of cookie:sid, random"),
        ((5, ""), ["--unit", "a", "--header", "x-user-id=b"], "stable: the unit came twice"),
        ((5, "enabled: false"), ["--unit", "a"], "stable: the flag is switched off (enabled: false)"),
    ],
)  # fmt: skip
def test_the_sentence_says_why(folder, service, explain, flag, options, sentence):
    canary, more = flag
    digest = folder.put(service.flags_yaml(canary, more=more))
    code, output = explain(*options)
    assert code == 0
    bucket = bucket_of(hash_unit(hash_prefix("digits"), b"a"))
    assert output.startswith(sentence.format(bucket=bucket))
    assert output.endswith(f", version {digest}.0\n")


def test_what_the_controller_decided_counts(folder, service, explain):
    folder.put(service.flags_yaml(100))
    exposures(folder, cap=0)
    got = as_json(explain("--unit", "a", "--json"))
    assert (got["cohort"], got["reason"], got["bucket"]) == ("stable", "HELD", None)
    assert got["version"].endswith(".5")
    assert "the canary is not warm" in explain("--unit", "a")[1]
    exposures(folder, cap=100, attempt=2)
    assert as_json(explain("--unit", "a", "--json"))["salt"] == "digits#2"
    folder.put_exposures("{ torn")
    assert as_json(explain("--unit", "a", "--json"))["reason"] == "HELD"


def test_a_tester_is_explained_with_the_token_of_the_environment(folder, service, explain):
    folder.put(service.flags_yaml(0, more="allow_force: true"))
    forced = ["--unit", "a", "--header", f"X-Force-Cohort=canary;{service.TOKEN}", "--json"]
    assert as_json(explain(*forced))["reason"] == "SPLIT"
    got = as_json(explain(*forced, force_token=service.TOKEN))
    assert (got["cohort"], got["reason"]) == ("canary", "FORCED")


def test_bytes_that_are_no_text_are_hashed_as_the_shell_gave_them(folder, service, explain):
    folder.put(service.flags_yaml(50))
    got = as_json(explain("--unit", b"\xff\xfe".decode(errors="surrogateescape"), "--json"))
    assert got["bucket"] == bucket_of(hash_unit(hash_prefix("digits"), b"\xff\xfe"))


def test_a_unit_goes_where_the_flags_first_source_is(folder, service, explain):
    for source in ("cookie:sid", "x-account", "random"):
        folder.put(service.flags_yaml(50, more=f"unit: ['{source}']"))
        got = as_json(explain("--unit", "a", "--json"))
        assert got["bucket"] == bucket_of(hash_unit(hash_prefix("digits"), b"a"))


@pytest.mark.parametrize("header", ["nonsense", "=value", ""])
def test_a_header_without_a_name_or_value_is_one_line_and_exit_two(folder, service, explain, header):
    folder.put(service.flags_yaml())
    code, output = explain("--header", header)
    assert code == 2
    assert output.splitlines() == [f"perch: write --header NAME=VALUE, not {header!r}"]


def test_an_unknown_flag_names_those_there_are(folder, service, explain):
    folder.put(service.flags_yaml())
    code, output = explain("--flag", "nope")
    assert code == 2
    assert output.splitlines() == ["perch: there is no flag nope; the file has digits"]


def test_a_bad_file_is_told_with_its_lines(folder, explain):
    folder.flags.write_text("version: 1\nflags:\n  digits: {canary: 101}\n")
    code, output = explain("--unit", "a")
    assert code == 1
    assert f"{folder.flags}:3:20: flags.digits.canary: " in output


@pytest.mark.parametrize(("path", "leads"), [("/v2/models/wine/infer", "the flag wine"), ("/elsewhere", "no flag")])
def test_a_path_of_another_flag_is_not_explained_as_this_ones(folder, explain, path, leads):
    folder.put("version: 1\nflags:\n  digits: {canary: 0}\n  wine: {canary: 100}\n")
    code, output = explain("--unit", "a", "--header", f":path={path}", "--json")
    assert code == 2
    assert output.startswith(f"perch: the :path given leads to {leads}; ")


def test_serve_decides_what_explain_says(shared_perch, service, monkeypatch):
    folder = shared_perch.folder
    shared_perch.put(service.flags_yaml(40, more="unit: [x-user-id, 'cookie:sid']\nmissing_unit: random"))
    for name, value in service.environment(folder, force_token=service.TOKEN).items():
        monkeypatch.setenv(name, value)
    for i in range(40):
        pairs = [("x-user-id", f"user-{i}"), ("cookie", f"sid={i}"), ("x-request-id", f"r{i}")][i % 3 :]
        reply = shared_perch.ask(None, *((name.encode(), value.encode()) for name, value in pairs))
        options = [part for name, value in pairs for part in ("--header", f"{name}={value}")]
        ended = CliRunner().invoke(app, ["explain", "--flag", "digits", "--json", *options])
        said = json.loads(ended.output)
        assert (said["cohort"], said["reason"], said["version"], said["hash"]) == (
            reply.cohort, reply.metadata["reason"], reply.metadata["version"], reply.metadata["hash"],
        )  # fmt: skip

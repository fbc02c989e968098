"""`perch explain` about the past and about another percentage: against what was decided then, and would be."""

import json
from decimal import Decimal

import pytest
from typer.testing import CliRunner

from extproc.cli import app
from extproc.core.flags import Exposure, Exposures
from extproc.core.ruleset import ruleset_version
from extproc.flagfile import Paths, Published, keep_state

MODELS = "digits: {prefix: /v2/models/digits/, stable: ['h:1']}\n"
USERS = [f"user-{i}" for i in range(40)]


def flags(canary, salt="digits"):
    return f"version: 1\nflags:\n  digits: {{canary: {canary}, salt: {salt}}}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "envoy").mkdir()
    (tmp_path / "envoy" / "models.yaml").write_text(MODELS)
    (tmp_path / "flags").mkdir()
    (tmp_path / "flags" / "flags.yaml").write_text(flags(5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ask(folder):
    """`perch explain --flag digits` with these options; exit code, stdout, stderr."""

    def run(*arguments):
        result = CliRunner().invoke(app, ["explain", "--flag", "digits", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def as_json(answer):
    code, out, err = answer
    assert (code, err) == (0, "")
    return json.loads(out)


def serve_once(folder, text, exposures):
    """Keeps the state as serve does when it has published this."""
    version = ruleset_version(text.encode(), exposures.seq)
    keep_state(
        Paths(folder / "flags" / "flags.yaml", folder / "state"), Published(version, text.encode(), exposures, 1)
    )
    return version


def test_an_old_version_is_replayed_with_the_flags_and_exposures_of_then(ask, folder):
    """What was recorded then is what is explained now, whatever the files say today."""
    rollout = "version: 1\nflags:\n  digits: {rollout: {steps: [{canary: 50}, {canary: 100}]}}\n"
    exposures = Exposures(7, {"digits": Exposure(salt="digits", attempt=1, percent=Decimal(50))})
    (folder / "flags" / "flags.yaml").write_text(rollout)
    (folder / "state").mkdir()
    (folder / "state" / "exposure.json").write_text(
        json.dumps({"seq": 7, "flags": {"digits": {"salt": "digits", "attempt": 1, "percent": 50}}})
    )
    then = [as_json(ask("--unit", user, "--json")) for user in USERS]
    version = serve_once(folder, rollout, exposures)
    assert {answer["version"] for answer in then} == {version}
    (folder / "state" / "exposure.json").unlink()
    (folder / "flags" / "flags.yaml").write_text(flags(0, "other"))
    now = [as_json(ask("--unit", user, "--version", version, "--json")) for user in USERS]
    assert now == then
    assert {answer["cohort"] for answer in now} == {"stable", "canary"}
    assert {answer["cohort"] for answer in (as_json(ask("--unit", user, "--json")) for user in USERS)} == {"stable"}


def test_a_version_of_a_model_that_is_gone_is_replayed_all_the_same(ask, folder):
    version = serve_once(folder, flags(100), Exposures())
    (folder / "envoy" / "models.yaml").write_text(MODELS.replace("digits", "numbers"))
    assert as_json(ask("--unit", "u", "--version", version, "--json"))["cohort"] == "canary"


@pytest.mark.parametrize("version", ["", "7", "../../etc/passwd", "0123456789ab", "0123456789ab.x", "0123456789AB.7"])
def test_what_is_no_version_is_refused_and_opens_no_file(ask, version):
    code, out, err = ask("--unit", "u", "--version", version)
    assert (code, out) == (2, "")
    assert err.startswith(f"perch: {version!r} is no version; it looks like 0123456789ab.7")


def test_a_version_that_was_not_kept_says_which_were(ask, folder):
    code, _, err = ask("--unit", "u", "--version", "0123456789ab.7")
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith("it has none\n")
    version = serve_once(folder, flags(100), Exposures())
    assert f"it has 1, for example {version}" in ask("--unit", "u", "--version", "0123456789ab.7")[2]


def test_at_another_percentage_the_same_buckets_are_compared_with_another_threshold(ask):
    for user in USERS:
        now = as_json(ask("--unit", user, "--json"))
        for percent in (0, 25, 62.5, 100):
            then = as_json(ask("--unit", user, "--at", percent, "--json"))
            assert then["bucket"] == now["bucket"]
            assert then["threshold"] == percent * 1000
            assert then["cohort"] == ("canary" if now["bucket"] < percent * 1000 else "stable")
    assert ask("--unit", "u", "--at", "25 %")[1].startswith("at 25 %: ")


def test_at_another_percentage_the_warm_gate_is_open(ask, folder):
    (folder / "state").mkdir()
    exposure = {"seq": 1, "flags": {"digits": {"salt": "digits", "cap": 0, "attempt": 3}}}
    (folder / "state" / "exposure.json").write_text(json.dumps(exposure))
    assert as_json(ask("--unit", "u", "--json"))["reason"] == "HELD"
    answer = as_json(ask("--unit", "u", "--at", "100", "--json"))
    assert (answer["cohort"], answer["salt"]) == ("canary", "digits#3")


@pytest.mark.parametrize("at", ["-1", "101", "much", "nan", "5.0001", "1e999"])
def test_what_is_no_percentage_is_refused(ask, at):
    code, out, err = ask("--unit", "u", f"--at={at}")
    assert (code, out) == (2, "")
    assert err == f"perch: --at: a percentage is a number from 0 to 100 with up to three decimals, not {at}\n"

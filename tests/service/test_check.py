"""`perch check`: every mistake has its message, and what it passes is what serve takes."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extproc.checking import Around, as_text, check_file
from extproc.cli import app
from extproc.core.flags import Exposures
from extproc.flagcompiler import Refused, Task, _Reader
from extproc.flagyaml import MAX_BYTES

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "bad_flags"
BAD = sorted(GOLDEN.glob("*.yaml"))
ODD = sorted((GOLDEN / "warnings").glob("*.yaml"))
MODELS = {"digits": "/v2/models/digits/", "wine": "/v2/models/wine/"}
MODELS_YAML = "\n".join(f"{name}: {{prefix: {prefix}, stable: ['h:1']}}" for name, prefix in MODELS.items())
TODAY = "2026-11-24"
GOOD = "version: 1\nflags:\n  digits: {canary: 5}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with models.yaml, where no other flag file is."""
    (tmp_path / "envoy").mkdir()
    (tmp_path / "envoy" / "models.yaml").write_text(MODELS_YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def perch(folder):
    """Runs a command; its exit code, and its output in lines."""

    def run(*arguments):
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()

    return run


def announced(path):
    """The leading comment lines: the whole expected report, without the file's name."""
    lines = path.read_bytes().decode(errors="replace").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("# "))
    return [f"{path}:{line[2:]}" for line in lines[:count]]


def around(state, **more):
    return Around(models=MODELS, state=state, today=TODAY, **more)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_mistake_gets_exactly_the_message_its_file_announces(path, tmp_path):
    checked = check_file(path, around(tmp_path))
    wrong, summary = as_text(checked)
    assert wrong == announced(path)
    assert summary == []
    assert all("\n" not in line and line.isprintable() for line in wrong)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_mistake_is_refused_by_the_process_that_serves(path):
    task = Task(content=path.read_bytes(), exposures=Exposures(), models=MODELS, with_replies=False)
    (answer,) = _Reader().answer(task)
    assert isinstance(answer, Refused)
    assert answer.problems


@pytest.mark.parametrize("path", ODD, ids=lambda path: path.stem)
def test_each_oddity_gets_its_warning_and_is_served_all_the_same(path, tmp_path):
    served = path.parent / "served" / path.name
    if served.exists():
        (tmp_path / "flags.last-good.yaml").write_bytes(served.read_bytes())
    checked = check_file(path, around(tmp_path))
    wrong, summary = as_text(checked)
    assert wrong == announced(path)
    assert len(summary) == 1
    assert checked.good(strict=False)
    assert not checked.good(strict=True)
    task = Task(content=path.read_bytes(), exposures=Exposures(), models=MODELS, with_replies=False)
    assert not any(isinstance(answer, Refused) for answer in _Reader().answer(task))


def test_every_served_file_belongs_to_a_warning():
    assert {path.name for path in (GOLDEN / "warnings" / "served").iterdir()} <= {path.name for path in ODD}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; a flag file begins with `version: 1` and `flags:`"),
        (b" \n\n", "the file is empty; a flag file begins with `version: 1` and `flags:`"),
        (b"#" * (MAX_BYTES + 1), f"the file is larger than {MAX_BYTES:,} bytes, and no more is read; split it"),
        (b"#" * 50_000_000, f"the file is larger than {MAX_BYTES:,} bytes, and no more is read; split it"),
    ],
    ids=["empty", "white", "just too large", "50 MB"],
)
def test_files_that_cannot_announce_their_message(content, message, tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_bytes(content)
    wrong, _ = as_text(check_file(path, around(tmp_path)))
    assert wrong == [f"{path}:1:1: {message}"]


def test_a_file_of_only_mistakes_tells_so_many_and_counts_the_rest(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("version: 1\nflags:\n" + "".join(f"  f{i}: {{canary: 200}}\n" for i in range(1000)))
    wrong, _ = as_text(check_file(path, Around(models=None, state=tmp_path, today=TODAY)))
    assert len(wrong) == 201
    assert wrong[-1].endswith("and 800 more problems after this one")


def test_the_exit_code_says_good_bad_or_misused(perch, folder):
    (folder / "good.yaml").write_text(GOOD)
    (folder / "bad.yaml").write_text(GOOD.replace("5", "500"))
    assert perch("check", "good.yaml") == (0, ["good.yaml: good, 1 flag"], [])
    assert perch("check", "bad.yaml") == (
        1, [], ["bad.yaml:3:20: flags.digits.canary: 500 is not between 0 and 100"],
    )  # fmt: skip
    assert perch("check", "no.yaml") == (1, [], ["no.yaml:1:1: there is no such file"])
    assert perch("check", "--format", "xml", "good.yaml")[0] == 2
    assert perch("check", "--models", "none.yaml", "good.yaml")[0] != 0


def test_several_files_are_checked_at_once(perch, folder):
    (folder / "good.yaml").write_text(GOOD)
    (folder / "bad.yaml").write_text(GOOD.replace("5", "500"))
    code, out, err = perch("check", "good.yaml", "bad.yaml", "good.yaml")
    assert (code, len(out), len(err)) == (1, 2, 1)


def test_warnings_fail_only_when_strict(perch, folder):
    (folder / "flags.yaml").write_text(GOOD.replace("5}", "5, expires: 2020-01-01}"))
    code, out, err = perch("check", "flags.yaml")
    assert (code, out) == (0, ["flags.yaml: good, 1 flag, 1 warning"])
    assert len(err) == 1
    assert ": warning: flags.digits.expires: expired on 2020-01-01" in err[0]
    assert perch("check", "--strict", "flags.yaml")[0] == 1


def test_programs_get_every_finding_as_json(perch, folder):
    (folder / "flags.yaml").write_text(GOOD.replace("5}", "5, expires: 2020-01-01}"))
    (folder / "bad.yaml").write_text(GOOD.replace("5", "500"))
    for arguments in (["--format", "json"], ["--json"]):
        code, out, err = perch("check", "flags.yaml", "bad.yaml", *arguments)
        found = json.loads("\n".join(out))
        assert (code, err, found["ok"]) == (1, [], False)
        assert [row["file"] for row in found["problems"]] == ["bad.yaml"]
        assert found["problems"][0] | {"message": ""} == {
            "file": "bad.yaml", "line": 3, "column": 20, "path": "flags.digits.canary", "message": "",
        }  # fmt: skip
        assert [row["path"] for row in found["warnings"]] == ["flags.digits.expires"]
    assert json.loads("\n".join(perch("check", "flags.yaml", "--json")[1]))["ok"] is True


def test_a_pull_request_gets_annotations(perch, folder):
    (folder / "a,b.yaml").write_text(GOOD.replace("5}", "5%, expires: 2020-01-01}"))
    code, out, err = perch("check", "a,b.yaml", "--format", "github")
    assert (code, err) == (1, [])
    assert out == [
        "::error file=a%2Cb.yaml,line=3,col=20,title=perch check::flags.digits.canary: write the number alone: 5"
    ]
    (folder / "w.yaml").write_text(GOOD.replace("5}", "5, expires: 2020-01-01}"))
    code, out, _ = perch("check", "w.yaml", "--format", "github")
    assert (code, out[1]) == (0, "w.yaml: good, 1 flag, 1 warning")
    assert re.fullmatch(r"::warning file=w.yaml,line=3,col=\d+,title=perch check::flags.digits.expires: .*", out[0])


def test_where_there_is_no_models_file_the_models_are_not_checked_and_that_is_said(perch, folder):
    (folder / "envoy" / "models.yaml").unlink()
    (folder / "flags.yaml").write_text(GOOD.replace("digits", "whatever"))
    code, out, err = perch("check", "flags.yaml")
    assert (code, out) == (0, ["flags.yaml: good, 1 flag"])
    assert err == ["perch: there is no envoy/models.yaml, so models' names are not checked"]


def test_a_file_is_compared_with_what_is_served(perch, folder):
    (folder / "state").mkdir()
    (folder / "state" / "flags.last-good.yaml").write_text(GOOD)
    (folder / "flags.yaml").write_text(GOOD.replace("5}", "5, salt: other}"))
    code, _, err = perch("check", "flags.yaml")
    assert code == 0
    swap = "the salt changed: 9.5 % of users swap; write `salt: digits` to keep them where they are"
    assert err == [f"flags.yaml:3:29: warning: flags.digits.salt: {swap}"]
    (folder / "state" / "exposure.json").write_text("{broken")
    (folder / "state" / "flags.last-good.yaml").write_text("broken: [")
    assert perch("check", "flags.yaml") == (0, ["flags.yaml: good, 1 flag"], [])


def test_the_shipped_flag_file_is_good_without_any_warning(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["check", "--strict", "--tests", "--state", "/nonexistent"])
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_hook_for_pre_commit_runs_the_check_on_flag_files():
    import yaml

    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["id"] == "perch-check"
    assert hook["entry"].split()[:2] == ["perch", "check"]
    assert re.search(hook["files"], "config/flags.yaml")
    assert re.search(hook["files"], "flags/flags.yaml")
    assert not re.search(hook["files"], "flags/tests.yaml")

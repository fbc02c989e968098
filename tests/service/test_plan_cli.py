"""`perch plan` on the command line: what is compared, what is printed, what a CI gate gets."""

import json

import pytest
from typer.testing import CliRunner

from extproc.cli import app

MODELS = "digits: {prefix: /v2/models/digits/, stable: ['h:1']}\nwine: {prefix: /v2/models/wine/, stable: ['h:1']}\n"


def flags(canary, salt="digits", more=""):
    return f"version: 1\nflags:\n  digits: {{canary: {canary}, salt: {salt}{more}}}\n  wine: {{canary: 1}}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("envoy", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "envoy" / "models.yaml").write_text(MODELS)
    (tmp_path / "state" / "flags.last-good.yaml").write_text(flags(10))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(folder):
    """Writes new.yaml and plans it; exit code, stdout lines, stderr lines."""

    def run(new, *arguments):
        (folder / "new.yaml").write_text(new)
        result = CliRunner().invoke(app, ["plan", "new.yaml", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()

    return run


def test_a_raise_is_shown_on_the_line_and_moves_nobody_back(plan):
    code, out, err = plan(flags(50))
    assert (code, err) == (0, [])
    assert out == [
        "digits (model digits)",
        "  before |█████·············································| 10 %",
        "  after  |█████++++++++++++++++++++·························| 50 %",
        "          0          25          50           75          100",
        "  of those whom the percentage decides about, 40 % move to canary, 0 % back to stable (buckets 10000..49999)",
        "  canary: 10 % → 50 %",
        "",
        "unchanged: wine",
        "nobody moves back to stable",
    ]


def test_a_lower_percentage_exits_with_3_for_a_gate(plan):
    code, out, _ = plan(flags(2))
    assert code == 3
    assert "  after  |█----·············································| 2 %" in out
    assert out[-1] == "somebody moves back from canary to stable"


def test_another_salt_is_warned_about_with_its_share(plan, folder):
    (folder / "state" / "flags.last-good.yaml").write_text(flags(5))
    code, out, _ = plan(flags(5, salt="other"))
    assert code == 3
    assert any(line.startswith("  warning: the salt changed: 9.5 % of users swap") for line in out)


def test_programs_get_the_same_as_json(plan):
    code, out, err = plan(flags(25), "--json")
    assert (code, err) == (0, [])
    whole = json.loads("\n".join(out))
    assert (whole["moves_back"], list(whole["flags"])) == (False, ["digits", "wine"])
    digits = whole["flags"]["digits"]
    assert (digits["before"]["percent"], digits["after"]["percent"]) == (10, 25)
    assert (digits["to_canary_percent"], digits["to_stable_percent"]) == (15, 0)
    assert digits["intervals"] == [{"first": 10_000, "last": 24_999, "to": "canary"}]
    assert digits["changes"] == [{"what": "canary", "before": "10 %", "after": "25 %"}]
    assert whole["flags"]["wine"]["changed"] is False
    swapped = json.loads("\n".join(plan(flags(10, salt="other"), "--json")[1]))["flags"]["digits"]
    assert (swapped["to_canary_percent"], swapped["drawn_anew"], swapped["intervals"]) == (9, True, [])


def test_what_is_served_includes_what_the_controller_decided(plan, folder):
    rollout = "version: 1\nflags:\n  digits: {rollout: {steps: [{canary: 5}, {canary: 100}]}}\n"
    (folder / "state" / "flags.last-good.yaml").write_text(rollout)
    exposure = {"seq": 4, "flags": {"digits": {"salt": "digits", "percent": 60, "step": 1, "cap": 0}}}
    (folder / "state" / "exposure.json").write_text(json.dumps(exposure))
    code, out, _ = plan(rollout.replace("canary: 5}", "canary: 10}"))
    assert code == 0
    assert "  the rollout keeps its 60 %; the new steps and guardrails count from its next look on" in out
    assert "  the canary is not warm: nobody is on it now, and all of this holds once it is" in out
    code, out, _ = plan(flags(10), "--json")
    assert code == 3
    whole = json.loads("\n".join(out))
    assert whole["before"].endswith(".4")
    assert whole["flags"]["digits"]["held"] is True
    assert whole["flags"]["digits"]["to_stable_percent"] == 50


def test_users_of_a_file_are_counted_by_the_decision_itself(plan, folder):
    (folder / "ids").write_bytes(b"".join(b"user-%d\n" % i for i in range(2000)) + b"\n\xff\xfe\n")
    code, out, _ = plan(flags(30), "--units", "ids", "--json")
    assert code == 0
    counted = json.loads("\n".join(out))["flags"]["digits"]["counted"]
    assert counted["units"] == 2001
    assert counted["to_stable"] == 0
    assert 300 < counted["to_canary"] < 500
    assert any("of 2,001 units counted" in line for line in plan(flags(30), "--units", "ids")[1])


def test_users_are_counted_with_the_warm_gate_open(plan, folder):
    (folder / "ids").write_text("\n".join(map(str, range(500))))
    exposure = {"seq": 1, "flags": {"digits": {"salt": "digits", "cap": 0}}}
    (folder / "state" / "exposure.json").write_text(json.dumps(exposure))
    code, out, _ = plan(flags(0), "--units", "ids", "--json")
    assert code == 3
    assert json.loads("\n".join(out))["flags"]["digits"]["counted"]["to_stable"] > 20


def test_another_file_may_be_compared_with(plan, folder):
    (folder / "old.yaml").write_text(flags(90))
    code, out, _ = plan(flags(50), "--flags", "old.yaml")
    assert code == 3
    assert "  canary: 90 % → 50 %" in out


def test_an_edit_of_comments_changes_nothing(plan):
    assert plan("# a comment\n" + flags(10)) == (0, ["nothing changes for anybody"], [])


def test_rules_and_their_users_are_told(plan):
    rules = ", rules: [{name: staff, when: {header: x-tenant, equals: acme}, serve: canary}]"
    code, out, _ = plan(flags(10, more=rules))
    assert code == 0
    assert "  who goes from the percentage (10 %) to rule staff (100 %): 90 % to canary, 0 % back to stable" in out
    assert "  rule staff: (nothing) → serve canary" in out


def test_a_bad_new_file_is_not_planned(plan):
    code, out, err = plan(flags(500))
    assert (code, out) == (1, [])
    assert err == ["new.yaml:3:20: flags.digits.canary: 500 is not between 0 and 100"]


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (lambda f: (f / "state" / "flags.last-good.yaml").unlink(), [], "perch: nothing is served yet, "),
        (lambda f: (f / "state" / "exposure.json").write_text("{"), [], "perch: state/exposure.json: "),
        (lambda _: None, ["--units", "none"], "perch: none: cannot be read: "),
        (lambda f: (f / "empty").write_text("\n"), ["--units", "empty"], "perch: empty: has no unit id; "),
        (lambda f: (f / "state" / "flags.last-good.yaml").write_text("a: ["), [], "state/flags.last-good.yaml:"),
        (lambda _: None, ["--flags", "none.yaml"], "none.yaml:1:1: there is no such file"),
    ],
)
def test_nothing_to_compare_with_is_one_line(plan, folder, break_it, arguments, message):
    break_it(folder)
    code, out, err = plan(flags(5), *arguments)
    assert (code, out, len(err)) == (1, [], 1)
    assert err[0].startswith(message)

"""`perch check --tests`: teams test their flags, and the tests are tested for what they say."""

import pytest
from typer.testing import CliRunner

from extproc.cli import app

FLAGS = """\
version: 1
flags:
  digits:
    canary: 20
    unit: [x-user-id, cookie:sid]
    allow_force: true
    rules:
      - {name: staff, when: {header: x-tenant, equals: acme}, serve: canary}
      - {name: pilot, when: {header: x-region, prefix: eu-}, canary: 50}
  wine: {rollout: {steps: [{canary: 10}, {canary: 100}]}, unit: ["cookie:sid"]}
"""
MODELS = "digits: {prefix: /v2/models/digits/, stable: ['h:1']}\nwine: {prefix: /v2/models/wine/, stable: ['h:1']}\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Checks flags.yaml with these cases, each a line; exit code, stdout lines, stderr lines."""
    (tmp_path / "envoy").mkdir()
    (tmp_path / "envoy" / "models.yaml").write_text(MODELS)
    (tmp_path / "flags.yaml").write_text(FLAGS)
    monkeypatch.chdir(tmp_path)

    def check(*cases, text=None):
        (tmp_path / "tests.yaml").write_text(
            text or "version: 1\ntests:\n" + "".join(f"  - {case}\n" for case in cases)
        )
        result = CliRunner().invoke(app, ["check", "flags.yaml", "--tests"])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        errors = [line for line in result.stderr.splitlines() if ": warning: " not in line]
        return result.exit_code, result.stdout.splitlines(), errors

    return check


GOOD = [
    "{name: a, flag: digits, headers: {x-tenant: acme}, expect: {cohort: canary, reason: TARGETING_MATCH}}",
    "{name: b, flag: digits, headers: {X-Tenant: [beta, acme]}, expect: {rule: staff}}",
    "{name: c, flag: digits, headers: {x-user-id: u}, at: 100, expect: {cohort: canary, reason: SPLIT, rule: ''}}",
    "{name: d, flag: digits, headers: {x-user-id: [u, v]}, expect: {reason: AMBIGUOUS_UNIT}}",
    "{name: e, flag: digits, headers: {x-user-id: 7, x-region: eu-1}, expect: {reason: RULE_SPLIT, rule: pilot}}",
    "{name: f, flag: digits, ids: 5000, expect: {canary: 20, within: 2}}",
    "{name: g, flag: digits, ids: 5000, headers: {x-region: eu-1}, expect: {canary: 50, within: 3}}",
    "{name: h, flag: digits, ids: 1000, at: 0, expect: {canary: 0, within: 0}}",
    "{name: i, flag: wine, headers: {cookie: sid=1}, expect: {cohort: stable, reason: SPLIT}}",
    "{name: j, flag: wine, ids: 5000, headers: {cookie: theme=dark}, at: 60, expect: {canary: 60, within: 3}}",
    "{name: k, flag: digits, path: /elsewhere, expect: {reason: DEFAULT}}",
    "{name: l, flag: digits, headers: {x-force-cohort: canary;token}, expect: {reason: NO_UNIT}}",
]


def test_good_cases_pass_and_are_counted(run):
    assert run(*GOOD) == (0, [f"flags.yaml: good, 2 flags, 1 warning, {len(GOOD)} tests passed"], [])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "{name: a, flag: digits, headers: {x-tenant: acme}, expect: {cohort: stable}}",
            "tests.yaml:3:73: tests[0].expect.cohort: a: cohort is canary, not stable",
        ),
        (
            "{name: a, flag: digits, expect: {reason: SPLIT}}",
            "tests.yaml:3:46: tests[0].expect.reason: a: reason is NO_UNIT, not SPLIT",
        ),
        (
            "{name: a, flag: digits, headers: {x-tenant: beta}, expect: {rule: staff}}",
            "tests.yaml:3:71: tests[0].expect.rule: a: rule is none, not staff",
        ),
        (
            "{name: a, flag: digits, ids: 1000, at: 100, expect: {canary: 20}}",
            "tests.yaml:3:66: tests[0].expect.canary: a: 100 % of 1,000 ids get canary, not 20 +- 1 %",
        ),
    ],
)
def test_a_case_that_comes_out_otherwise_fails_with_what_came_out(run, case, message):
    code, out, err = run(case, GOOD[0])
    assert code == 1
    assert err == [message]
    assert out == ["flags.yaml: good, 2 flags, 1 warning, 1 of 2 tests passed"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("{name: a, flag: digit, expect: {rule: x}}", "tests[0].flag: there is no flag digit; did you mean digits?"),
        (
            "{name: a, flag: digits, expect: {}}",
            "tests[0].expect: nothing is expected; write cohort, reason, rule or canary",
        ),
        (
            "{name: a, flag: digits, expect: {reason: SPILT}}",
            "tests[0].expect.reason: SPILT is no reason; did you mean SPLIT?",
        ),
        (
            "{name: a, flag: digits, expect: {cohort: canarry}}",
            "tests[0].expect.cohort: write 'stable' or 'canary', not canarry",
        ),
        ("{name: a, flag: digits, expect: {canary: 5}}", "tests[0].expect: a percentage needs `ids`"),
        ("{name: a, flag: digits, ids: 9, expect: {rule: staff}}", "tests[0].expect: a percentage needs `ids`"),
        (
            "{name: a, flag: digits, ids: 9, expect: {canary: 5, rule: staff}}",
            "tests[0].expect.rule: of many ids only the percentage is compared: write canary",
        ),
        (
            "{name: a, flag: digits, expect: {rule: x, within: 1}}",
            "tests[0].expect.within: a tolerance belongs to a percentage",
        ),
        (
            "{name: a, flag: digits, ids: 0, expect: {canary: 5}}",
            "tests[0].ids: a number of ids is a whole number from 1 to",
        ),
        (
            "{name: a, flag: digits, header: {a: b}, expect: {rule: x}}",
            "tests[0].header: unknown key; did you mean headers?",
        ),
        ("{name: a, flag: digits, headers: {a: 1.5}, expect: {rule: x}}", "tests[0].headers.a: expected text, not 1.5"),
        ("{name: a, flag: digits, headers: {a_b: c}, expect: {rule: x}}", "Envoy drops headers with underscores"),
        ("{flag: digits, expect: {rule: x}}", "tests[0].name: this key is missing"),
        ("{name: a, flag: digits, at: 101, expect: {rule: x}}", "tests[0].at: 101 is not between 0 and 100"),
    ],
)
def test_a_mistake_in_a_case_is_told_with_its_place(run, case, message):
    code, _, err = run(case)
    assert (code, len(err)) == (1, 1), err
    assert err[0].startswith("tests.yaml:3:")
    assert message in err[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "version: 2\ntests: [{name: a, flag: digits, expect: {rule: x}}]\n",
            "tests.yaml:1:10: version: write 1, not 2",
        ),
        ("version: 1\ntests: []\n", "tests.yaml:2:8: tests: the list is empty"),
        ("tests\n", "tests.yaml:1:1: expected a mapping of keys, not tests"),
        ("version: 1\ntests: [\n", "tests.yaml:3:1: this is not valid YAML"),
        ("version: 1\ntests: {}\n", "tests.yaml:2:8: tests: expected a list, not a mapping"),
    ],
)
def test_a_file_of_tests_that_cannot_be_run_is_told(run, text, message):
    code, _, err = run(text=text)
    assert code == 1
    assert err[0].startswith(message)


def test_a_missing_file_of_tests_fails(run, tmp_path):
    run(GOOD[0])
    (tmp_path / "tests.yaml").unlink()
    result = CliRunner().invoke(app, ["check", "flags.yaml", "--tests"])
    assert result.exit_code == 1
    assert "tests.yaml:1:1: there is no such file" in result.stderr
    (tmp_path / "other.yaml").write_text("version: 1\ntests:\n  - " + GOOD[0] + "\n")
    result = CliRunner().invoke(app, ["check", "flags.yaml", "--tests-file", "other.yaml"])
    assert (result.exit_code, "1 test passed" in result.stdout) == (0, True)

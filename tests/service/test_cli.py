"""The commands as a person meets them: help that teaches, one line for what is wrong, exit codes for programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from extproc.cli import app

ROOT = Path(__file__).parents[2]


def commands(group, *above):
    """Every command that can be seen, as its words."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        yield (*above, name)
        if hasattr(command, "commands"):
            yield from commands(command, *above, name)


ALL = sorted(commands(get_command(app)))


@pytest.fixture
def perch(folder, service, monkeypatch):
    """Runs a command on the folder's files: exit code, lines of stdout, lines of stderr."""
    for name, value in service.environment(folder).items():
        monkeypatch.setenv(name, value)

    def run(*arguments):
        ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
        return ended.exit_code, ended.stdout.splitlines(), ended.stderr.splitlines()

    return run


def test_the_commands_of_the_contract_are_there():
    names = {words[0] for words in ALL}
    assert {"up", "serve", "control", "check", "explain", "status", "envoy"} <= names
    assert {("envoy", "render"), ("envoy", "validate")} <= set(ALL)


@pytest.mark.parametrize("words", [(), *ALL], ids=" ".join)
def test_every_command_and_every_option_says_what_it_is_for(perch, words):
    code, out, err = perch(*words, "--help")
    assert code == 0
    assert err == []
    assert out[0].startswith("Usage: ")
    command = get_command(app)
    for word in words:
        command = command.commands[word]
    assert command.help
    assert [option.name for option in command.params if not getattr(option, "help", None)] == []


def test_without_a_command_the_help_is_shown(perch):
    code, out, err = perch()
    assert code in {0, 2}
    assert any(line.strip().startswith("up ") for line in (*out, *err))


def test_an_unknown_command_or_option_is_exit_two(perch):
    for arguments in (["nope"], ["check", "--nope"], ["explain"]):
        code, out, err = perch(*arguments)
        assert code == 2
        assert out == []
        assert not any("Traceback" in line for line in err)


def test_check_of_a_good_file_is_zero(perch, folder, service):
    folder.put(service.flags_yaml())
    code, out, err = perch("check", folder.flags)
    assert (code, err) == (0, [])
    assert f"{folder.flags}: good, 1 flag" in out[-1]


def test_check_of_a_bad_file_is_one_with_a_line_per_problem(perch, folder):
    folder.flags.write_text("version: 1\nflags:\n  digits: {canary: 101}\n  wine: {canari: 5}\n")
    code, out, err = perch("check", folder.flags)
    assert code == 1
    told = [line for line in (*out, *err) if line.startswith(f"{folder.flags}:")]
    assert [line.removeprefix(f"{folder.flags}:").split(":")[0] for line in told][:1] == ["3"]
    assert any("did you mean canary?" in line for line in told)
    code, out, _ = perch("check", folder.flags, "--json")
    assert code == 1
    assert json.loads("\n".join(out))


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"version: 1\nflags: [", b"- 1\n", b"version: 1\n"])
def test_check_of_what_is_no_flag_file_is_one_and_never_a_traceback(perch, folder, content):
    if content is not None:
        folder.flags.write_bytes(content)
    code, out, err = perch("check", folder.flags)
    assert code == 1
    assert [line for line in (*out, *err) if line.startswith(f"{folder.flags}:")]


def test_check_of_a_folder_is_one(perch, folder):
    code, out, err = perch("check", folder.flags.parent)
    assert code == 1
    assert "cannot be read" in " ".join((*out, *err))


def test_a_missing_models_file_is_named(perch, folder, service):
    folder.put(service.flags_yaml())
    folder.models.unlink()
    for arguments in (["check"], ["explain", "--flag", "digits"], ["envoy", "render", "--out", folder.root / "x"]):
        code, _, err = perch(*arguments)
        assert code == 1
        assert str(folder.models) in err[0]


def test_status_without_control_is_one_line_and_exit_one(perch):
    code, out, err = perch("status", "--control-port", "1")
    assert (code, out) == (1, [])
    (line,) = err
    assert line.startswith("perch: ")
    assert "127.0.0.1:1" in line


@pytest.mark.parametrize("words", [("check",), ("explain", "--flag", "digits"), ("status",), ("envoy", "render")])
def test_a_bad_variable_names_itself_in_every_command(perch, monkeypatch, words):
    monkeypatch.setenv("PERCH_WORKERS", "many")
    code, out, err = perch(*words)
    assert (code, out) == (2, [])
    (line,) = err
    assert line.startswith("perch: PERCH_WORKERS: ")


def test_an_empty_variable_counts_as_not_set(perch, folder, service, monkeypatch):
    folder.put(service.flags_yaml())
    monkeypatch.setenv("PERCH_WORKERS", "")
    monkeypatch.setenv("PERCH_FORCE_TOKEN", "")
    assert perch("check", folder.flags)[0] == 0


def test_an_option_comes_before_its_variable(perch, folder, service, monkeypatch):
    folder.put(service.flags_yaml())
    monkeypatch.setenv("PERCH_FLAGS", "/nowhere/flags.yaml")
    assert perch("explain", "--flag", "digits", "--flags", folder.flags)[0] == 0
    assert perch("explain", "--flag", "digits")[0] == 1


def test_envoys_files_are_rendered_with_the_headers_that_the_flags_name(perch, folder, service):
    folder.put(service.flags_yaml(5, more="unit: [x-account-id]"))
    out_folder = folder.root / "envoy-files"
    code, out, _ = perch("envoy", "render", "--out", out_folder)
    assert code == 0
    assert "x-account-id" in (out_folder / "ecds.yaml").read_text()
    assert (out_folder / "bootstrap.yaml").exists()
    assert any("envoy -c" in line for line in out)
    assert "nothing changed" in perch("envoy", "render", "--out", out_folder)[1][-1]


def test_the_module_is_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "extproc", "check", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "flag file" in ended.stdout


def test_the_shipped_flag_file_is_good():
    command = [sys.executable, "-m", "extproc", "check", "flags/flags.yaml"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

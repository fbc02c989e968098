"""docs/flags.md is executed: its files are written, its commands run, their output compared. It leaves out no key."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extproc.cli import app
from extproc.core.document import FlagFileError
from extproc.core.ruleset import Reason
from extproc.flagread import flags_in
from extproc.flagschema import flag_schema
from extproc.flagtests import CaseFileModel

PAGE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", PAGE)
ANY_VERSION = re.compile(r"version [0-9a-f]{12}")
"""A hash of the example: the page may change a comment in it."""
MODELS = "digits: {prefix: /v2/models/digits/, stable: ['h:1']}\n"


def test_every_command_on_the_page_prints_what_the_page_says(tmp_path, monkeypatch):
    for folder in ("envoy", "flags"):
        (tmp_path / folder).mkdir()
    (tmp_path / "envoy" / "models.yaml").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    commands = 0
    for language, text in BLOCKS:
        if language == "yaml":
            named = re.match(r"# (\S+\.yaml)\n", text)
            (tmp_path / (named[1] if named else "flags/flags.yaml")).write_text(text)
            continue
        for command, expected in re.findall(r"(?ms)^\$ perch ([^\n]*)\n(.*?)(?=^\$ |\Z)", text):
            result = CliRunner().invoke(app, shlex.split(command))
            assert ANY_VERSION.sub("version", result.output) == ANY_VERSION.sub("version", expected), command
            commands += 1
    assert commands > 12


def examples(pattern):
    return [text for language, text in BLOCKS if language == "yaml" and re.search(pattern, text)]


@pytest.mark.parametrize("text", examples(r"(?m)^flags:"), ids=lambda text: repr(text[:40]))
def test_every_flag_file_on_the_page_is_good_or_shown_to_be_bad(text):
    if "cnary" in text:
        with pytest.raises(FlagFileError):
            flags_in(text.encode(), {"digits": "/"})
    else:
        assert flags_in(text.encode(), {"digits": "/"}).flags


def test_every_key_has_an_example_and_an_explanation():
    schema = flag_schema()
    keys = {key for each in (schema, *schema["definitions"].values()) for key in each.get("properties", {})}
    assert len(keys) > 40
    written = "\n".join(examples(r"(?m)^(flags|tests):"))
    without_example = {key for key in keys if not re.search(rf"(?m)(^|[\s{{,]){re.escape(key)}:", written)}
    assert without_example == set()
    prose = re.sub(r"(?ms)^```.*?^```$", "", PAGE)
    self_evident = {"version", "flags"}
    assert {key for key in keys - self_evident if not re.search(rf"`{re.escape(key)}\b", prose)} == set()


def test_every_key_of_the_tests_file_has_an_example():
    schema = CaseFileModel.model_json_schema(mode="validation")
    keys = {key for each in (schema, *schema["$defs"].values()) for key in each.get("properties", {})}
    written = "\n".join(examples(r"(?m)^tests:"))
    assert {key for key in keys if f"{key}:" not in written} == set()


def test_every_reason_is_explained():
    assert [reason for reason in Reason if f"`{reason}`" not in PAGE] == []

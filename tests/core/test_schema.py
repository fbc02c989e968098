"""The flag file as a language: what is read is what was written, in whatever style, and the schema says the same."""

import json
import re
from decimal import Decimal
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.crosschecks import _Size, _size
from extproc.core.decision import decide
from extproc.core.document import FlagFileError
from extproc.core.flags import Exposures, Margin, MarginKind, MissingUnit, SourceKind, UnitSource
from extproc.core.ruleset import compile_ruleset
from extproc.flagprint import plain_flags, yaml_of
from extproc.flagread import flags_in
from extproc.flagschema import flag_schema, schema_text
from extproc.flagyaml import scan_document

ROOT = Path(__file__).parents[2]
MODELS = {"digits": "/v2/models/digits/", "wine": "/v2/models/wine/", "iris": "/v2/models/iris/"}

# Flag files as plain data.

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=12)
PERCENTS = st.integers(0, 100_000).map(lambda thousandths: Decimal(thousandths) / 1000)
VALUES = st.one_of(
    TEXTS, st.sampled_from(["yes", "null", "1.0", "0x10", "12:30", "~", "-", "a: b", "#", "1e3", "<<", "=", ""])
)
PARTS = VALUES.filter(bool)
DURATIONS = st.sampled_from(["30s", "5m", "1h30m", "2d", "0s", "366d"])
MARGINS = st.sampled_from(["1.2x", "15%", "0.20", Decimal("0.2"), 3, "-5%", "+1.5x"])
HEADER = st.sampled_from([{"header": "x-tenant"}, {"header": "X-Region"}, {"cookie": "Sid"}])


def listed(values):
    return values | st.lists(values, min_size=1, max_size=3)


OPERATORS = st.one_of(
    st.tuples(st.sampled_from(["in", "not_in", "equals"]), listed(VALUES | st.integers(-9, 99))),
    st.tuples(st.sampled_from(["prefix", "suffix", "contains"]), listed(PARTS)),
    st.tuples(st.just("regex"), listed(st.sampled_from(["^a+$", r"\d", "(?i)x|y", "", r"\Qa"]))),
    st.tuples(st.just("semver"), listed(st.sampled_from([">=1 <2", "^1.4", "~2.0.1", "1.2.3-rc.1"]))),
    st.tuples(st.just("exists"), st.booleans()),
)
LEAVES = st.one_of(
    st.builds(lambda subject, op: {**subject, op[0]: op[1]}, HEADER, OPERATORS),
    st.builds(lambda subject, op: {subject: {op[0]: op[1]}}, st.sampled_from(["path", "method"]), OPERATORS),
    st.builds(
        lambda net: {"header": "x-forwarded-for", "cidr": net}, listed(st.sampled_from(["10.0.0.0/8", "::1/128"]))
    ),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda kind, parts: {kind: parts}, st.sampled_from(["all", "any"]), st.lists(inner, min_size=1, max_size=3)
        ),
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda part: {**part, "not": True} if "not" not in part else part, inner),
    ),
    max_leaves=4,
)
RULES = st.lists(
    st.tuples(CONDITIONS | st.just({"segment": "staff"}), st.sampled_from(["stable", "canary"]) | PERCENTS), max_size=3
).map(
    lambda rules: [
        {"name": f"r{i}", "when": when, **({"serve": outcome} if isinstance(outcome, str) else {"canary": outcome})}
        for i, (when, outcome) in enumerate(rules)
    ]
)
STEPS = st.lists(PERCENTS, min_size=1, max_size=4, unique=True).flatmap(
    lambda percents: st.tuples(
        *(
            st.fixed_dictionaries(
                {"canary": st.just(percent)},
                optional={"soak": DURATIONS, "min_requests": st.integers(0, 10**6), "min_units": st.integers(0, 99),
                          "approval": st.just("required")},
            )
            for percent in sorted(percents)
        )
    ).map(list)
)  # fmt: skip
GUARDRAILS = st.dictionaries(
    st.sampled_from(["errors", "latency", "drift", "hangs", "srm", "kpi.accuracy", "kpi.x_1"]),
    st.fixed_dictionaries(
        {},
        optional={"rollback_if": MARGINS, "halt_if": MARGINS, "require": st.just("pass"), "direction": st.just("up")},
    ),
    max_size=3,
)
UNITS = st.lists(st.sampled_from(["x-user-id", "X-Account", "cookie:Sid", "random"]), min_size=1, unique=True)
ROLLOUTS = st.fixed_dictionaries({"steps": STEPS}, optional={"bake": DURATIONS, "guardrails": GUARDRAILS})
FLAGS = st.tuples(
    st.fixed_dictionaries(
        {},
        optional={
            "description": TEXTS, "owner": TEXTS, "salt": NAMES, "rules": RULES, "enabled": st.booleans(),
            "allow_force": st.booleans(), "expires": st.dates().map(str),
            "unit": UNITS,
            "missing_unit": st.sampled_from(["stable", "random"]),
        },
    ),
    st.builds(lambda percent: {"canary": percent}, PERCENTS) | st.builds(lambda plan: {"rollout": plan}, ROLLOUTS),
).map(lambda parts: {**parts[0], **parts[1]})  # fmt: skip
DOCUMENTS = st.builds(
    lambda keys, flags, staff: {
        "version": 1,
        "segments": {"staff": staff},
        "flags": {key: {"model": model, **flag} for key, model, flag in zip(keys, MODELS, flags, strict=False)},
    },
    st.lists(NAMES, min_size=3, max_size=3, unique=True),
    st.lists(FLAGS, max_size=3),
    CONDITIONS,
)


class Plain(yaml.CSafeDumper):
    """Writes Decimals as numbers, texts in quotes, and nothing as an alias."""

    def ignore_aliases(self, _data):
        """Everything is written out."""
        return True


def number_node(dumper, number):
    """2.5 as a float, 2 as an int: as it looks."""
    text = f"{number:f}"
    return dumper.represent_scalar("tag:yaml.org,2002:" + ("float" if "." in text else "int"), text)


Plain.add_representer(Decimal, number_node)
Plain.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def written(data, **style):
    return yaml.dump(data, Dumper=Plain, allow_unicode=True, sort_keys=False, **style).encode()


@settings(max_examples=150, deadline=None)
@given(document=DOCUMENTS)
def test_what_is_printed_reads_back_as_the_same_flags(document):
    flags = flags_in(written(document), MODELS).flags
    assert flags_in(yaml_of(flags).encode(), MODELS).flags == flags


@settings(max_examples=150, deadline=None)
@given(
    document=DOCUMENTS,
    seed=st.randoms(use_true_random=False),
    style=st.sampled_from([{"default_flow_style": True}, {"default_flow_style": False}, {"width": 20, "indent": 4}]),
    form=st.tuples(st.sampled_from(["", "  # why", "\n# a line of its own"]), st.sampled_from(["\n", "\r\n"])),
    users=st.lists(st.binary(min_size=1, max_size=8), min_size=5, max_size=5),
)
def test_comments_order_and_style_change_no_decision(build, document, seed, style, form, users):
    comment, ending = form

    def shuffled(value):
        if not isinstance(value, dict):
            return [shuffled(each) for each in value] if isinstance(value, list) else value
        items = [(key, shuffled(inner)) for key, inner in value.items()]
        seed.shuffle(items)
        return dict(items)

    text = written(shuffled(document), **style).decode()
    if not style.get("default_flow_style"):
        text = re.sub(r"(?m)^(flags:|version: 1)$", rf"\1{comment}", text)
    again = ("# a comment\n---\n" + text).replace("\n", ending).encode()
    first, second = (
        compile_ruleset(flags_in(content, MODELS).flags, Exposures(), MODELS, version="v")
        for content in (written(document), again)
    )
    for prefix in MODELS.values():
        for user in users:
            headers = [(b"x-user-id", user), (b"x-tenant", user), (b"cookie", b"Sid=" + user)]
            request = build.request(headers, prefix.encode() + b"infer")
            a, b = decide(first, request), decide(second, request)
            assert (build.answer(a), a.choice.rule, a.unit_hash) == (build.answer(b), b.choice.rule, b.unit_hash)


def test_anchors_and_merges_are_the_same_as_writing_it_twice():
    short = b"""
version: 1
segments: {}
flags:
  digits: &common
    owner: &owner ml
    canary: 5
    rules: [{name: staff, when: &when {header: x-tenant, equals: acme}, serve: canary}]
  wine:
    <<: *common
    canary: 10
    rules: [{name: pilot, when: *when, serve: stable}]
  iris: {canary: 1, owner: *owner}
"""
    long = b"""
version: 1
flags:
  digits: {owner: ml, canary: 5, rules: [{name: staff, when: {header: x-tenant, equals: acme}, serve: canary}]}
  wine: {owner: ml, canary: 10, rules: [{name: pilot, when: {header: x-tenant, equals: acme}, serve: stable}]}
  iris: {owner: ml, canary: 1}
"""
    assert flags_in(short, MODELS) == flags_in(long, MODELS)


def test_a_flag_file_says_what_the_contract_says():
    """The example of the design, value by value."""
    (flag,) = flags_in(
        b"""
version: 1
flags:
  digits:
    description: MLP digits classifier against the logistic one
    owner: ml-platform
    model: digits
    unit: [X-User-Id, cookie:sid, random]
    missing_unit: random
    salt: digits-2026-11
    enabled: false
    allow_force: true
    expires: 2027-03-01
    rollout:
      steps:
        - {canary: 1, soak: 5m, min_requests: 300, min_units: 100}
        - {canary: 25.125, soak: 1h30m, approval: required}
        - {canary: 100}
      bake: 30m
      guardrails:
        errors: {rollback_if: 1.2x, halt_if: 1.0x, require: pass}
        drift: {rollback_if: 0.20, halt_if: 15%}
        kpi.accuracy: {direction: up, rollback_if: -5%}
""",
        MODELS,
    ).flags
    assert (flag.key, flag.model, flag.salt, flag.percent) == ("digits", "digits", "digits-2026-11", None)
    assert (flag.enabled, flag.allow_force, flag.expires) == (False, True, "2027-03-01")
    assert flag.missing_unit is MissingUnit.RANDOM
    kinds = (SourceKind.HEADER, SourceKind.COOKIE, SourceKind.RANDOM)
    assert flag.unit == tuple(map(UnitSource, kinds, ("x-user-id", "sid", "")))
    first, second, last = flag.rollout.steps
    assert (first.percent, first.soak_s, first.min_requests, first.min_units) == (Decimal(1), 300.0, 300, 100)
    assert (second.percent, second.soak_s, second.approval) == (Decimal("25.125"), 5400.0, True)
    assert (last.percent, last.soak_s, last.min_requests, last.approval) == (Decimal(100), None, None, False)
    assert flag.rollout.bake_s == 1800.0
    errors, drift, kpi = flag.rollout.guardrails
    assert (errors.rollback_if, errors.require) == (Margin(Decimal("1.2"), MarginKind.FACTOR), "pass")
    assert drift.rollback_if == Margin(Decimal("0.20"), MarginKind.DISTANCE)
    assert drift.halt_if == Margin(Decimal(15), MarginKind.SHARE)
    assert (kpi.name, kpi.direction, kpi.rollback_if) == ("kpi.accuracy", "up", Margin(Decimal(-5), MarginKind.SHARE))


def test_segments_that_double_are_counted_only_as_far_as_a_line_can_show():
    much = _Size(1, 10**9)
    assert _size({"any": [{"segment": "s"}] * 10}, {"s": much}) == _Size(2, 10**9)


# The JSON Schema beside the file.

SCHEMA = flag_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def as_an_editor_sees(content):
    """The document as a YAML editor's plugin hands it to the schema: numbers are doubles."""
    return json.loads(json.dumps(scan_document(content).data, default=float))


def test_the_shipped_schema_is_the_one_that_perch_schema_writes():
    assert (ROOT / "flags" / "flags.schema.json").read_text() == schema_text()
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert (
        (ROOT / "flags" / "flags.yaml").read_text().startswith("# yaml-language-server: $schema=./flags.schema.json\n")
    )


@settings(max_examples=150, deadline=None)
@given(document=DOCUMENTS)
def test_the_schema_takes_every_good_file(document):
    content = written(document)
    flags = flags_in(content, MODELS).flags
    VALIDATOR.validate(as_an_editor_sees(content))
    VALIDATOR.validate(json.loads(json.dumps(plain_flags(flags), default=float)))


SHAPE = re.compile(
    "^(key_(unk|that_is_nothing|with)|version|flags_|flag_is|canary_|percent_(ab|neg|is|with)|enabled|owner|unit_(empty|is_text|with)"
    "|missing|expires_in|steps_(e|m)|soak_wi|min_req|approval|margin|direction|rule_(wi|serves|key)|rules_|salt_|condition_)"
)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "tests/golden/bad_flags").glob("*.yaml")) if SHAPE.match(path.stem)],
    ids=lambda path: path.stem,
)
def test_an_editor_marks_what_is_wrong_with_one_key(path):
    try:
        document = as_an_editor_sees(path.read_bytes())
    except FlagFileError:
        pytest.fail("an editor would not even see a document")
    told_elsewhere = {
        "condition_text_empty",
        "key_that_is_a_number",
        "condition_header_is_the_path",
        "condition_value_is_a_float",
    }
    assert path.stem in told_elsewhere or not VALIDATOR.is_valid(document)


def test_every_key_has_a_description_and_no_model_takes_unknown_ones():
    for name, definition in {"": SCHEMA, **SCHEMA["definitions"]}.items():
        if definition.get("type") == "object":
            assert definition["additionalProperties"] is False, name
            for key, value in definition["properties"].items():
                assert value.get("description"), f"{name}.{key}"


def test_what_an_editor_reads_holds_no_null():
    assert "null" not in schema_text()

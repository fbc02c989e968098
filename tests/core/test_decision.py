import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.decision import decide
from extproc.core.flags import Arm, Exposures

CANARY, STABLE = "canary", "stable"
USER = ("x-user-id", "alice")


@pytest.fixture(scope="session")
def unit_of(build):
    """The unit that was hashed, found by trying: which of the candidates gives the decision's hash."""

    def find(decision, candidates, salt="digits"):
        from extproc.core.bucketing import hash_prefix, hash_unit

        return [unit for unit in candidates if hash_unit(hash_prefix(salt), unit) == decision.unit_hash]

    return find


# Units.


def test_the_first_unit_that_is_present_and_not_empty_is_hashed(build, unit_of):
    ruleset = build.rules(build.flag(unit="x-user-id x-session-id cookie:sid"))
    both = [("x-user-id", "u"), ("x-session-id", "s"), ("cookie", "sid=c")]
    candidates = [b"u", b"s", b"c"]
    assert unit_of(build.ask(ruleset, *both), candidates) == [b"u"]
    assert unit_of(build.ask(ruleset, *reversed(both)), candidates) == [b"u"]
    assert unit_of(build.ask(ruleset, *both[1:]), candidates) == [b"s"]
    assert unit_of(build.ask(ruleset, *both[2:]), candidates) == [b"c"]
    assert unit_of(build.ask(ruleset, ("x-user-id", ""), *both[1:]), candidates) == [b"s"]
    assert unit_of(build.ask(ruleset, ("x-user-id", ""), ("x-session-id", ""), both[2]), candidates) == [b"c"]


@pytest.mark.parametrize(
    ("headers", "unit"),
    [
        (["sid=abc"], b"abc"),
        (["a=1; sid=abc; b=2"], b"abc"),
        (["a=1;sid=abc;b=2"], b"abc"),
        (["xsid=no; sid=abc"], b"abc"),
        (["sid2=no; sid=abc"], b"abc"),
        (["SID=no; sid=abc"], b"abc"),
        (["a=1", "sid=abc"], b"abc"),
        (['sid="abc"'], b'"abc"'),
        (["sid=a=b=c"], b"a=b=c"),
        (["sid=abc \t; x=1"], b"abc"),
        (["  sid=abc"], b"abc"),
        ([b"sid=\xff\xfe"], b"\xff\xfe"),
        (["sid", "sid=abc"], b"abc"),
        ([";;;=;= ;sid=abc;;"], b"abc"),
        (["sid=" + "x" * 65_536], b"x" * 65_536),
    ],
)
def test_a_cookie_is_found_over_all_cookie_headers_as_its_bytes(build, unit_of, headers, unit):
    ruleset = build.rules(build.flag(unit="cookie:sid"))
    decision = build.ask(ruleset, *(("cookie", header) for header in headers))
    assert unit_of(decision, [unit]) == [unit]


@pytest.mark.parametrize(
    "headers",
    [[], [""], ["sid"], ["sid="], ["sid=; sid="], ["sid=", "sid="], ["xsid=a"], ["SID=a"], ["a=sid=b"], [";"]],
)
def test_a_missing_or_empty_cookie_is_no_unit(build, headers):
    ruleset = build.rules(build.flag(unit="cookie:sid"))
    decision = build.ask(ruleset, *(("cookie", header) for header in headers))
    assert build.answer(decision) == (STABLE, "NO_UNIT")
    assert decision.bucket is None


@pytest.mark.parametrize(
    "headers",
    [
        [("x-user-id", "a"), ("x-user-id", "b")],
        [("x-user-id", "a"), ("x-user-id", "a")],
        [("x-user-id", ""), ("x-user-id", "a")],
        [("x-user-id", "a"), ("x-session-id", "s"), ("x-user-id", "")],
        [("x-user-id", ""), ("cookie", "sid=a; sid=b")],
        [("cookie", "sid=a"), ("cookie", "sid=a")],
    ],
)
@pytest.mark.parametrize("percent", [0, 50, 99.999])
def test_a_unit_that_came_twice_is_ambiguous_and_stable(build, headers, percent):
    ruleset = build.rules(build.flag(percent=percent, unit="x-user-id x-session-id cookie:sid random"))
    assert build.answer(build.ask(ruleset, *headers)) == (STABLE, "AMBIGUOUS_UNIT")


def test_copies_of_a_header_that_are_all_empty_count_as_absent(build, unit_of):
    ruleset = build.rules(build.flag())
    decision = build.ask(ruleset, ("x-user-id", ""), ("x-user-id", ""), ("x-session-id", "s"))
    assert unit_of(decision, [b"s"]) == [b"s"]


def test_a_second_copy_of_a_later_unit_does_not_matter(build, unit_of):
    ruleset = build.rules(build.flag())
    decision = build.ask(ruleset, ("x-session-id", "s"), ("x-session-id", "t"), ("x-user-id", "u"))
    assert unit_of(decision, [b"u", b"s", b"t"]) == [b"u"]


def test_a_random_unit_is_envoys_request_id_so_that_a_decision_can_be_replayed(build, unit_of):
    explicit = build.rules(build.flag(unit="random", percent=50))
    fallback = build.rules(build.flag(missing_unit="random", percent=50))
    for ruleset in (explicit, fallback):
        decision = build.ask(ruleset, ("x-request-id", "id-1"))
        assert unit_of(decision, [b"id-1"]) == [b"id-1"]
        assert build.answer(decision)[1] == "SPLIT"
        assert decision == build.ask(ruleset, ("x-request-id", "id-1"))
    assert build.answer(build.ask(fallback)) == (STABLE, "NO_UNIT")
    assert unit_of(build.ask(fallback, USER, ("x-request-id", "id-1")), [b"alice", b"id-1"]) == [b"alice"]


def test_without_any_unit_only_a_full_canary_serves_canary(build):
    for percent, expected in ((0, STABLE), (5, STABLE), (99.999, STABLE), (100, CANARY)):
        ruleset = build.rules(build.flag(percent=percent))
        assert build.answer(build.ask(ruleset)) == (expected, "NO_UNIT")


def test_canary_hundred_serves_everybody_and_canary_zero_nobody(build):
    everybody, nobody = (build.rules(build.flag(percent=percent)) for percent in (100, 0))
    for i in range(2000):
        assert build.answer(build.ask(everybody, ("x-user-id", f"u{i}"))) == (CANARY, "SPLIT")
        assert build.answer(build.ask(nobody, ("x-user-id", f"u{i}"))) == (STABLE, "SPLIT")


# Switches.


def test_the_kill_switch_wins_over_everything(build):
    decided = build.exposures(digits={"cap": 0})
    for exposed in (Exposures(), decided):
        ruleset = build.rules(
            build.flag(percent=100, enabled=False, allow_force=True), token=build.token, decided=exposed
        )
        for headers in ([], [USER], [USER, ("x-force-cohort", f"canary;{build.token}")]):
            assert build.answer(build.ask(ruleset, *headers)) == (STABLE, "DISABLED")


def test_the_right_token_forces_either_arm(build):
    for percent, arm in ((0, CANARY), (100, STABLE)):
        ruleset = build.rules(build.flag(percent=percent, allow_force=True), token=build.token)
        assert build.answer(build.ask(ruleset, USER, ("x-force-cohort", f"{arm};{build.token}"))) == (arm, "FORCED")


@pytest.mark.parametrize(
    "values",
    [
        ["canary"],
        ["canary;"],
        ["canary;wrong-token-wrong-token"],
        ["canary;correct-horse-battery "],
        ["canary; correct-horse-battery"],
        ["CANARY;correct-horse-battery"],
        ["both;correct-horse-battery"],
        [";correct-horse-battery"],
        ["correct-horse-battery"],
        ["canary;correct-horse-battery;canary"],
        ["canary,correct-horse-battery"],
        [b"\xff\xfe\x00"],
        [b"canary;\xff"],
        ["x" * 65_536],
        [""],
        ["canary;correct-horse-battery", "canary;correct-horse-battery"],
        ["canary;correct-horse-battery", ""],
    ],
)
def test_anything_but_one_right_token_forces_nothing(build, values):
    for percent, arm in ((0, STABLE), (100, CANARY)):
        ruleset = build.rules(build.flag(percent=percent, allow_force=True), token=build.token)
        headers = [("x-force-cohort", value) for value in values]
        assert build.answer(build.ask(ruleset, USER, *headers)) == (arm, "SPLIT")


def test_nobody_forces_a_flag_that_does_not_allow_it_or_a_perch_that_has_no_token(build):
    forbidden = build.rules(build.flag(percent=0), token=build.token)
    tokenless = build.rules(build.flag(percent=0, allow_force=True), token=None)
    for ruleset in (forbidden, tokenless):
        for text in (f"canary;{build.token}", "canary;", "canary;None", "canary"):
            assert build.answer(build.ask(ruleset, USER, ("x-force-cohort", text))) == (STABLE, "SPLIT")


# What the controller decided.


def test_a_closed_gate_holds_everybody_whom_the_flag_would_let_through(build):
    for percent in (0.001, 5, 100):
        ruleset = build.rules(build.flag(percent=percent), decided=build.exposures(digits={"cap": 0}))
        for headers in ([], [USER], [USER, USER]):
            assert build.answer(build.ask(ruleset, *headers)) == (STABLE, "HELD")


def test_a_closed_gate_in_front_of_nobody_is_not_told_as_held(build):
    decided = build.exposures(digits={"cap": 0}, wine={"cap": 0, "percent": 0})
    ruleset = build.rules(build.flag(percent=0), build.flag("wine", percent=None), decided=decided)
    assert build.answer(build.ask(ruleset, USER)) == (STABLE, "SPLIT")
    assert build.answer(build.ask(ruleset)) == (STABLE, "NO_UNIT")
    assert build.answer(build.ask(ruleset, USER, path=b"/v2/models/wine/infer")) == (STABLE, "SPLIT")


def test_a_tester_cannot_force_a_canary_that_is_not_warm_but_can_force_stable(build):
    for percent in (0, 100):
        flag = build.flag(percent=percent, allow_force=True)
        ruleset = build.rules(flag, decided=build.exposures(digits={"cap": 0}), token=build.token)
        for arm, reason in ((CANARY, "HELD"), (STABLE, "FORCED")):
            decision = build.ask(ruleset, USER, ("x-force-cohort", f"{arm};{build.token}"))
            assert build.answer(decision) == (STABLE, reason)


def cohorts(build, ruleset):
    """What a thousand users get: as good as the threshold itself."""
    return [build.ask(ruleset, ("x-user-id", f"user-{i}")).choice.cohort for i in range(1000)]


def test_an_open_gate_leaves_what_the_person_wrote(build):
    plain = cohorts(build, build.rules(build.flag(percent=5)))
    assert len(set(plain)) == 2
    decided = build.exposures(digits={"cap": 100, "percent": 0})
    assert cohorts(build, build.rules(build.flag(percent=5), decided=decided)) == plain


def test_a_rollout_is_where_the_controller_put_it_and_nowhere_before(build):
    flag = build.flag(percent=None)
    for decided, percent in (
        (Exposures(), 0),
        (build.exposures(digits={"percent": 25.5}), 25.5),
        (build.exposures(digits={"percent": 100}), 100),
        (build.exposures(wine={"percent": 25}), 0),
    ):
        same = build.rules(build.flag(percent=percent))
        assert cohorts(build, build.rules(flag, decided=decided)) == cohorts(build, same)
    held = build.rules(flag, decided=build.exposures(digits={"percent": 25, "cap": 0}))
    assert build.answer(build.ask(held, USER)) == (STABLE, "HELD")


def test_an_exposure_of_another_salt_says_nothing_about_the_flag(build):
    for values in ({"cap": 0}, {"percent": 100}, {"attempt": 7}):
        decided = build.exposures(digits={"salt": "old", **values})
        for percent, same in ((5, 5), (None, 0)):
            ruleset = build.rules(build.flag(percent=percent), decided=decided)
            assert cohorts(build, ruleset) == cohorts(build, build.rules(build.flag(percent=same)))


def test_an_attempt_is_hashed_with_its_number_in_the_salt(build, murmur3):
    for attempt, salt in ((0, b"digits"), (1, b"digits#1"), (12, b"digits#12")):
        ruleset = build.rules(build.flag(), decided=build.exposures(digits={"attempt": attempt}))
        assert build.ask(ruleset, USER).unit_hash == murmur3(salt + b":alice", 0)


def test_exposures_that_could_never_be_read_close_every_gate(build):
    ruleset = build.rules(build.flag(percent=100), build.flag("wine", percent=0), decided=Exposures(closed=True))
    assert build.answer(build.ask(ruleset, USER)) == (STABLE, "HELD")
    assert build.answer(build.ask(ruleset, USER, path=b"/v2/models/wine/infer")) == (STABLE, "SPLIT")


# Paths.


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"*",
        b"/v2/models/digits",
        b"/v2/models/digits?/",
        b"/v2/models/Digits/infer",
        b"/v2/models/digit/infer",
        b"/v2/models/digitsx/infer",
        b"v2/models/digits/infer",
        b"//v2/models/digits/infer",
        b"/x?p=/v2/models/digits/infer",
        b"/" * 65_536,
        b"/v2/models/" + b"x/" * 32_768,
        b"\xff" * 100,
    ],
)
def test_a_path_of_no_model_is_stable_by_default(build, path):
    ruleset = build.rules(build.flag(percent=100))
    decision = build.ask(ruleset, USER, path=path)
    assert build.answer(decision) == (STABLE, "DEFAULT")
    assert (decision.choice.flag, decision.choice.model) == ("", "")


@pytest.mark.parametrize(
    "path",
    [
        b"/v2/models/digits/",
        b"/v2/models/digits/infer?x=/v2/models/wine/",
        b"/v2/models/digits/versions/2/infer",
        b"/v2/models/digits/" + b"/" * 65_536,
        b"/v2/models/digits/\xff\x00",
    ],
)
def test_a_path_below_the_prefix_belongs_to_the_model(build, path):
    ruleset = build.rules(build.flag(percent=100), build.flag("wine", percent=0))
    assert build.answer(build.ask(ruleset, USER, path=path)) == (CANARY, "SPLIT")


def test_a_request_without_a_path_is_stable_by_default(build):
    ruleset = build.rules(build.flag(percent=100))
    request = build.request([])
    assert build.answer(decide(ruleset, type(request)({}))) == (STABLE, "DEFAULT")


def test_a_model_without_a_flag_is_stable_and_named(build):
    decision = build.ask(build.rules(build.flag(percent=100)), USER, path=b"/v2/models/wine/infer")
    assert build.answer(decision) == (STABLE, "DEFAULT")
    assert (decision.choice.flag, decision.choice.model) == ("", "wine")


def test_the_longest_prefix_wins_whatever_the_order(build):
    models = {"all": "/", "v2": "/v2/", "digits": "/v2/models/digits/", "deep": "/v2/models/digits/deep/"}
    flags = [build.flag(name, percent=100) for name in models]
    cases = {b"/x": "all", b"/v2/x": "v2", b"/v2/models/digits/infer": "digits", b"/v2/models/digits/deep/x": "deep"}
    for order in (models, dict(reversed(models.items()))):
        ruleset = build.rules(*flags, models=order)
        assert {path: build.ask(ruleset, USER, path=path).choice.model for path in cases} == cases


def test_two_flags_do_not_touch_each_other(build):
    decided = build.exposures(digits={"cap": 0})
    ruleset = build.rules(build.flag(percent=100), build.flag("wine", percent=100), decided=decided)
    assert build.answer(build.ask(ruleset, USER)) == (STABLE, "HELD")
    assert build.answer(build.ask(ruleset, USER, path=b"/v2/models/wine/infer")) == (CANARY, "SPLIT")


def test_every_choice_of_a_ruleset_stands_at_its_own_index(build):
    ruleset = build.rules(*(build.flag(f"m{i}") for i in range(50)), models={f"m{i}": f"/m{i}/" for i in range(60)})
    assert [choice.index for choice in ruleset.choices] == list(range(len(ruleset.choices)))


def test_a_ruleset_cannot_be_changed(build):
    ruleset = build.rules(build.flag())
    with pytest.raises(AttributeError):
        ruleset.version = "other"
    with pytest.raises(TypeError):
        ruleset.plans[b"/x/"] = ruleset.no_model
    with pytest.raises(AttributeError):
        ruleset.plans[b"/v2/models/digits/"].flag = build.flag(percent=100)


# Everything at once, against a second implementation.


def unit_values(kind, name, pairs):
    """The values of one unit source, in order."""
    header = {"header": name, "cookie": "cookie", "random": "x-request-id"}[kind].encode()
    values = [value for key, value in pairs if key == header]
    if kind != "cookie":
        return values
    crumbs = [crumb.strip(b" \t").split(b"=", 1) for value in values for crumb in value.split(b";")]
    return [crumb[1] for crumb in crumbs if len(crumb) == 2 and crumb[0] == name.encode()]


def expected_of_flag(murmur3, flag, entry, token, pairs):
    """Section 6 of the design, read aloud: (cohort, reason, hash)."""
    if not flag.enabled:
        return STABLE, "DISABLED", None
    cap = 100 if entry is None else entry.cap
    wanted = flag.percent if flag.percent is not None else entry.percent if entry is not None else 0
    asked = [value for name, value in pairs if name == b"x-force-cohort"]
    for arm in (CANARY, STABLE):
        if flag.allow_force and token is not None and asked == [f"{arm};{token}".encode()]:
            return (STABLE, "HELD", None) if arm == CANARY and cap == 0 else (arm, "FORCED", None)
    if cap == 0 and wanted > 0:
        return STABLE, "HELD", None
    percent = min(wanted, cap)
    sources = [(one.kind.value, one.name) for one in flag.unit] + [("random", "")] * (flag.missing_unit == "random")
    units = next(filter(any, (unit_values(kind, name, pairs) for kind, name in sources)), None)
    if units is None or len(units) > 1:
        return CANARY if percent == 100 else STABLE, "NO_UNIT" if units is None else "AMBIGUOUS_UNIT", None
    salt = flag.salt + (f"#{entry.attempt}" if entry is not None and entry.attempt else "")
    unit_hash = murmur3(salt.encode() + b":" + units[0], 0)
    return CANARY if unit_hash * 100_000 >> 32 < round(percent * 1000) else STABLE, "SPLIT", unit_hash


TOKEN = "correct-horse-battery"
HEADER_NAMES = st.sampled_from([b"x-user-id", b"x-session-id", b"cookie", b"x-request-id", b"x-force-cohort", b"other"])
VALUES = st.one_of(
    st.sampled_from([b"", b"alice", b"sid=a", b"sid=a; sid=", b"xsid=1; sid=b", b"sid=", b"\xff", b"canary", b"0"]),
    st.sampled_from([f"canary;{TOKEN}".encode(), f"stable;{TOKEN}".encode(), b"canary;x"]),
    st.binary(max_size=20),
)
PATHS = st.one_of(
    st.sampled_from([b"/a/infer", b"/a/b/infer", b"/a/bc/infer", b"/c/", b"/c", b"/", b"", b"/a/b", b"/a//b/"]),
    st.binary(max_size=12).map(lambda tail: b"/a/" + tail),
)
UNITS = st.lists(
    st.sampled_from(["x-user-id", "x-session-id", "cookie:sid", "cookie:xsid", "random"]),
    min_size=1, max_size=4, unique=True,
).map(" ".join)  # fmt: skip
PERCENTS = st.one_of(st.sampled_from([0, 0.001, 50, 99.999, 100]), st.integers(0, 100_000).map(lambda n: n / 1000))
SALTS = st.sampled_from(["s", "t"])
FLAG_VALUES = st.fixed_dictionaries(
    {"percent": st.none() | PERCENTS, "salt": SALTS, "unit": UNITS},
    optional={
        "enabled": st.booleans(), "allow_force": st.booleans(), "missing_unit": st.sampled_from(["stable", "random"]),
    },
)  # fmt: skip
ENTRIES = st.fixed_dictionaries(
    {"salt": SALTS},
    optional={"percent": PERCENTS, "cap": st.sampled_from([0, 100]), "attempt": st.integers(0, 3)},
)
MODELS = {"a": "/a/", "ab": "/a/b/", "c": "/c/"}


@settings(max_examples=400, deadline=None)
@given(
    flags=st.dictionaries(st.sampled_from(list(MODELS)), FLAG_VALUES),
    entries=st.dictionaries(st.sampled_from(list(MODELS)), ENTRIES),
    token=st.sampled_from([None, TOKEN]),
    path=PATHS,
    pairs=st.lists(st.tuples(HEADER_NAMES, VALUES), max_size=6),
)
def test_a_second_implementation_of_the_contract_decides_the_same(
    *, build, murmur3, flags, entries, token, path, pairs
):
    made = [build.flag(key, **values) for key, values in flags.items()]
    decided = build.exposures(**entries)
    decision = decide(build.rules(*made, decided=decided, token=token, models=MODELS), build.request(pairs, path))
    models = [name for name, prefix in MODELS.items() if path.startswith(prefix.encode())]
    model = max(models, key=lambda name: len(MODELS[name]), default=None)
    flag = next((flag for flag in made if flag.model == model), None)
    if flag is None:
        assert build.answer(decision) == (STABLE, "DEFAULT")
        assert (decision.choice.flag, decision.choice.model) == ("", model or "")
        return
    entry = decided.flags.get(flag.key)
    entry = entry if entry is not None and entry.salt == flag.salt else None
    assert (*build.answer(decision), decision.unit_hash) == expected_of_flag(murmur3, flag, entry, token, pairs)
    assert (decision.choice.flag, decision.choice.model) == (flag.key, model)


@settings(max_examples=300, deadline=None)
@given(
    pairs=st.lists(st.tuples(HEADER_NAMES | st.binary(max_size=30), st.binary(max_size=200)), max_size=10),
    path=st.binary(max_size=100) | st.binary(max_size=30).map(lambda tail: b"/v2/models/digits/" + tail),
)
def test_every_request_has_an_answer_and_the_same_one_again(build, pairs, path):
    ruleset = build.rules(
        build.flag(unit="x-user-id cookie:sid random", allow_force=True, percent=50), token=build.token
    )
    request = build.request(pairs, path)
    decision = decide(ruleset, request)
    assert decision == decide(ruleset, request)
    assert decision.choice is ruleset.choices[decision.choice.index]
    assert decision.choice.cohort in set(Arm)
    assert decision.bucket is None or 0 <= decision.bucket < 100_000

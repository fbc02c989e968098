"""What an edit does to users, against counting them."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.bucketing import BUCKETS
from extproc.core.conditions import All, AnyOf, Leaf, Not, Op, Subject
from extproc.core.decision import decide
from extproc.core.flags import Arm, Exposure, Exposures, Guardrail, Margin, MarginKind, Rollout, Rule, Step
from extproc.core.plan import Draw, Interval, move, percent_text, plan
from extproc.core.ruleset import compile_ruleset

MODELS = {"digits": "/v2/models/digits/"}
THRESHOLDS = st.integers(0, BUCKETS) | st.sampled_from([0, 1, BUCKETS - 1, BUCKETS])


def draw(threshold, salt="s"):
    return Draw(threshold, salt)


def only(old, new, exposures=None):
    """The one plan of an edit of one flag."""
    (each,) = plan([old] if old else [], [new] if new else [], exposures or Exposures())
    return each


@given(a=THRESHOLDS, b=THRESHOLDS)
def test_under_one_salt_the_moves_are_the_buckets_between_the_two_percentages(a, b):
    moved = move(draw(a), draw(b))
    assert moved.to_canary == Fraction(max(b - a, 0), BUCKETS)
    assert moved.to_stable == Fraction(max(a - b, 0), BUCKETS)
    assert not moved.drawn_anew
    if a == b:
        assert moved.interval is None
    else:
        changed = [bucket for bucket in {a - 1, a, b - 1, b, 0, BUCKETS - 1} if (bucket < a) != (bucket < b)]
        assert all(moved.interval.first <= bucket <= moved.interval.last for bucket in changed)
        assert moved.interval.last - moved.interval.first + 1 == abs(a - b)
        assert moved.interval.to is (Arm.CANARY if b > a else Arm.STABLE)


@given(a=THRESHOLDS, b=THRESHOLDS)
def test_between_two_salts_the_moves_are_products_and_add_up(a, b):
    moved = move(draw(a), draw(b, "other"))
    assert Fraction(a, BUCKETS) + moved.to_canary - moved.to_stable == Fraction(b, BUCKETS)
    if not {a, b} & {0, BUCKETS}:
        assert moved.to_canary == Fraction(BUCKETS - a, BUCKETS) * Fraction(b, BUCKETS)
        assert moved.drawn_anew


def test_nobody_moves_back_on_a_raise(build):
    for before, after in ((0, 5), (5, 25), (25, 100), (99.999, 100), (5, 5)):
        each = only(build.flag(percent=before), build.flag(percent=after))
        assert (each.users.to_stable, each.moves_back) == (0, False)
    lowered = only(build.flag(percent=25), build.flag(percent=5))
    assert (lowered.users.to_stable, lowered.moves_back) == (Fraction(20, 100), True)
    assert lowered.users.interval == Interval(5_000, 24_999, Arm.STABLE)


def test_another_salt_at_5_percent_swaps_9_5_percent_of_the_users(build):
    each = only(build.flag(percent=5, salt="a"), build.flag(percent=5, salt="b"))
    assert each.users.to_canary == each.users.to_stable == Fraction(475, 10_000)
    assert [notice.message for notice in each.notices] == [
        "the salt changed: 9.5 % of users swap; write `salt: a` to keep them where they are"
    ]
    assert each.moves_back


def test_shares_are_told_exactly():
    assert percent_text(Fraction(19, 200)) == "9.5"
    assert percent_text(Fraction(1, 5)) == "20"
    assert percent_text(Fraction(0)) == "0"
    assert percent_text(Fraction(1)) == "100"
    assert percent_text(Fraction(99_999, 100_000) * Fraction(1, 100_000)) == "0.00099999"


@settings(max_examples=15, deadline=None)
@given(
    before=st.integers(0, 100), after=st.integers(0, 100), salts=st.sampled_from([("a", "a"), ("a", "b"), ("x", "x/y")])
)
def test_counting_users_gives_what_the_plan_says(build, before, after, salts):
    """20,000 users: six standard deviations, and under one salt exactly the buckets of the interval."""
    old, new = build.flag(percent=before, salt=salts[0]), build.flag(percent=after, salt=salts[1])
    each = only(old, new)
    rulesets = [compile_ruleset([flag], Exposures(), MODELS, version="v") for flag in (old, new)]
    count, to_canary, to_stable = 20_000, 0, 0
    for i in range(count):
        first, second = (build.ask(ruleset, ("x-user-id", f"user-{i}")) for ruleset in rulesets)
        moves = first.choice.cohort is not second.choice.cohort
        to_canary += moves and second.choice.cohort is Arm.CANARY
        to_stable += moves and second.choice.cohort is Arm.STABLE
        if not each.users.drawn_anew and salts[0] == salts[1]:
            interval = each.users.interval
            assert moves == (interval is not None and interval.first <= first.bucket <= interval.last)
    for counted, share in ((to_canary, each.users.to_canary), (to_stable, each.users.to_stable)):
        spread = 6 * float(share * (1 - share) / count) ** 0.5
        assert abs(counted / count - float(share)) <= spread


# Rules.

TENANT = Leaf(Subject.HEADER, "x-tenant", Op.IN, ("acme",))
WIDE = Leaf(Subject.HEADER, "x-tenant", Op.IN, ("acme", "beta"))
REGION = Leaf(Subject.HEADER, "x-region", Op.PREFIX, ("eu-",))
STAFF = Rule(name="staff", when=TENANT, serve=Arm.CANARY)
PILOT = Rule(name="pilot", when=REGION, percent=Decimal(50))


def groups(each):
    return [
        (group.before.rule, group.after.rule, percent_text(group.move.to_canary), percent_text(group.move.to_stable))
        for group in each.groups
    ]


def test_a_new_rule_takes_users_from_the_percentage(build):
    each = only(build.flag(percent=10), build.flag(percent=10, rules=(STAFF,)))
    assert groups(each) == [("", "staff", "90", "0")]
    assert not each.moves_back


def test_a_rule_taken_out_leaves_its_users_to_the_others(build):
    each = only(build.flag(percent=10, rules=(STAFF, PILOT)), build.flag(percent=10, rules=(PILOT,)))
    assert groups(each) == [("staff", "pilot", "0", "50"), ("staff", "", "0", "90")]
    assert each.moves_back


def test_a_rule_before_others_takes_only_who_may_match_it(build):
    narrow = Rule(name="ban", when=TENANT, serve=Arm.STABLE)
    wide = Rule(name="all", when=WIDE, serve=Arm.CANARY)
    each = only(build.flag(percent=0, rules=(narrow, wide)), build.flag(percent=0, rules=(wide, narrow)))
    assert groups(each) == [("ban", "all", "100", "0")]
    assert not each.moves_back


def test_a_rules_own_percentage_is_an_interval_of_its_own_salt(build):
    raised = replace(PILOT, percent=Decimal(75))
    each = only(build.flag(rules=(PILOT,)), build.flag(rules=(raised,)))
    assert groups(each) == [("pilot", "pilot", "25", "0")]
    assert each.groups[0].move.interval == Interval(50_000, 74_999, Arm.CANARY)
    assert not each.moves_back


def test_a_renamed_rule_draws_its_users_anew_and_that_is_said(build):
    each = only(build.flag(rules=(PILOT,)), build.flag(rules=(replace(PILOT, name="pioneers"),)))
    assert ("pilot", "pioneers", "25", "25") in groups(each)
    assert [notice.path for notice in each.notices] == [("rules", 0, "name")]


RULE_CONDITIONS = st.sampled_from(
    [TENANT, WIDE, REGION, Not(TENANT), Not(REGION), All((TENANT, REGION)), AnyOf((TENANT, REGION)), Not(Not(WIDE))]
)
RULES = st.lists(
    st.tuples(st.sampled_from("abcd"), RULE_CONDITIONS, st.sampled_from([Arm.CANARY, Arm.STABLE, 0, 30, 60, 100])),
    max_size=4,
    unique_by=lambda rule: rule[0],
).map(
    lambda rules: tuple(
        Rule(name=name, when=when, serve=outcome)
        if isinstance(outcome, Arm)
        else Rule(name=name, when=when, percent=Decimal(outcome))
        for name, when, outcome in rules
    )
)
SIDES = st.fixed_dictionaries(
    {"percent": st.sampled_from([0, 20, 50, 100]), "rules": RULES, "salt": st.sampled_from(["s", "t"])},
    optional={"enabled": st.booleans()},
)


@settings(max_examples=300, deadline=None)
@given(before=SIDES, after=SIDES)
def test_whoever_moves_was_announced(build, before, after):
    """Every move of a user that sends what the rules look at is among those that the plan names."""
    old, new = build.flag(**before), build.flag(**after)
    each = only(old, new)
    announced = {(group.before.rule, group.after.rule): group.move for group in each.groups} | {("", ""): each.users}
    rulesets = [compile_ruleset([flag], Exposures(), MODELS, version="v") for flag in (old, new)]
    for i in range(60):
        headers = [(b"x-user-id", f"u{i}".encode())]
        headers += [(b"x-tenant", tenant) for tenant in [(), (b"acme",), (b"beta",)][i % 3]]
        headers += [(b"x-region", region) for region in [(), (b"eu-1",)][i // 3 % 2]]
        first, second = (decide(ruleset, build.request(headers)) for ruleset in rulesets)
        if first.choice.cohort is second.choice.cohort:
            continue
        moved = announced[first.choice.rule, second.choice.rule]
        assert (moved.to_canary if second.choice.cohort is Arm.CANARY else moved.to_stable) > 0
        assert second.choice.cohort is Arm.CANARY or each.moves_back


# What else an edit does.

PLAN = Rollout(steps=(Step(percent=Decimal(5), soak_s=300.0, min_requests=10), Step(percent=Decimal(100))))


def running(percent=25, salt="digits", **more):
    return Exposures(3, {"digits": Exposure(salt=salt, percent=Decimal(percent), **more)})


def changes(each):
    return [(change.what, change.before, change.after) for change in each.changes]


def test_editing_the_steps_of_a_running_rollout_keeps_its_percentage(build):
    longer = replace(PLAN, steps=(*PLAN.steps[:1], Step(percent=Decimal(50), approval=True), PLAN.steps[1]))
    old, new = build.flag(percent=None, rollout=PLAN), build.flag(percent=None, rollout=longer)
    each = only(old, new, running())
    assert (each.users.to_canary, each.users.to_stable, each.moves_back) == (0, 0, False)
    assert each.rollout == "the rollout keeps its 25 %; the new steps and guardrails count from its next look on"
    assert changes(each) == [
        ("steps", "5 % (5m, 10 requests), 100 %", "5 % (5m, 10 requests), 50 % (approval), 100 %")
    ]  # fmt: skip


def test_another_salt_ends_a_running_rollout_at_zero(build):
    old, new = (build.flag(percent=None, rollout=PLAN, salt=salt) for salt in ("digits", "other"))
    each = only(old, new, running())
    assert (each.users.to_canary, each.users.to_stable) == (0, Fraction(1, 4))
    assert each.rollout == "the rollout begins again at 0 %, from 25 %: a rollout belongs to its salt"
    assert each.notices[0].message.startswith("the salt changed: 25 % of users move back to stable")


def test_a_rollout_that_becomes_a_percentage_and_back(build):
    held, wound = build.flag(percent=30), build.flag(percent=None, rollout=PLAN)
    ends = only(wound, held, running())
    assert ends.rollout == "the rollout ends at 25 %: 30 % is served from now on"
    assert ends.users.interval == Interval(25_000, 29_999, Arm.CANARY)
    begins = only(held, wound)
    assert begins.rollout == "a rollout begins at 0 %, instead of 30 %"
    assert begins.moves_back
    assert changes(begins) == [("canary", "30 %", "a rollout")]


def test_the_warm_gate_is_left_aside_because_it_passes(build):
    each = only(build.flag(percent=25), build.flag(percent=5), running(cap=0))
    assert each.users.to_stable == Fraction(20, 100)


def test_a_reseeded_rollout_is_compared_under_its_attempt(build):
    old, new = build.flag(percent=None, rollout=PLAN), build.flag(percent=50)
    each = only(old, new, running(attempt=2))
    assert each.before.salt == each.after.salt == "digits#2"
    assert each.users.interval == Interval(25_000, 49_999, Arm.CANARY)


def test_the_switch_moves_everybody_back_and_again(build):
    on, off = build.flag(percent=25, rules=(STAFF,)), build.flag(percent=25, rules=(STAFF,), enabled=False)
    assert groups(only(on, off)) == [("staff", "", "0", "100")]
    assert only(on, off).users.to_stable == Fraction(1, 4)
    assert only(off, on).users.to_canary == Fraction(1, 4)
    assert not only(off, on).moves_back


def test_a_flag_that_comes_or_goes(build):
    new = only(None, build.flag(percent=5))
    assert (new.users.to_canary, new.moves_back, changes(new)) == (Fraction(5, 100), False, [("flag", "", "digits")])
    gone = only(build.flag(percent=5), None)
    assert (gone.users.to_stable, gone.moves_back) == (Fraction(5, 100), True)


def test_a_renamed_flag_is_followed_by_its_model(build):
    old = build.flag("digits")
    kept, lost = build.flag("numbers", model="digits", salt="digits"), build.flag("numbers", model="digits")
    assert not only(old, kept).moves_back
    each = only(old, lost)
    assert each.users.drawn_anew
    assert each.notices[0].message == (
        "the flag digits is now numbers and has no salt of its own: 9.5 % of users swap; "
        "write `salt: digits` to keep them where they are"
    )


def test_a_renamed_flag_loses_its_rollout(build):
    old = build.flag(percent=None, rollout=PLAN)
    new = replace(old, key="numbers")
    each = only(old, new, running())
    assert each.moves_back
    assert each.rollout == "the rollout begins again at 0 %, from 25 %: a rollout belongs to its flag's key"


@pytest.mark.parametrize(
    ("before", "after", "back"),
    [
        ("x-user-id x-session-id", "x-user-id", True),
        ("x-user-id", "x-user-id x-session-id", False),
        ("x-user-id x-session-id", "x-user-id cookie:sid", True),
        ("x-user-id", "x-account-id", True),
        ("x-user-id", "x-user-id", False),
    ],
)
def test_units_taken_away_may_move_somebody_back(build, before, after, back):
    each = only(build.flag(unit=before), build.flag(unit=after))
    assert each.moves_back is back
    assert bool(each.notices) == (before != after)
    assert not only(build.flag(percent=0, unit=before), build.flag(percent=0, unit=after)).moves_back


def test_guardrails_are_compared_by_name(build):
    errors = Guardrail(name="errors", rollback_if=Margin(Decimal("1.2"), MarginKind.FACTOR), require="pass")
    drift = Guardrail(name="drift")
    old = build.flag(percent=None, rollout=replace(PLAN, guardrails=(errors,), bake_s=60.0))
    new = build.flag(percent=None, rollout=replace(PLAN, guardrails=(drift,)))
    assert changes(only(old, new)) == [
        ("bake", "1m", ""),
        ("guardrail errors", "rollback_if 1.2x, require pass", ""),
        ("guardrail drift", "", "its defaults"),
    ]


def test_an_edit_of_nothing_changes_nothing(build):
    flag = build.flag(rules=(STAFF, PILOT))
    each = only(flag, flag)
    assert (each.changed, each.moves_back, each.groups, each.notices, each.rollout) == (False, False, (), (), "")

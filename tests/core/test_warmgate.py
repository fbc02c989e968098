import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.warmgate import CLOSE_AFTER, LOST_WITHIN_S, OPEN_AFTER, Gate, look


def walk(gate, ready, *, needed=1, start_s=0.0, every_s=0.5):
    """The looks at these numbers of ready hosts."""
    looks = []
    for i, hosts in enumerate(ready):
        looks.append(look(gate, start_s + i * every_s, hosts, needed))
        gate = looks[-1].gate
    return looks


def states(looks):
    return [one.gate.is_open for one in looks]


def test_the_gate_opens_after_two_looks_in_a_row_with_enough_hosts():
    looks = walk(Gate(is_open=False), [0, 1, 0, 1, 1, 1])
    assert states(looks) == [False, False, False, False, True, True]
    assert [one.changed for one in looks] == [False, False, False, False, True, False]


def test_the_gate_closes_after_three_looks_in_a_row_without():
    looks = walk(Gate(is_open=True), [0, 0, 1, 0, 0, 0, 0])
    assert states(looks) == [True, True, True, True, True, False, False]
    assert [one.changed for one in looks] == [False] * 5 + [True, False]
    assert not any(one.lost for one in looks)


def test_as_many_hosts_as_asked_for_are_needed():
    assert states(walk(Gate(is_open=False), [1, 1, 1, 2, 2], needed=2)) == [False, False, False, False, True]
    assert states(walk(Gate(is_open=True), [1, 1, 1], needed=2)) == [True, True, False]


@pytest.mark.parametrize("needed", [0, -1])
def test_no_host_is_never_enough(needed):
    assert not any(states(walk(Gate(is_open=False), [0] * 5, needed=needed)))


def close_and_open(gate, at_s):
    """Closes at this time, then opens; the look that closed, and the gate afterwards."""
    closing = walk(gate, [0] * CLOSE_AFTER, start_s=at_s, every_s=0)
    opening = walk(closing[-1].gate, [1] * OPEN_AFTER, start_s=at_s, every_s=0)
    return closing[-1], opening[-1].gate


def test_two_closures_within_five_minutes_are_a_lost_canary_and_are_told_once():
    first, gate = close_and_open(Gate(is_open=True), 1000.0)
    second, gate = close_and_open(gate, 1000.0 + LOST_WITHIN_S)
    third, gate = close_and_open(gate, 1000.0 + LOST_WITHIN_S + 1)
    fourth, _ = close_and_open(gate, 1000.0 + LOST_WITHIN_S + 2)
    assert [one.lost for one in (first, second, third, fourth)] == [False, True, False, True]


def test_closures_more_than_five_minutes_apart_are_no_loss():
    gate = Gate(is_open=True)
    for i in range(5):
        closing, gate = close_and_open(gate, i * (LOST_WITHIN_S + 0.1))
        assert not closing.lost


@given(st.lists(st.integers(0, 2), max_size=60), st.booleans(), st.integers(1, 2))
def test_the_gate_changes_only_after_a_whole_run_of_contrary_looks(ready, is_open, needed):
    gate = Gate(is_open=is_open)
    run = 0
    for i, hosts in enumerate(ready):
        seen = look(gate, float(i), hosts, needed)
        run = run + 1 if (hosts >= needed) != gate.is_open else 0
        asked = CLOSE_AFTER if gate.is_open else OPEN_AFTER
        assert seen.changed == (run == asked)
        assert seen.gate.is_open == (gate.is_open != seen.changed)
        assert not seen.lost or (seen.changed and not seen.gate.is_open)
        run = 0 if seen.changed else run
        gate = seen.gate

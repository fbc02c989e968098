from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from extproc.core.gcounter import FORGOTTEN_AFTER, GCounter, Message, Process, largest

COUNTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1 << 70), max_size=4)


@given(COUNTS, COUNTS, COUNTS)
def test_the_largest_of_counts_is_associative_commutative_and_idempotent(first, second, third):
    assert largest(first, largest(second, third)) == largest(largest(first, second), third)
    assert largest(first, second) == largest(second, first)
    assert largest(first, first) == first
    assert largest(largest(first, second), second) == largest(first, second)


@st.composite
def lives(draw):
    """Every message that some processes send, in order, and what they counted in truth."""
    sent, truth = [], Counter()
    for process in draw(st.lists(st.builds(Process, st.sampled_from("xyz"), st.sampled_from("12")), unique=True)):
        counted = Counter()
        for seq, step in enumerate(draw(st.lists(COUNTS, min_size=1, max_size=5))):
            counted.update(step)
            sent.append(Message(process, seq, dict(counted)))
        truth.update(counted)
    return sent, dict(truth)


def last_messages(sent):
    return list({message.process: message for message in sent}.values())


def summed(messages):
    counter = GCounter()
    for message in messages:
        counter.take(message)
    return counter


@given(lives(), st.data())
def test_repeated_shuffled_and_lost_messages_give_the_exact_sum_once_the_last_ones_came(life, data):
    sent, truth = life
    some = data.draw(st.lists(st.sampled_from(sent), max_size=20)) if sent else []
    arrived = data.draw(st.permutations(some + last_messages(sent)))
    assert summed(arrived).totals() == truth


@given(lives(), st.data())
def test_what_is_lost_is_only_missing_until_a_later_message_and_nothing_is_ever_too_high(life, data):
    sent, truth = life
    counter = GCounter()
    for message in data.draw(st.permutations(sent)):
        if data.draw(st.booleans()):
            counter.take(message)
        assert all(n <= truth[key] for key, n in counter.totals().items())
    for message in sent:
        counter.take(message)
    assert counter.totals() == truth


@given(lives())
def test_the_newest_message_of_a_process_is_known_whatever_came_after_it(life):
    sent, _ = life
    counter = summed([*last_messages(sent), *reversed(sent)])
    assert {m.process: counter.seq(m.process) for m in sent} == {m.process: m.seq for m in last_messages(sent)}


def message(boot, n, seq=0):
    return Message(Process("w", boot), seq, {"a": n})


def test_the_process_silent_for_longest_is_folded_and_its_counts_stay():
    counter = GCounter(max_processes=2)
    counter.take(message("old", 5))
    counter.take(message("new", 7))
    counter.take(message("old", 6, 1))  # so the new one was silent for longer
    assert counter.take(message("third", 1)) == Process("w", "new")
    assert counter.totals() == {"a": 6 + 7 + 1}
    assert Process("w", "old") in counter
    assert Process("w", "new") not in counter
    assert counter.seq(Process("w", "new")) is None


def test_a_late_message_of_a_folded_process_is_dropped_and_counted_not_summed_twice():
    counter = GCounter(max_processes=2)
    for boot in range(3):
        counter.take(message(str(boot), 10))
    for _ in range(4):
        assert counter.take(message("0", 10)) is None
    assert counter.totals() == {"a": 30}
    assert counter.dropped == 4


def test_any_number_of_processes_takes_bounded_memory_and_every_count_is_kept():
    counter = GCounter(max_processes=3)
    for boot in range(1000):
        counter.take(message(str(boot), 1))
    assert counter.totals() == {"a": 1000}
    assert len(counter._counts) == len(counter._seqs) == 3
    assert len(counter._folded_names) == 3 * FORGOTTEN_AFTER


def test_a_count_below_zero_is_none():
    assert summed([message("0", -5)]).totals() == {}

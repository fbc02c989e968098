import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core import decided
from extproc.core.decided import Decided, Key, Report, parse_report, plain_report

KEYS = [Key("digits", "digits", "v.1", cohort, "SPLIT", "") for cohort in ("stable", "canary")]


def report(worker, boot, seq, counts, heavy=None):
    return Report(worker, boot, seq, dict(zip(KEYS, counts, strict=False)), heavy or {})


def grown(worker, boot, steps):
    """The reports of one process whose counts grow by these steps."""
    stable = canary = 0
    for seq, (more_stable, more_canary) in enumerate(steps):
        stable, canary = stable + more_stable, canary + more_canary
        yield report(worker, boot, seq, (stable, canary))


STEPS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8)


@given(STEPS, STEPS, st.data())
def test_lost_repeated_and_shuffled_reports_give_the_same_sum(first, second, data):
    sent = [*grown("w0", "a", first), *grown("w1", "b", second)]
    last = [next(r for r in reversed(sent) if r.worker == worker) for worker in ("w0", "w1")]
    arrived = data.draw(st.permutations(data.draw(st.lists(st.sampled_from(sent))) + last))
    summed = Decided()
    for each in arrived:
        summed.take(each)
    wanted = {key: sum(r.counts[key] for r in last) for key in KEYS}
    assert summed.totals() == wanted


def test_a_process_started_again_adds_to_what_it_counted_before():
    summed = Decided()
    for each in (report("w0", "a", 5, (10, 1)), report("w0", "b", 0, (3, 0))):
        summed.take(each)
    assert summed.by_reason("digits") == {"stable": {"SPLIT": 13}, "canary": {"SPLIT": 1}}


def test_processes_silent_for_long_are_folded_without_losing_a_count(monkeypatch):
    monkeypatch.setattr(decided, "MAX_PROCESSES", 3)
    summed = Decided()
    for boot in range(10):
        summed.take(report("w0", f"boot-{boot}", 0, (1, 2)))
    assert summed.totals() == dict(zip(KEYS, (10, 20), strict=True))


def test_an_alert_ends_with_the_report_that_no_longer_has_it_and_with_its_process():
    summed = Decided()
    summed.take(report("w0", "a", 1, (1, 0), {"digits": (0.3, None)}))
    summed.take(report("w1", "a", 1, (1, 0), {"digits": (0.1, "anonymous")}))
    assert summed.heaviest("digits") == (0.3, None)
    summed.take(report("w0", "a", 2, (1, 0)))
    summed.take(report("w0", "a", 1, (1, 0), {"digits": (0.3, None)}))  # late: an older one
    assert summed.heaviest("digits") == (0.1, "anonymous")
    summed.take(report("w1", "b", 0, (0, 0)))
    assert summed.heaviest("digits") is None


def test_a_report_survives_json():
    sent = report("unix:/run/perch/x.sock.1", "a", 3, (7, 8), {"digits": (0.5, None)})
    assert parse_report(json.loads(json.dumps(plain_report(sent)))) == sent


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["worker", "boot", "seq", "counts", "heavy"]), inner)
        ),
    )
)
def test_whatever_else_arrives_is_a_value_error(data):
    try:
        parse_report(data)
    except ValueError:
        return
    assert set(data) >= {"worker", "boot", "seq", "counts", "heavy"}


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="no report"):
        parse_report({"worker": "w", "boot": "b", "seq": 1, "counts": [["a", 1]], "heavy": {}})

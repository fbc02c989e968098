import json
import unicodedata
from decimal import Decimal
from pathlib import Path

import mmh3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from extproc.core.bucketing import (
    BUCKETS,
    HASHES,
    bucket_of,
    effective_salt,
    first_hash_outside,
    hash_prefix,
    hash_unit,
    rule_salt,
    threshold_of,
)
from extproc.core.decision import decide

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "buckets.tsv"
VECTORS = ROOT.parent / "shared" / "vectors" / "mmh3"
IDS = [b"user-%d" % i for i in range(200_000)]


def hashes(salt: str, ids=IDS) -> np.ndarray:
    prefix = hash_prefix(salt)
    return np.fromiter((hash_unit(prefix, unit) for unit in ids), dtype=np.uint64, count=len(ids))


def golden_rows() -> list[tuple[str, bytes, int]]:
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(salt, bytes.fromhex(unit), int(bucket)) for salt, unit, bucket in rows]


def smhasher_verification(hash_of) -> int:
    """SMHasher's VerificationTest: the hash, with seed 0, of the 256 hashes of {}, {0}, {0,1}, ... with seeds 256-i."""
    keys = (bytes(range(i)) for i in range(256))
    digests = b"".join(hash_of(key, 256 - i).to_bytes(4, "little") for i, key in enumerate(keys))
    return hash_of(digests, 0)


def test_the_hash_is_murmur3_x86_32_by_its_smhasher_value(murmur3):
    assert smhasher_verification(lambda key, seed: mmh3.hash(key, seed, False)) == 0xB0F57EE3
    assert smhasher_verification(murmur3) == 0xB0F57EE3


def outside_values(name: str):
    path = VECTORS / name
    if not path.exists():
        pytest.skip("the outside hash values are not beside this checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_hash_agrees_with_values_that_others_published(murmur3):
    for row in outside_values("x86_32.json"):
        data = bytes.fromhex(row["hex"])
        assert mmh3.hash(data, row["seed"], False) == murmur3(data, row["seed"]) == row["hash"]


def test_text_is_hashed_as_utf_8_where_a_javascript_port_is_wrong(murmur3):
    for text, reference, _javascript in outside_values("utf8_issue3.json"):
        assert hash_unit(b"", text.encode()) == murmur3(text.encode(), 0) == reference


@given(st.binary(max_size=300), st.text(max_size=40))
def test_the_hash_of_any_bytes_is_the_one_of_the_algorithm(murmur3, unit, salt):
    salt = salt.encode("utf-8", "replace").decode()
    assert hash_unit(hash_prefix(salt), unit) == murmur3(salt.encode() + b":" + unit, 0)


def test_the_golden_table_of_two_hundred_rows_is_what_units_get(murmur3):
    rows = golden_rows()
    assert len(rows) == len({row[:2] for row in rows}) == 200
    for salt, unit, bucket in rows:
        assert bucket_of(hash_unit(hash_prefix(salt), unit)) == bucket, (salt, unit)
        assert murmur3(salt.encode() + b":" + unit, 0) * 100_000 // 2**32 == bucket


def test_the_golden_table_has_the_units_that_go_wrong_elsewhere():
    units = {unit for _, unit, _ in golden_rows()}
    assert b"" in units
    assert max(map(len, units)) > 1000
    assert any(not _is_utf8(unit) for unit in units)
    assert any(_is_utf8(unit) and not unit.isascii() for unit in units)
    assert {b" alice", b"alice ", b"Alice", b"alice"} <= units
    assert {len(unit) % 4 for unit in units} == {0, 1, 2, 3}


def _is_utf8(unit: bytes) -> bool:
    try:
        unit.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_every_bucket_has_its_share_of_the_hashes_and_no_more():
    edges = np.array([first_hash_outside(t) for t in range(BUCKETS + 1)], dtype=np.uint64)
    assert edges[0] == 0
    assert edges[-1] == HASHES
    assert set(np.diff(edges).tolist()) == {42_949, 42_950}


def test_comparing_hashes_equals_comparing_buckets_at_the_edge_of_every_threshold():
    for threshold in range(BUCKETS + 1):
        edge = first_hash_outside(threshold)
        if edge < HASHES:
            assert bucket_of(edge) == threshold
        if edge > 0:
            assert bucket_of(edge - 1) == threshold - 1


def test_every_percentage_of_three_decimals_has_a_threshold_of_its_own():
    for i in range(BUCKETS + 1):
        assert threshold_of(Decimal(i) / 1000) == i
        assert threshold_of(i / 1000) == i
        assert threshold_of(Decimal(f"{i / 1000:.3f}")) == i


def test_raising_the_percentage_moves_nobody_back_at_any_of_its_steps():
    edges = np.array([first_hash_outside(t) for t in range(BUCKETS + 1)], dtype=np.uint64)
    thresholds = np.arange(BUCKETS + 1, dtype=np.uint64)
    extremes = np.array([0, 1, HASHES - 1], dtype=np.uint64)
    for units in (extremes, *np.split(hashes("digits", IDS[:600]), 12)):
        exposed = units[:, None] < edges
        assert (exposed[:, 1:] >= exposed[:, :-1]).all()
        assert not exposed[:, 0].any()
        assert exposed[:, -1].all()
        assert (exposed == ((units * BUCKETS >> 32)[:, None] < thresholds)).all()


def test_a_unit_joins_exactly_at_its_own_bucket_and_stays(build):
    requests = [build.request([(b"x-user-id", unit)]) for unit in IDS[:25]]
    buckets = [bucket_of(hash_unit(hash_prefix("digits"), unit)) for unit in IDS[:25]]
    steps = sorted({0, 1, 50_000, 99_999, 100_000, *range(0, BUCKETS, 997), *buckets, *(b + 1 for b in buckets)})
    for threshold in steps:
        ruleset = build.rules(build.flag(percent=Decimal(threshold) / 1000))
        for request, bucket in zip(requests, buckets, strict=True):
            expected = "canary" if bucket < threshold else "stable"
            assert build.answer(decide(ruleset, request)) == (expected, "SPLIT")


@pytest.mark.parametrize("percent", ["0.1", "1", "5", "33.333", "50", "99.9"])
def test_the_share_of_two_hundred_thousand_users_is_within_four_sigma(percent):
    exposed = int((hashes("digits-2026-11") < first_hash_outside(threshold_of(Decimal(percent)))).sum())
    share = float(percent) / 100
    sigma = (len(IDS) * share * (1 - share)) ** 0.5
    assert abs(exposed - len(IDS) * share) < 4 * sigma


def test_users_are_spread_evenly_over_a_thousand_slices():
    counts = np.bincount((hashes("digits") * 1000 >> np.uint64(32)).astype(int), minlength=1000)
    assert 0.0001 < stats.chisquare(counts).pvalue < 0.9999


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("digits", "wine"),
        ("digits", "digits2"),
        ("digits", "digit"),
        ("digits-1", "digits-2"),
        ("digits", effective_salt("digits", 1)),
        (effective_salt("digits", 1), effective_salt("digits", 2)),
        ("digits", rule_salt("digits", "pilot")),
        (rule_salt("digits", "a"), rule_salt("digits", "b")),
        ("abcd", "abce"),
        ("abc", "abd"),
    ],
)
@pytest.mark.parametrize("ids", [IDS, [b"%016x" % (i * i) for i in range(100_000)]], ids=["counted", "hexadecimal"])
def test_two_flags_split_independently_however_near_their_names(one, other, ids):
    deciles = [(hashes(salt, ids) * 10 >> np.uint64(32)).astype(int) for salt in (one, other)]
    table = np.bincount(deciles[0] * 10 + deciles[1], minlength=100).reshape(10, 10)
    assert stats.chi2_contingency(table).pvalue > 0.0001


@given(st.sampled_from(["digits", "a", "a/b", "a#1"]), st.binary(max_size=64), st.binary(max_size=64))
def test_no_salt_and_unit_can_be_read_as_another_salt_and_unit(salt, unit, other):
    assert hash_prefix(salt) + unit != hash_prefix(salt + "x") + other
    assert b":" not in hash_prefix(salt)[:-1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"alice", b"Alice"),
        (b"alice", b" alice"),
        (b"alice", b"alice "),
        (b"alice", b"alice\x00"),
        (b"\xff", b"\xfe"),
        (b"\xff", "�".encode()),
        (unicodedata.normalize("NFC", "josé").encode(), unicodedata.normalize("NFD", "josé").encode()),
        ("é".encode(), "é".encode("latin-1")),
        (b"1", b"01"),
    ],
)
def test_a_unit_is_the_bytes_received_and_no_text_that_could_be_normalized(build, one, other):
    ruleset = build.rules(build.flag())
    first, second = (build.ask(ruleset, ("x-user-id", unit)).unit_hash for unit in (one, other))
    assert first is not None
    assert second is not None
    assert first != second


def test_the_same_file_loaded_again_and_a_renamed_flag_move_nobody(build):
    requests = [build.request([(b"x-user-id", unit)]) for unit in IDS[:5000]]
    before = build.rules(build.flag(percent=30, salt="s"))
    again = build.rules(build.flag(percent=30, salt="s"))
    renamed = build.rules(build.flag("renamed", percent=30, salt="s", model="digits"))
    cohorts = [[decide(ruleset, request).choice.cohort for request in requests] for ruleset in (before, again, renamed)]
    assert cohorts[0] == cohorts[1] == cohorts[2]
    assert len(set(cohorts[0])) == 2


def test_a_new_salt_draws_everybody_anew(build):
    requests = [build.request([(b"x-user-id", unit)]) for unit in IDS[:20_000]]
    rulesets = [build.rules(build.flag(percent=50, salt=salt)) for salt in ("one", "two")]
    drawn = [np.array([decide(ruleset, request).choice.cohort for request in requests]) for ruleset in rulesets]
    assert abs((drawn[0] == drawn[1]).mean() - 0.5) < 4 * 0.5 / len(requests) ** 0.5

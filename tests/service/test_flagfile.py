"""Hot reload against a running `perch serve`, which a gRPC client asks all the while."""

import asyncio
import json
import os
import random
import shutil
import threading
import time

import pytest

from extproc.flagfile import RESTLESS, SETTLE_AT_MOST_S, SETTLE_UNENDED_S, read_settled


@pytest.fixture
def perch(shared_perch, service):
    """The shared perch, back at an ordinary flag file and no exposures' opinion."""
    folder = shared_perch.folder
    if folder.flags.is_dir() and not folder.flags.is_symlink():
        shutil.rmtree(folder.flags)
    folder.flags.parent.mkdir(exist_ok=True)
    folder.put_exposures(json.dumps({"seq": 0, "flags": {}}))
    text = service.flags_yaml(0, more=f"description: '{random.random()}'")  # a new version each time
    shared_perch.wait_for_file(folder.put(text))
    service.wait_until(lambda: shared_perch.version().endswith(".0"), "the exposures of no opinion are followed")
    return shared_perch


def exposures(seq: int, **entry) -> str:
    return json.dumps({"seq": seq, "written_by": "test", "flags": {"digits": {"salt": "digits", **entry}}})


def stays(perch, service, version: str, *, kind: str = "flags_rejected", before: int = 0) -> None:
    """The rejection has been told, and the ruleset is still this one, and serving."""
    service.wait_until(lambda: len(perch.events(kind)) > before, f"{kind} is told:\n{perch.log()}")
    assert perch.version() == version
    assert perch.client().health() == 1


def test_a_file_written_in_place_is_served(perch, service):
    text = service.flags_yaml(100)
    perch.folder.flags.write_text(text)
    assert perch.wait_for_file(service.digest(text.encode())).what == ("canary", "SPLIT")


def test_a_file_renamed_over_the_old_one_is_served(perch, service):
    assert perch.put(service.flags_yaml(100)).what == ("canary", "SPLIT")
    assert perch.put(service.flags_yaml(0)).what == ("stable", "SPLIT")


def test_a_file_that_is_older_than_the_one_before_is_served(perch, service):
    text = service.flags_yaml(100, more="description: old")
    scratch = perch.folder.root / "old.yaml"
    scratch.write_text(text)
    os.utime(scratch, (1, 1))
    scratch.replace(perch.folder.flags)
    assert perch.wait_for_file(service.digest(text.encode())).what == ("canary", "SPLIT")


def test_a_file_touched_but_not_changed_is_not_loaded_again(perch, service):
    loaded = len(perch.events("flags_reloaded"))
    version = perch.version()
    os.utime(perch.folder.flags)
    perch.folder.flags.write_bytes(perch.folder.flags.read_bytes())
    perch.put(service.flags_yaml(100))
    assert perch.version() != version
    assert len(perch.events("flags_reloaded")) == loaded + 1


def test_a_config_map_swap_is_served_again_and_again(perch, service):
    folder = perch.folder.flags.parent
    for name, canary in (("..1", 100), ("..2", 0), ("..3", 100)):
        text = service.flags_yaml(canary, more=f"description: '{name}'")
        (folder / name).mkdir()
        (folder / name / "flags.yaml").write_text(text)
        (folder / "..scratch").symlink_to(name)
        (folder / "..scratch").replace(folder / "..data")
        if not perch.folder.flags.is_symlink():
            (folder / ".scratch").symlink_to("..data/flags.yaml")
            (folder / ".scratch").replace(perch.folder.flags)
        expected = "canary" if canary else "stable"
        assert perch.wait_for_file(service.digest(text.encode())).what == (expected, "SPLIT")
    perch.folder.flags.unlink()


def test_a_file_that_is_a_link_to_another_folder_is_followed(perch, service):
    elsewhere = perch.folder.root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    target = elsewhere / "f.yaml"
    target.write_text(service.flags_yaml(0, more="description: linked"))
    perch.folder.flags.unlink()
    perch.folder.flags.symlink_to(target)
    perch.wait_for_file(service.digest(target.read_bytes()))
    target.write_text(service.flags_yaml(100, more="description: linked"))
    assert perch.wait_for_file(service.digest(target.read_bytes())).what == ("canary", "SPLIT")
    perch.folder.flags.unlink()


def test_a_half_written_file_keeps_the_last_good_ruleset(perch, service):
    version = perch.version()
    rejected = len(perch.events("flags_rejected"))
    text = service.flags_yaml(100, more="description: whole")
    half = text[: text.index("canary") + 4]
    perch.folder.flags.write_text(half)
    stays(perch, service, version, before=rejected)
    perch.folder.flags.write_text(text)
    assert perch.wait_for_file(service.digest(text.encode())).what == ("canary", "SPLIT")


def write_pieces(path, pieces, after_each):
    """Writes one after the other, in place; the longest time that any of them was all there was of the file, s."""
    longest_s = began_s = 0.0
    with path.open("w") as file:
        for number, piece in enumerate(pieces):
            writing_s = time.monotonic()
            file.write(piece)
            file.flush()
            longest_s = max(longest_s, time.monotonic() - began_s if number else 0.0)
            began_s = writing_s
            after_each()
    return longest_s


def test_a_file_written_in_small_pieces_is_served_when_it_is_whole_and_not_before(perch, service):
    for attempt in range(20):
        before = perch.version().partition(".")[0]
        text = service.flags_yaml(100, more="\n".join(f"# a remark, number {i} of {attempt:02}" for i in range(40)))
        pieces = [text[i : i + 60] for i in range(0, len(text), 60)]
        assert not any(piece.endswith("\n") for piece in pieces[:-1])  # each of them is the longer time to settle
        seen = set()
        longest_s = write_pieces(perch.folder.flags, pieces, lambda seen=seen: seen.add(perch.version()))
        whole = service.digest(text.encode())
        perch.wait_for_file(whole)
        if longest_s < SETTLE_UNENDED_S:  # after a longer pause, of this machine, a part is a file like any other
            assert {version.partition(".")[0] for version in seen} <= {before, whole}
            return
    pytest.fail(f"in no attempt were all pieces within {SETTLE_UNENDED_S} s of each other")


@pytest.fixture
def changing(tmp_path, monkeypatch):
    """A file that gets a line whenever its reader waits, `lines` in all, each of them a good end."""
    path, wait = tmp_path / "changing.yaml", asyncio.sleep

    def start(lines, stands_still_s=0.0):
        to_come = iter(range(lines))

        async def changed(delay_s):
            if (i := next(to_come, None)) is not None:
                with path.open("a") as file:
                    file.write(f"line {i}\n")
                time.sleep(stands_still_s)  # noqa: ASYNC251  and with it the reader
            await wait(delay_s)

        path.write_text("begin\n")
        monkeypatch.setattr("extproc.flagfile.asyncio.sleep", changed)
        return path

    return start


async def test_a_file_is_read_when_it_has_stopped_changing(changing, monkeypatch):
    monkeypatch.setattr("extproc.flagfile.SETTLE_AT_MOST_S", 60)
    path = changing(10)
    content = await read_settled(path)
    assert content == path.read_bytes()
    assert content.endswith(b"line 9\n")


async def test_a_file_that_never_stops_changing_is_given_up(changing, monkeypatch):
    monkeypatch.setattr("extproc.flagfile.SETTLE_AT_MOST_S", 0.3)
    assert await read_settled(changing(100_000)) is RESTLESS


async def test_a_file_that_was_edited_once_while_its_reader_stood_still_is_no_restless_one(changing):
    assert await read_settled(changing(1, stands_still_s=SETTLE_AT_MOST_S + 0.1)) == b"begin\nline 0\n"


def test_a_deleted_file_keeps_the_last_good_ruleset(perch, service):
    version, rejected = perch.version(), len(perch.events("flags_rejected"))
    content = perch.folder.flags.read_bytes()
    perch.folder.flags.unlink()
    stays(perch, service, version, before=rejected)
    assert "there is no such file" in perch.events("flags_rejected")[-1]
    restored = len(perch.events("flags_restored"))
    perch.folder.put(content)
    perch.wait_for_event("flags_restored", restored + 1)
    assert perch.version() == version


def test_a_missing_file_is_told_once_and_not_each_second(perch, service):
    rejected = len(perch.events("flags_rejected"))
    perch.folder.flags.unlink()
    perch.wait_for_event("flags_rejected", rejected + 1)
    end = time.monotonic() + 2.5  # two looks and a half
    service.wait_until(lambda: time.monotonic() > end, "two looks are over")
    assert len(perch.events("flags_rejected")) == rejected + 1


def test_a_folder_deleted_and_made_again_is_watched_again(perch, service):
    version = perch.version()
    for canary in (100, 0):
        rejected = len(perch.events("flags_rejected"))
        shutil.rmtree(perch.folder.flags.parent)
        stays(perch, service, version, before=rejected)
        perch.folder.flags.parent.mkdir()
        reply = perch.put(service.flags_yaml(canary, more="description: again"))
        assert reply.cohort == ("canary" if canary else "stable")
        version = perch.version()
    assert perch.put(service.flags_yaml(100, more="description: in place")).cohort == "canary"


BAD = {
    "nothing": b"",
    "a blank": b"\n\n",
    "binary": bytes(range(256)) * 64,
    "a null byte": b"version: 1\nflags: {}\n\0",
    "fifty megabytes": b"version: 1\nflags: {}\n" + b"# filler\n" * 5_600_000,
    "an alias bomb": b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 12)),
    "a merge bomb": b"a0: &a0 {k: v}\n"
    + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 12)),
    "deep nesting": b"[" * 200_000,
    "deep indentation": b"".join(b" " * i + b"a:\n" for i in range(2_000)),
    "another language": b"<html><body>502 Bad Gateway</body></html>",
    "an unknown model": b"version: 1\nflags:\n  nope:\n    canary: 5\n",
    "a wrong number": b"version: 1\nflags:\n  digits:\n    canary: 101\n",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_bad_file_keeps_the_last_good_ruleset_and_is_told_with_its_line(perch, service, content):
    version, rejected = perch.version(), len(perch.events("flags_rejected"))
    perch.folder.put(content)
    stays(perch, service, version, before=rejected)
    said = perch.events("flags_rejected")[-1]
    assert said.startswith(f"{perch.folder.flags}:")
    assert all(part.isdigit() for part in said.removeprefix(f"{perch.folder.flags}:").split(":")[:2])
    assert perch.put(service.flags_yaml(100, more="description: mended")).cohort == "canary"


def test_a_file_that_cannot_be_read_keeps_the_last_good_ruleset(perch, service):
    version, rejected = perch.version(), len(perch.events("flags_rejected"))
    perch.folder.flags.unlink()
    perch.folder.flags.mkdir()
    service.wait_until(  # "no such file" may come first
        lambda: any("cannot be read" in said for said in perch.events("flags_rejected")[rejected:]),
        f"the rejection is told:\n{perch.log()}",
    )
    stays(perch, service, version, before=rejected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permissions_keeps_the_last_good_ruleset(perch, service):
    version, rejected = perch.version(), len(perch.events("flags_rejected"))
    perch.folder.flags.chmod(0)
    stays(perch, service, version, before=rejected)
    assert "check its permissions" in perch.events("flags_rejected")[-1]


BROKEN = {
    "missing": lambda flags: flags.unlink(),
    "half-written": lambda flags: flags.write_text("version: 1\nfla"),
    "unreadable": lambda flags: (flags.unlink(), flags.mkdir()),
    "a loop of links": lambda flags: (flags.unlink(), flags.symlink_to(flags.name)),
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN.keys())
def test_a_rollback_takes_effect_while_the_flag_file_is_broken(perch, service, breaks):
    perch.put(service.flags_yaml(100, more="description: to be rolled back"))
    rejected = len(perch.events("flags_rejected"))
    breaks(perch.folder.flags)
    try:
        perch.wait_for_event("flags_rejected", rejected + 1)
        assert perch.ask().what == ("canary", "SPLIT")
        perch.folder.put_exposures(exposures(7, cap=0))
        service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the gate is closed")
        assert perch.version().endswith(".7")
        perch.folder.put_exposures(exposures(8, cap=100))
        service.wait_until(lambda: perch.ask().what == ("canary", "SPLIT"), "the gate is open")
    finally:
        if perch.folder.flags.is_symlink():
            perch.folder.flags.unlink()


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN.keys())
def test_a_closed_gate_stays_closed_when_the_flag_file_breaks(perch, service, breaks):
    perch.put(service.flags_yaml(100, more="description: held"))
    perch.folder.put_exposures(exposures(3, cap=0))
    service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the gate is closed")
    rejected = len(perch.events("flags_rejected"))
    breaks(perch.folder.flags)
    try:
        perch.wait_for_event("flags_rejected", rejected + 1)
        end = time.monotonic() + 1.5  # a look at least, and what it would publish
        while time.monotonic() < end:
            assert perch.ask().what == ("stable", "HELD")
    finally:
        if perch.folder.flags.is_symlink():
            perch.folder.flags.unlink()


def test_a_rollback_does_not_wait_for_a_flag_file_that_never_stops_changing(perch, service):
    perch.put(service.flags_yaml(100, more="description: restless"))
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.wait(0.005):
            n += 1
            perch.folder.flags.write_text(service.flags_yaml(100) + f"# {n}\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for seq in (1, 2, 3):
            cap = 100 * (seq % 2 == 0)
            perch.folder.put_exposures(exposures(seq, cap=cap))
            reason = "SPLIT" if cap else "HELD"
            service.wait_until(lambda reason=reason: perch.ask().what[1] == reason, f"{reason} under seq {seq}")
    finally:
        stop.set()
        writer.join()


BAD_EXPOSURES = {
    "garbage": "{",
    "empty": "",
    "binary": "\0\1\2",
    "a list": "[]",
    "a wrong cap": '{"seq": 9, "flags": {"digits": {"salt": "digits", "cap": 50}}}',
    "not a number": '{"seq": 9, "flags": {"digits": {"salt": "digits", "percent": NaN}}}',
    "too deep": "[" * 100_000,
    "a number too long": '{"seq": ' + "9" * 5_000 + ', "flags": {}}',
}


@pytest.mark.parametrize("text", BAD_EXPOSURES.values(), ids=BAD_EXPOSURES.keys())
def test_exposures_that_cannot_be_read_keep_the_last_good_ones(perch, service, text):
    perch.put(service.flags_yaml(100, more="description: exposed"))
    perch.folder.put_exposures(exposures(5, cap=0))
    service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the gate is closed")
    told = len(perch.events("exposure_unreadable"))
    perch.folder.put_exposures(text)
    perch.wait_for_event("exposure_unreadable", told + 1)
    perch.put(service.flags_yaml(100, more="description: still exposed"))
    assert perch.ask().what == ("stable", "HELD")
    assert perch.version().endswith(".5")


def test_exposures_whose_place_is_taken_by_a_folder_keep_the_last_good_ones(perch, service):
    perch.put(service.flags_yaml(100, more="description: exposed"))
    perch.folder.put_exposures(exposures(5, cap=0))
    service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the gate is closed")
    told = len(perch.events("exposure_unreadable"))
    place = perch.folder.state / "exposure.json"
    place.unlink()
    place.mkdir()
    try:
        perch.wait_for_event("exposure_unreadable", told + 1)
        perch.put(service.flags_yaml(100, more="description: still exposed"))
        assert perch.ask().what == ("stable", "HELD")
    finally:
        place.rmdir()


def test_exposures_that_are_deleted_keep_the_last_good_ones(perch, service):
    perch.put(service.flags_yaml(100, more="description: exposed"))
    perch.folder.put_exposures(exposures(6, cap=0))
    service.wait_until(lambda: perch.ask().what == ("stable", "HELD"), "the gate is closed")
    (perch.folder.state / "exposure.json").unlink()
    perch.put(service.flags_yaml(100, more="description: still exposed"))
    assert perch.ask().what == ("stable", "HELD")


def test_what_was_served_is_kept_under_its_version(perch, service):
    text = service.flags_yaml(25, more="description: kept")
    version = perch.put(text).metadata["version"]
    folder = perch.folder.state / "rulesets"
    record = service.wait_until(
        lambda: (folder / f"{version}.json").exists() and json.loads((folder / f"{version}.json").read_text()),
        f"{version}.json",
    )
    assert record["version"] == version
    assert record["seq"] == 0
    assert (folder / record["flag_file"]).read_text() == text
    last_good = perch.folder.state / "flags.last-good.yaml"
    service.wait_until(lambda: last_good.read_text() == text, "the last good file")
    perch.folder.put_exposures(exposures(4, cap=0, percent=2.5))
    path = folder / f"{service.digest(text.encode())}.4.json"
    service.wait_until(path.exists, "the ruleset under the new exposures")
    record = json.loads(path.read_text())
    assert record["flag_file"] == f"{service.digest(text.encode())}.yaml"
    assert record["flags"]["digits"] == {
        "salt": "digits", "attempt": 0, "canary_version": None, "step": 0, "percent": 2.5, "cap": 0,
    }  # fmt: skip
    assert not list(perch.folder.state.glob(".*"))


def test_no_request_is_lost_or_torn_over_many_edits(perch, service):
    """Every answer names a version that was published, and the cohort that this version says."""
    versions = {}
    stop = threading.Event()
    seen = []

    def ask() -> None:
        client = service.Client(f"unix:{perch.folder.socket}")
        while not stop.is_set():
            seen.append(client.ask())
        client.close()

    first = perch.version().partition(".")[0]
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for i in range(50):
            text = service.flags_yaml(100 if i % 2 else 0, more=f"description: edit {i}")
            digest = perch.folder.put(text)
            versions[digest] = "canary" if i % 2 else "stable"
            if i % 7 == 0:
                perch.wait_for_file(digest)
        perch.wait_for_file(digest)
    finally:
        stop.set()
        asking.join()
    assert len({reply.metadata["version"] for reply in seen}) > 3
    for reply in seen:
        version = reply.metadata["version"].partition(".")[0]
        assert reply.cohort == versions.get(version, "stable" if version == first else "unknown")

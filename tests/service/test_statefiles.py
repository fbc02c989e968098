"""Files that are whole or not there."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from extproc import statefiles
from extproc.statefiles import Journal, append_line, read_or_none, write_atomically

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_with_its_folder_and_read_back(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert read_or_none(path, 100) == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    write_atomically(path, b"secret", 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_reader_sees_one_version_whole_while_another_is_written(tmp_path):
    path = tmp_path / "file"
    versions = [bytes([letter]) * 200_000 for letter in b"abc"]
    write_atomically(path, versions[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for version in versions:
                write_atomically(path, version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert read_or_none(path, 1_000_000) in versions
    finally:
        stop.set()
        writer.join()


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    ended = on_a_small_disk("try: write_atomically(path, b'x' * 100_000)\nexcept OSError as error: print(error)", path)
    assert ended == f"[Errno 27] File too large: '{path}'"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def on_a_small_disk(code, path):
    """What a program prints that has `path` and cannot make a file of more than 1,000 bytes."""
    start = "import sys; from pathlib import Path; from extproc.statefiles import *\npath = Path(sys.argv[1])\n"
    # By itself: what runs between fork and exec may meet a lock of another thread of ours.
    small_disk = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
    command = [sys.executable, "-c", start + small_disk + code, str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def test_of_a_line_for_which_there_is_too_little_room_nothing_stays(tmp_path):
    path = tmp_path / "file"
    code = (
        "for n in (600, 600, 100):\n try: append_line(path, 'x' * n); print(n)\n except OSError as error: print(error)"
    )
    assert on_a_small_disk(code, path).splitlines() == ["600", "[Errno 28] No space left on device", "100"]
    assert [len(line) for line in path.read_text().splitlines()] == [600, 100]


def test_lines_that_a_journal_could_not_write_wait_in_their_order(tmp_path):
    path = tmp_path / "gone" / "journal"
    path.parent.write_text("in the way")
    journal = Journal(path)
    journal.add("one")
    journal.add("two")
    assert (journal.waiting, journal.lost) == (2, 0)
    assert journal.problem.startswith(f"{path}: ")
    path.parent.unlink()
    journal.write()
    journal.add("three")
    assert path.read_text() == "one\ntwo\nthree\n"
    assert (journal.waiting, journal.problem) == (0, "")


def test_a_journal_keeps_the_newest_lines_and_counts_the_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(statefiles, "MAX_WAITING", 3)
    path = tmp_path / "gone" / "journal"
    path.parent.write_text("in the way")
    journal = Journal(path)
    for i in range(5):
        journal.add(str(i))
    assert (journal.waiting, journal.lost) == (3, 2)
    path.parent.unlink()
    journal.write()
    assert path.read_text() == "2\n3\n4\n"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_atomically(tmp_path / "file" / "below", b"x")


def test_what_is_not_there_is_none_and_what_cannot_be_read_is_an_error(tmp_path):
    assert read_or_none(tmp_path / "missing", 10) is None
    assert read_or_none(tmp_path / "missing" / "below", 10) is None
    (tmp_path / "file").write_bytes(b"0123456789abc")
    assert read_or_none(tmp_path / "file" / "below", 10) is None
    assert read_or_none(tmp_path / "file", 10) == b"0123456789a"  # one more than the limit tells that there is more
    with pytest.raises(IsADirectoryError):
        read_or_none(tmp_path, 10)


def test_lines_of_many_writers_are_never_mixed(tmp_path):
    path = tmp_path / "state" / "audit.jsonl"
    writers = [
        threading.Thread(target=lambda letter=letter: [append_line(path, letter * 500) for _ in range(100)])
        for letter in "abcdef"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 600
    assert all(len(line) == 500 and len(set(line)) == 1 for line in lines)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", b"x")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe"):
        read_or_none(tmp_path / "pipe", 10)

"""Watching folders: what the kernel says, what it does not say, and folders that come and go."""

import asyncio
import os
import shutil

import pytest

from extproc.watch import changes, signature


@pytest.fixture
def watch():
    """Starts watching: the first change, which says only that watching has begun, has been taken."""
    started = []

    async def start(*paths):
        watching = changes(paths)
        started.append(watching)
        await anext(watching)
        return watching

    yield start
    assert all(watching.ag_frame is None or not watching.ag_running for watching in started)


async def told_after(watching, change, deadline_s=60.0) -> None:
    """The change is made, and a change is told."""
    telling = asyncio.ensure_future(anext(watching))
    await asyncio.sleep(0)
    change()
    await asyncio.wait_for(telling, deadline_s)
    await watching.aclose()


async def test_it_says_at_once_that_the_files_are_to_be_read(tmp_path):
    watching = changes([tmp_path / "a"])
    await asyncio.wait_for(anext(watching), 60)
    await watching.aclose()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("new"),
        lambda path: path.unlink(),
        lambda path: (path.with_name("b").write_text("new"), path.with_name("b").replace(path)),
        lambda path: os.utime(path, (1, 1)),
    ],
    ids=["written", "deleted", "renamed over", "older"],
)
async def test_the_kernel_tells_of_a_change_of_the_file(watch, tmp_path, monkeypatch, change):
    monkeypatch.setattr("extproc.watch.LOOK_EVERY_S", 600)
    path = tmp_path / "a"
    path.write_text("old")
    await told_after(await watch(path), lambda: change(path))


async def test_a_folder_that_is_gone_before_it_could_be_watched_ends_nothing(watch, tmp_path):
    """Between the look at the folder and the kernel's watch, as with `rm -r flags; git checkout flags`."""
    path = tmp_path / "flags" / "flags.yaml"
    path.parent.mkdir()
    other = tmp_path / "state" / "exposure.json"
    other.parent.mkdir()
    watching = await watch(path, other)
    shutil.rmtree(path.parent)
    await asyncio.wait_for(anext(watching), 60)
    path.parent.mkdir()
    path.write_text("new")
    await asyncio.wait_for(anext(watching), 60)
    await watching.aclose()


async def test_folders_that_come_later_are_watched(watch, tmp_path):
    path, other = tmp_path / "flags" / "flags.yaml", tmp_path / "state" / "exposure.json"
    watching = await watch(path, other)
    for file in (path, other):
        file.parent.mkdir()
        file.write_text("new")
        before = signature(file)
        await asyncio.wait_for(anext(watching), 60)
        file.write_text("newer still")
        assert signature(file) != before
        await asyncio.wait_for(anext(watching), 60)
    await watching.aclose()


async def test_a_file_behind_a_link_to_another_folder_is_looked_at_each_second(watch, tmp_path):
    target, path = tmp_path / "elsewhere" / "f", tmp_path / "flags" / "flags.yaml"
    for file in (target, path):
        file.parent.mkdir()
    target.write_text("old")
    path.symlink_to(target)
    await told_after(await watch(path), lambda: target.write_text("new"))


def test_a_signature_tells_states_apart_without_reading(tmp_path):
    path = tmp_path / "a"
    assert signature(path) is None
    path.write_text("one")
    first = signature(path)
    assert first == signature(path)
    path.write_text("three")
    assert signature(path) != first
    path.unlink()
    path.symlink_to(path.name)
    assert signature(path) is None

"""Tells when files may have changed: kernel events on their folders, and a look each second for what those miss.

The folders are watched, not the files: an editor's rename, a Kubernetes `..data` swap and an in-place write all show
there. The look each second covers network file systems, folders made again, and files that are links to elsewhere.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

from watchfiles import awatch

LOOK_EVERY_S = 1.0
GATHER_MS = 5
"""Events this close together are one change."""

Signature = tuple[int, int, int, int] | None


def signature(path: Path) -> Signature:
    """What tells two states of a file apart without reading it: device, inode, size, mtime in ns. None if missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


async def changes(paths: Sequence[Path]) -> AsyncIterator[None]:
    """Yields whenever one of the files may have changed, at once and then forever; a yield too many is harmless."""
    while True:
        folders = {path.parent for path in paths if path.parent.is_dir()}
        before = {folder: signature_of_folder(folder) for folder in folders}
        yield None
        if not folders:
            await asyncio.sleep(LOOK_EVERY_S)
            continue
        try:
            async with contextlib.aclosing(_events(paths, folders)) as events:
                async for _ in events:
                    yield None
                    if {folder: signature_of_folder(folder) for folder in before} != before:
                        break  # a folder was deleted or made again: watch what stands there now
                    if any(path.parent not in folders and path.parent.is_dir() for path in paths):
                        break
        except (OSError, RuntimeError):
            # A folder went away before it could be watched, or the kernel has no watch left (watchfiles has both
            # kinds of error): then there is the look each second alone.
            await asyncio.sleep(LOOK_EVERY_S)


def signature_of_folder(folder: Path) -> tuple[int, int] | None:
    """Which folder stands at this path: device and inode, None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def _events(paths: Sequence[Path], folders: set[Path]) -> AsyncGenerator[None, None]:
    """An event of the kernel in one of the folders, or a file found changed at the look each second."""
    seen = {path: signature(path) for path in paths}
    last_look = asyncio.get_running_loop().time()
    watching = awatch(
        *folders,
        watch_filter=None,
        recursive=False,
        debounce=GATHER_MS * 4,
        step=GATHER_MS,
        rust_timeout=int(LOOK_EVERY_S * 1000),
        yield_on_timeout=True,
    )
    async with contextlib.aclosing(watching):
        async for events in watching:
            now = {path: signature(path) for path in paths}
            timed_out = not events
            if events or now != seen:
                yield None
            elif timed_out or asyncio.get_running_loop().time() - last_look > LOOK_EVERY_S:
                last_look = asyncio.get_running_loop().time()
                yield None
            seen = now

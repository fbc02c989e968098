"""Version directories on disk: which one to serve, and whether it changed. Reads the file system, nothing else.

DIR is either a version directory itself (it holds manifest.json) or a folder of version directories, of which the one
with the highest name is served: numbers in names count as numbers, so 10 comes after 9.
"""

import re
from pathlib import Path

from model_servers.errors import ArtifactError
from model_servers.manifest import MANIFEST

Fingerprint = tuple[tuple[str, int, int, int], ...]


def version_directories(root: Path) -> list[Path]:
    """The version directories under `root`, lowest first; [root] when it is one. Raises ArtifactError when none is."""
    try:
        if (root / MANIFEST).is_file():
            return [root]
        found = [entry for entry in root.iterdir() if (entry / MANIFEST).is_file()]
    except OSError as error:
        raise ArtifactError(f"{root}: {error.strerror}") from None
    if not found:
        raise ArtifactError(f"{root}: holds no {MANIFEST}, nor does any folder in it; train or copy a version there")
    return sorted(found, key=lambda path: _order(path.name))


def newest(root: Path) -> Path:
    """The version directory to serve. Raises ArtifactError when there is none."""
    return version_directories(root)[-1]


def fingerprint(directory: Path) -> Fingerprint:
    """Equal as long as nobody touched the files of a version directory; empty when it is gone."""
    try:
        stats = [(entry.name, entry.stat()) for entry in sorted(directory.iterdir()) if entry.is_file()]
    except OSError:
        return ()
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _order(name: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.findall(r"\d+|\D+", name)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)

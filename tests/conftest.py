"""How the suite is shared between two workers: whole files, and all that starts whole systems in one of them."""

from pathlib import Path

import pytest

SYSTEMS = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items):
    """One system at a time, begun first since together they take longest; every other file is a group of its own."""
    items.sort(key=lambda item: SYSTEMS not in item.path.parents)
    for item in items:
        group = "systems" if SYSTEMS in item.path.parents else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))

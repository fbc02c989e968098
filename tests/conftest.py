"""How the suite is shared between two workers: whole files, and all that starts whole systems in one of them.

And hypothesis without its clocks: of a machine that is busy with the other worker they tell nothing about perch.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("perch", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("perch")

SYSTEMS = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items):
    """One system at a time, begun first since together they take longest; every other file is a group of its own."""
    items.sort(key=lambda item: SYSTEMS not in item.path.parents)
    for item in items:
        group = "systems" if SYSTEMS in item.path.parents else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))

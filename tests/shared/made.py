"""What tests of several folders begin with."""

import itertools

from extproc.core.outcomes import Outcome

IDS = itertools.count()


def good_outcome(assignment, /, **changed):
    """An inference request that went well, served as assigned, with an id of its own, unless told otherwise."""
    arm = assignment.cohort if assignment else "stable"
    plain = Outcome(
        assignment=assignment,
        hash=None if assignment is None else 7,
        model="digits",
        arm=arm,
        served=arm,
        inference=True,
        failed_open=False,
        status=200,
        attempts=1,
        deadline=False,
        aborted=False,
        upstream_ms=3.0,
        total_ms=4.0,
        model_version="1",
        predictions="4",
        prediction_count=1,
        request_id=f"id-{next(IDS)}",
        ended_s=1000.0,
    )
    return plain._replace(**changed)

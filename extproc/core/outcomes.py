"""What became of one request: what perch decided about it, who served it, how it ended. And which of them may judge."""

from enum import StrEnum
from typing import NamedTuple

ELIGIBLE_REASONS = frozenset({"SPLIT", "RULE_SPLIT"})
"""Only these put a request into an arm by chance; everything else is shown, never judged."""


class Arm(StrEnum):
    """The two sides of a comparison."""

    STABLE = "stable"
    CANARY = "canary"


class Assignment(NamedTuple):
    """What perch wrote into the request's metadata, without the hash; many outcomes share one."""

    flag: str
    model: str
    cohort: str
    reason: str
    rule: str
    version: str


class Outcome(NamedTuple):
    """One request, at its end.

    `assignment` and `hash` (the full 32 bits of the unit's hash) are None where ext_proc said nothing: it was off for
    the route, dead, or failed open. `model` is the model whose route was taken, "" for a route of no model; `arm` is
    the arm whose route was taken and `served` the arm of the host that answered, "" for neither. `inference` tells
    inference from health and metadata. `status` is 0 when there was no answer. Durations are in milliseconds;
    `upstream_ms` is None when no upstream answered. `prediction_count` is None without the header; `predictions` is
    the header as it came. `ended_s` is the request's end on Envoy's clock, seconds since 1970.
    """

    assignment: Assignment | None
    hash: int | None
    model: str
    arm: str
    served: str
    inference: bool
    failed_open: bool
    status: int
    attempts: int
    deadline: bool
    aborted: bool
    upstream_ms: float | None
    total_ms: float
    model_version: str
    predictions: str
    prediction_count: int | None
    request_id: str
    ended_s: float

    @property
    def error(self) -> str:
        """The class of what went wrong on the server's side: "deadline", "5xx", "no_answer"; "" for nothing.

        A 4xx is the client's mistake; a client that went away is nobody's. A model that never answers is an error at
        the deadline, whatever status Envoy made of it.
        """
        if self.aborted:
            return ""
        if self.deadline:
            return "deadline"
        if self.status >= 500:
            return "5xx"
        return "" if self.status else "no_answer"

    @property
    def fell_back(self) -> bool:
        """Assigned to canary, sent to canary's route, and served by stable because no canary server could."""
        assignment = self.assignment
        return (
            assignment is not None
            and assignment.cohort == Arm.CANARY
            and self.arm == Arm.CANARY
            and self.served == Arm.STABLE
        )

    @property
    def eligible(self) -> bool:
        """Whether a guardrail may count it: assigned by chance, on an inference route, not given up by the client."""
        assignment = self.assignment
        return (
            assignment is not None
            and assignment.reason in ELIGIBLE_REASONS
            and self.inference
            and not self.failed_open
            and not self.aborted
        )

    @property
    def mismatched(self) -> bool:
        """Whether it went elsewhere than decided: served by another arm or model, but for a fall-back."""
        assignment = self.assignment
        if assignment is None or not self.inference or not self.served or self.fell_back:
            return False
        return assignment.cohort != self.served or assignment.model != self.model

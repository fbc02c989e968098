"""Counts that only grow, sent by many processes and summed. Loss, repeats and disorder of messages are harmless.

Each process sends its own counts since its boot; merging takes the largest number seen of each. Source: M. Shapiro,
N. Preguica, C. Baquero, M. Zawirski, A comprehensive study of convergent and commutative replicated data types, 2011
(G-Counter). A process that was started again counts from zero under a new boot id.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

MAX_PROCESSES = 1_000
FORGOTTEN_AFTER = 10
"""So many times MAX_PROCESSES folded processes are remembered: a late message of theirs must not be counted twice."""

Key = TypeVar("Key", bound=Hashable)


class Process(NamedTuple):
    """One life of one sender."""

    replica: str
    boot: str


@dataclass(frozen=True, slots=True)
class Message(Generic[Key]):
    """What a process has counted since its boot. `seq` grows with every message of a process."""

    process: Process
    seq: int
    counts: Mapping[Key, int]


def largest(first: Mapping[Key, int], second: Mapping[Key, int]) -> dict[Key, int]:
    """Both counts of one process as one: the larger number of each key. A number below 0 is none."""
    joined = dict(first)
    for key, n in second.items():
        if n > joined.get(key, -1):
            joined[key] = n
    return joined


@dataclass(slots=True)
class GCounter(Generic[Key]):
    """The sum over all processes that ever reported.

    Beyond `max_processes` the one that was silent longest is folded into the sum for good. What it sends later is
    dropped and counted in `dropped`: to sum it again would count twice.
    """

    max_processes: int = MAX_PROCESSES
    dropped: int = 0
    _counts: dict[Process, dict[Key, int]] = field(default_factory=dict)
    _seqs: dict[Process, int] = field(default_factory=dict)
    _folded: dict[Key, int] = field(default_factory=dict)
    _folded_names: dict[Process, None] = field(default_factory=dict)

    def __contains__(self, process: Process) -> bool:
        return process in self._counts

    def take(self, message: Message[Key]) -> Process | None:
        """Merges one message. Returns the process that was folded to make room, if one was."""
        process = message.process
        if process in self._folded_names:
            self.dropped += 1
            return None
        known = self._counts.pop(process, {})
        self._counts[process] = largest(known, message.counts)  # the last heard of is last
        self._seqs[process] = max(message.seq, self._seqs.get(process, message.seq))
        return self._fold(next(iter(self._counts))) if len(self._counts) > self.max_processes else None

    def _fold(self, process: Process) -> Process:
        for key, n in self._counts.pop(process).items():
            self._folded[key] = self._folded.get(key, 0) + n
        del self._seqs[process]
        self._folded_names[process] = None
        if len(self._folded_names) > FORGOTTEN_AFTER * self.max_processes:
            del self._folded_names[next(iter(self._folded_names))]
        return process

    def seq(self, process: Process) -> int | None:
        """The newest message of a process; None for an unknown or folded one."""
        return self._seqs.get(process)

    def processes(self) -> frozenset[Process]:
        """Who reported, but for those that were folded."""
        return frozenset(self._counts)

    def totals(self) -> dict[Key, int]:
        """The sum by key."""
        totals = dict(self._folded)
        for counts in self._counts.values():
            for key, n in counts.items():
                totals[key] = totals.get(key, 0) + n
        return totals

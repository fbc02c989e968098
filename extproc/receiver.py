"""Builds a ruleset from the parts that the flag compiler sends, a part at a time, between requests."""

import asyncio
import gc
import pickle
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from extproc.core.flags import Exposure, Flag
from extproc.core.ruleset import Draft
from extproc.flagcompiler import Head, Part, Refused
from extproc.flagfile import Verdict
from extproc.wire.answer import Published


@dataclass(frozen=True, slots=True)
class Received:
    """A ruleset ready to be served, and the flags it was made of with their exposures."""

    published: Published
    flags: tuple[tuple[Flag, Exposure | None], ...]


@dataclass(frozen=True, slots=True)
class Receiver:
    """Takes the parts of one answer and hands on what they make; nothing, if the file was refused."""

    models: Mapping[str, str]
    force_token: str | None
    hand_on: Callable[[Received], None]

    async def take(self, parts: AsyncIterator[bytes]) -> Verdict:
        """Consumes the parts to their end. Between two of them the loop answers requests."""
        head: Head | None = None
        draft = Draft("", self.models)
        replies: list[bytes] = []
        flags: list[tuple[Flag, Exposure | None]] = []
        refused: Refused | None = None
        async for raw in parts:
            match pickle.loads(raw):  # noqa: S301  from our own child or parent
                case Head() as head:
                    draft = Draft(head.version, self.models, self.force_token)
                    replies, flags = list(head.replies), []  # what a compiler sent that has died is void
                case Part() as part:
                    for flag, exposure, own_replies in part.flags:
                        draft.add(flag, exposure)
                        flags.append((flag, exposure))
                        replies.extend(own_replies)
                case Refused() as refused:
                    pass
            await asyncio.sleep(0)
        if refused is not None or head is None:
            return Verdict(problems=refused.problems if refused else ())
        self.hand_on(Received(Published(draft.finish(), replies, head.other_phases), tuple(flags)))
        gc.freeze()  # a ruleset lives long: the collector need not walk it while requests wait
        return Verdict(head.version, len(flags))

"""The budget that bounds frames which bring no request forward: floods of resets, pings, settings, empty frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from extproc.transport.errors import ErrorCode, Http2ConnectionError

if TYPE_CHECKING:
    from extproc.transport.limits import Limits

IDLE_FRAME: Final = 10
"""A frame that makes us work or answer for nothing."""
SMALL_FRAME: Final = 5
"""A frame that honest peers send often: a WINDOW_UPDATE that frees nothing."""
EARNED: Final = 20
"""What an answered message gives back, so that a busy connection may ping and reset more."""


class Allowance:
    """Spent by the peer's idle frames, regained with time and with work; at its end the peer is told to calm down."""

    __slots__ = ("_left", "_limits")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._left = limits.allowance

    def spend(self, cost: int, what: str) -> None:
        """Raises Http2ConnectionError(ENHANCE_YOUR_CALM) when nothing is left."""
        self._left -= cost
        if self._left < 0:
            raise Http2ConnectionError(ErrorCode.ENHANCE_YOUR_CALM, f"too many frames for nothing, the last: {what}")

    def earn(self, messages: int) -> None:
        """So many messages were answered."""
        self._left += EARNED * messages

    def regain(self, passed_s: float) -> None:
        """Time has passed; also cuts what was earned beyond the budget."""
        self._left = min(self._limits.allowance, self._left + int(passed_s * self._limits.allowance_per_s))

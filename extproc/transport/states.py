"""The lives of a stream and what each frame means in each of them: RFC 9113 section 5.1 as one table.

A server without push and with replies that end a stream at once needs no "half-closed (local)": where we end first, we
also reset with NO_ERROR (section 8.1), which is the life RESET_BY_US. "Closed" is four lives, since the RFC wants
different answers depending on how a stream was closed. Frames of stream 0 are not in the table.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from extproc.transport import frames
from extproc.transport.errors import ErrorCode, Http2ConnectionError, Http2StreamError


class Life(Enum):
    """Where a stream stands."""

    IDLE = auto()
    """Never used: an identifier above every one seen, or an even one (those are ours, and we open none)."""
    OPEN = auto()
    CLIENT_DONE = auto()
    """Half-closed (remote): the request is complete, our answer is not."""
    ENDED = auto()
    """Closed by END_STREAM from both sides."""
    RESET_BY_CLIENT = auto()
    RESET_BY_US = auto()
    """The peer may not know it yet, so what it still sends is not an error."""
    FORGOTTEN = auto()
    """Closed, but skipped by the peer or so long ago that we do not know how."""


CLOSED: Final = frozenset({Life.ENDED, Life.RESET_BY_CLIENT, Life.RESET_BY_US, Life.FORGOTTEN})


class Action(Enum):
    """What to do with a frame."""

    ACCEPT = auto()
    IGNORE = auto()
    DISCARD = auto()
    """Drop the content but keep the shared state of the connection right: header table and flow control."""
    STREAM_CLOSED = auto()
    """Stream error STREAM_CLOSED."""
    LINK_CLOSED = auto()
    """Connection error STREAM_CLOSED."""
    PROTOCOL_ERROR = auto()
    """Connection error PROTOCOL_ERROR."""


_A, _I, _D = Action.ACCEPT, Action.IGNORE, Action.DISCARD
_S, _L, _P = Action.STREAM_CLOSED, Action.LINK_CLOSED, Action.PROTOCOL_ERROR

# fmt: off
_LIVES: Final = (
    Life.IDLE, Life.OPEN, Life.CLIENT_DONE, Life.ENDED, Life.RESET_BY_CLIENT, Life.RESET_BY_US, Life.FORGOTTEN
)
_ROWS: Final[dict[int, tuple[Action, ...]]] = {
    #                      idle, open, done, ended, by client, by us, forgotten
    frames.DATA:          (_P,   _A,   _S,   _L,    _S,        _D,    _S),
    frames.HEADERS:       (_A,   _A,   _S,   _L,    _S,        _D,    _P),
    frames.PRIORITY:      (_I,   _I,   _I,   _I,    _I,        _I,    _I),
    frames.RST_STREAM:    (_P,   _A,   _A,   _I,    _I,        _I,    _I),
    frames.SETTINGS:      (_P,   _P,   _P,   _P,    _P,        _P,    _P),
    frames.PUSH_PROMISE:  (_P,   _P,   _P,   _P,    _P,        _P,    _P),
    frames.PING:          (_P,   _P,   _P,   _P,    _P,        _P,    _P),
    frames.GOAWAY:        (_P,   _P,   _P,   _P,    _P,        _P,    _P),
    frames.WINDOW_UPDATE: (_P,   _A,   _A,   _I,    _I,        _I,    _I),
    frames.CONTINUATION:  (_P,   _P,   _P,   _P,    _P,        _P,    _P),
}
# fmt: on

TABLE: Final[dict[Life, dict[int, Action]]] = {
    life: {kind: row[place] for kind, row in _ROWS.items()} for place, life in enumerate(_LIVES)
}


def judge(life: Life, kind: int, stream_id: int) -> Action:
    """ACCEPT, IGNORE or DISCARD for a frame on a stream (not 0).

    Raises Http2StreamError or Http2ConnectionError where the table says so. Unknown frames are ignored (RFC 9113 5.5).
    """
    action = TABLE[life].get(kind, Action.IGNORE)
    match action:
        case Action.STREAM_CLOSED:
            raise Http2StreamError(stream_id, ErrorCode.STREAM_CLOSED, f"frame type {kind} on a stream {life.name}")
        case Action.LINK_CLOSED:
            raise Http2ConnectionError(ErrorCode.STREAM_CLOSED, f"frame type {kind} on a stream {life.name}")
        case Action.PROTOCOL_ERROR:
            raise Http2ConnectionError(ErrorCode.PROTOCOL_ERROR, f"frame type {kind} on a stream {life.name}")
        case _:
            return action

"""What one connection may take. Every number bounds memory or work that a peer could otherwise choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one connection; the defaults let one Envoy worker run at full speed."""

    max_concurrent_streams: int = 1024
    """Open streams; Envoy opens another connection when it needs more. Further ones get REFUSED_STREAM."""
    max_message_bytes: int = 262_144
    """One gRPC message. Envoy's own bound on request headers is 60 KiB; a larger message gets RESOURCE_EXHAUSTED."""
    max_header_bytes: int = 65_536
    """A header block, as sent and again as decoded (name + value + 32 for each field)."""
    max_continuations: int = 16
    """CONTINUATION frames of one header block: 64 KiB need four of them."""
    partial_bytes: int = 4_194_304
    """Unfinished messages of all streams together."""
    queued_bytes: int = 1_048_576
    """Replies that wait for the peer's flow-control windows, of all streams together."""
    connection_window_bytes: int = 1_048_576
    """What the peer may have in flight on all streams; given back as soon as it was read."""
    write_buffer_bytes: int = 262_144
    """Above this many unsent bytes nothing more is read from a peer that does not read its replies."""
    allowance: int = 10_000
    """Budget for frames that bring no request forward (see Allowance)."""
    allowance_per_s: int = 1_000
    """What the budget regains each second."""
    first_frame_s: float = 10.0
    """Time for the connection preface, for each acknowledgment of our SETTINGS, and for a begun header block."""
    idle_s: float = 900.0
    """A connection without any stream for this long is ended."""
    ping_after_s: float = 30.0
    """Silence after which the peer is asked for a sign of life."""
    ping_timeout_s: float = 20.0
    """Silence after that question which ends the connection."""
    stalled_s: float = 30.0
    """Time that a peer may leave a full write buffer unread."""

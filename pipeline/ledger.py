"""The ledger: counters, in events, that must balance whatever was killed.

For every group of a durable channel:  published = before + handled + dead + pending + lag (+ dropped)
"""

from __future__ import annotations

from pydantic import Field

from .channel import Channel
from .events import Event

__all__ = ["ChannelLedger", "GroupLedger", "Ledger", "ledger_channel"]


class GroupLedger(Event):
    """One group of one channel. `pending` was counted by walking what is held, not by subtraction."""

    before: int = 0
    """Events that preceded the group (0 when it began at the oldest)."""
    handled: int = 0
    dead: int = 0
    retried: int = 0
    duplicates_suppressed: int = 0
    pending: int = 0
    """Events held by workers, delayed, or waiting for a retry."""
    lag: int = 0
    """Events no worker has read yet."""
    dropped: int = 0
    """Events age or `drop_oldest` took from this group; on live channels, gaps seen by it."""
    consumers: int = 0
    oldest: float = 0.0
    """Seconds since the oldest held entry was written; 0 when none is held."""
    paused: bool = False
    """Its workers read nothing until it is resumed."""

    drain_seconds: float | None = None
    """Estimated time until `lag` and `pending` are handled, at the rate since the ledger that was read before this one:
    what to scale workers by. None while nothing is known of the rate."""

    def difference(self, published: int) -> int:
        """0 when the ledger balances."""
        return published - (self.before + self.handled + self.dead + self.pending + self.lag + self.dropped)


class ChannelLedger(Event):
    durable: bool = True
    published: int = 0
    """Unique event ids."""
    duplicates: int = 0
    """Repeated publishes that were recognised and not written again."""
    dropped: int = 0
    retained: int = 0
    """Stream entries (frames) kept."""
    groups: dict[str, GroupLedger] = Field(default_factory=dict)


class Ledger(Event):
    """All channels at one moment; also what `pipeline stats --json` prints."""

    time: float
    """Unix time of the server."""
    channels: dict[str, ChannelLedger]


ledger_channel: Channel[Ledger] = Channel("pipeline.ledger", Ledger, keep=900.0)

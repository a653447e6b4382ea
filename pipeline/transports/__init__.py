"""The transport contract. The comments are the specification; a conformance suite holds every transport to it.

A transport moves frames. It knows neither events nor handlers: bytes in, bytes out, and a count of events beside them.

Durable transports (`guarantees.durable`) hand each frame of a channel to every group once, remember which of its events
each group has committed, and make the outputs of a handler visible in the same step as the acknowledgement.
Live transports hand each frame to whoever listens at that moment and count what they know to be lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..channel import Channel
from ..errors import ChannelFull

__all__ = [
    "Backend",
    "CHANCES",
    "Commit",
    "Entry",
    "Group",
    "GroupStats",
    "Guarantees",
    "Holding",
    "Outgoing",
    "Output",
    "PartitionStats",
    "PayloadExpired",
    "Reader",
    "Answered",
    "Retried",
    "SUSPICION",
    "Segment",
    "Tail",
    "Transport",
    "channel_full",
]


SUSPICION = 3
"""Deliveries without a commit after which an event is suspected of killing its worker: from then on it is handed out
alone, to a reader that holds nothing else, so that no other event is blamed for the next death."""

CHANCES = 3
"""How often it is handed out alone before it is buried: where workers are killed all the time, or a busy machine lets
leases end, bad luck alone must not make a dead letter."""


class PayloadExpired(Exception):
    """A blob that a frame refers to is gone, so the frame was not written. Upload it again, and repeat."""


def channel_full(channel: Channel[Any], held: int) -> ChannelFull:
    return ChannelFull(
        f"channel {channel.name!r} holds {held} unhandled events, its capacity is {channel.capacity}; add workers, or "
        "declare overflow='wait' or 'drop_oldest'"
    )


@dataclass(frozen=True, slots=True)
class Guarantees:
    """What a transport promises, as data; tests read it."""

    durable: bool
    """Frames outlive their publisher; groups; commit; retries; replay."""
    replay: bool
    """`tail` can begin in the past."""
    counts_gaps: bool
    """A listener that misses frames knows how many events it missed (frames carry sequences)."""
    survives_restart: bool
    """What was acknowledged is there after the server was killed and restarted (as its persistence is set)."""


@dataclass(slots=True)
class Outgoing:
    """One frame to publish. `(source, first)` identify it: publishing it twice has the effect of once."""

    body: bytes
    count: int
    source: str
    first: int
    taken: bool = False
    """Set when `publish` fails: whether this frame was taken before."""


@dataclass(frozen=True, slots=True)
class Group:
    """A consumer group of a channel, as one process joins it."""

    name: str
    consumer: str
    lease: float
    """Seconds after which what this consumer holds may be claimed by others, unless renewed."""
    start: Literal["oldest", "latest"] = "oldest"
    exclusive: bool = False
    """One reader at a time, of all processes, reads a partition; what it leaves behind comes before what is new."""


@dataclass(slots=True)
class Entry:
    """One frame as a reader or a tail receives it.

    id          the stream position, or the retry id ("r…") of an event that waits apart from the stream
    count       events in it
    done        which of them are committed already: "" (none) or one "0"/"1" an event
    deliveries  1 the first time
    position    events in the stream up to and including this frame; None off the stream
    """

    id: str
    body: bytes
    count: int
    done: str = ""
    deliveries: int = 1
    position: int | None = None

    @property
    def apart(self) -> bool:
        return self.id.startswith("r")

    @property
    def origin(self) -> int:
        """The position of the frame its events came in first; 0 where there is no stream."""
        return int(self.id.partition("@")[2] or 0) if self.position is None else self.position


@dataclass(frozen=True, slots=True)
class Holding:
    """What a reader has in hand now."""

    leases: int = 0
    """Entries it has and has not settled."""
    oldest: float = 0.0
    """Seconds for which it has had the oldest of them."""
    paused: bool = False
    """It found its group paused when it last looked."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Events `low…high` (inclusive) of an entry, settled by a commit. An entry apart is settled whole."""

    entry: str
    count: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Retried:
    """An event to hand out again after `delay` seconds, to this group alone. `body` is a frame of it.

    `deliveries` it has had without being settled; from SUSPICION on it is handed out alone. `origin` is Entry.origin of
    where it comes from: a rewind to before that takes it back.
    """

    delay: float
    body: bytes
    count: int = 1
    deliveries: int = 0
    origin: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """A frame a handler's results make on another channel."""

    channel: Channel[Any]
    partition: int
    body: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer for a requester that waits at `address`."""

    address: str
    body: bytes


@dataclass(slots=True)
class Commit:
    """Everything that becomes visible together: all of it, or (when any segment was settled before) none of it."""

    segments: list[Segment] = field(default_factory=list)
    handled: int = 0
    dead: int = 0
    retried: int = 0
    retries: list[Retried] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    replies: list[Answered] = field(default_factory=list)
    uncertain: bool = False
    """Set when an answer to it was lost: where it conflicts, it may have been with itself."""


class Reader(Protocol):
    """One process's share of a group: reads, holds by lease, commits."""

    async def read(self, entries: int, wait: float) -> list[Entry]:
        """Up to about `entries` frames: new, abandoned or due ones. Returns [] after `wait` seconds without any.

        Whatever is returned is leased to this reader and renewed until it is committed, released, or lost. While the
        group is paused nothing is returned, and what is held is renewed and may be committed as ever.
        """
        ...

    async def commit(self, commit: Commit) -> list[str | None]:
        """Apply `commit`, once. Returns [] when it was applied. Otherwise nothing was written, and there is one item a
        segment: None for one that stands, else the progress ("0"/"1" an event; "" when the whole entry is settled).

        Outputs to a channel that drops its oldest events make room for themselves. Raises PayloadExpired."""
        ...

    def settled(self, entry: str) -> None:
        """Every event of the entry is committed: its lease need not be renewed any more."""
        ...

    def holding(self) -> Holding:
        """For reports, once a second."""
        ...

    def lost(self) -> list[str]:
        """Entries that another consumer has taken since the last call; stop working on them."""
        ...

    async def release(self, entries: Sequence[str]) -> None:
        """Hand entries back, uncommitted: another reader of the group may have them at once."""
        ...

    async def stop(self) -> None:
        """End a `read` in progress at once and let it return what it has. Further reads return []."""
        ...

    async def close(self) -> None:
        """Give up the connection. What is still held comes free when its lease ends."""
        ...


class Tail(Protocol):
    """A fan-out read that disturbs nobody: no group, no acknowledgement."""

    @property
    def dropped(self) -> int:
        """Events known to be lost to this tail so far."""
        ...

    def __aiter__(self) -> AsyncIterator[Entry]: ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Moves frames for one Redis database (or for memory)."""

    @property
    def guarantees(self) -> Guarantees: ...

    async def publish(self, channel: Channel[Any], partition: int, frames: Sequence[Outgoing]) -> None:
        """Resolves when all frames are taken, in order, each once.

        Raises ChannelFull, PayloadExpired, PublishUncertain, ServerUnavailable."""
        ...

    async def full(self, channel: Channel[Any], partition: int) -> bool:
        """Whether the group furthest behind has not settled as much as the capacity; who publishes there takes nothing
        new then."""
        ...

    async def join(self, channel: Channel[Any], partition: int, group: Group) -> Reader:
        """Join a group, creating it where there is none."""
        ...

    async def tail(self, channel: Channel[Any], partition: int, since: str | None) -> Tail:
        """Listen from now (since=None) or from a position; listening has begun when this returns."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GroupStats:
    """Counts of one group in one partition, in events; see pipeline.ledger."""

    before: int
    handled: int
    dead: int
    retried: int
    suppressed: int
    dropped: int
    pending: int
    lag: int
    consumers: int
    oldest: float
    paused: bool = False


@dataclass(frozen=True, slots=True)
class PartitionStats:
    published: int
    duplicates: int
    entries: int
    groups: dict[str, GroupStats]


class PayloadStore(Protocol):
    """What a backend knows of tensors that travel beside their frames; see pipeline.payloads."""

    @property
    def same_host(self) -> bool:
        """The URL says that Redis, and so most likely everybody, is on this host."""
        ...

    async def deployment(self) -> str:
        """16 hex digits that are this database's own."""
        ...

    async def announce(self, channel: str, host: str) -> None:
        """For a minute from now, this host reads the channel."""
        ...

    async def hosts(self, channel: str) -> set[str]: ...

    async def collect(self, channel: str, partition: int, owner: str, asked: Sequence[str]) -> list[str]:
        """Forget payloads that every group is past. Returns those of the owner's, and of `asked`, that nobody needs."""
        ...

    def place(self, channel: str, partition: int) -> str:
        """What the keys of a partition's blobs begin with."""
        ...

    async def upload(self, place: str, name: str, chunks: Sequence[Sequence[memoryview]]) -> None:
        """Each chunk a list of parts, written one after the other. `place`: of a partition, or where an answer goes."""
        ...

    async def download(self, place: str, name: str, chunks: int, *, last: bool = False) -> list[bytes | None]:
        """The chunks of a blob, None where one is gone; deleted by the `last` who reads it."""
        ...


class Backend(Protocol):
    """One Redis database (or memory): its two transports, and the few things beside them."""

    @property
    def durable(self) -> Transport: ...

    @property
    def live(self) -> Transport: ...

    @property
    def payloads(self) -> PayloadStore | None:
        """None: tensors travel inside their frames."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the server was there when it was last needed."""
        ...

    async def open(self, patience: float | None) -> None:
        """Connect. Raises ServerUnavailable after `patience` seconds (None: waits for ever)."""
        ...

    async def replies(self, address: str, wait: float) -> list[bytes]:
        """Take the answers that have come for `address`; [] after `wait` seconds without one."""
        ...

    async def register(self, name: str, record: bytes) -> bytes | None:
        """Remember a channel's description, unless it is known as another: not as durable, or of other partitions.

        Returns what was known of it before."""
        ...

    async def record(self, name: str, patience: float = 0.0) -> bytes | None:
        """A channel's description, if it is registered. For so many seconds a server that is away is waited for."""
        ...

    async def registered(self) -> dict[str, bytes]:
        """Every channel's description."""
        ...

    async def ledger(self, channels: Mapping[str, tuple[bool, int]]) -> tuple[float, dict[str, list[PartitionStats]]]:
        """The server's time, and for each channel (durable?, partitions) the counts of each partition."""
        ...

    async def settle_letter(
        self, channel: str, partition: int, group: str, letter: str, again: Retried | None, ttl: float
    ) -> bool:
        """Hand a dead letter out `again`, or (None) drop it. False when it was settled before."""
        ...

    async def settled_letters(self, channel: str, partition: int, group: str) -> set[str]:
        """Ids of the dead letters that were replayed or dropped."""
        ...

    async def rewind(self, channel: str, partition: int, group: str, position: str) -> int:
        """Let a group read again what follows a position. Returns the events now unread."""
        ...

    async def newest(self, channel: str, partition: int, most: int, below: str | None) -> list[Entry]:
        """Frames that a durable channel keeps, the newest first: at most so many, older than `below`."""
        ...

    async def pause(self, channel: str, partition: int, group: str, paused: bool) -> bool:
        """Let a durable group's readers read nothing until told to go on; it lasts as long as the group.

        They notice within 0.1 s. False when it was so before. Raises ConfigurationError when there is no such group."""
        ...

    async def dropped(self, channel: str, group: str, count: int) -> None:
        """Count events a live group is known to have missed."""
        ...

    async def turn(self, name: str, holder: str, seconds: float) -> bool:
        """True for the one caller, of all processes, whose turn it is."""
        ...

    async def close(self) -> None: ...

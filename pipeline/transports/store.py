"""What the in-memory backend keeps: the rules of the Lua scripts, in Python, under one lock."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..channel import Channel
from ..errors import ConfigurationError
from . import SUSPICION, Commit, Entry, GroupStats, Outgoing, PartitionStats, Retried, Segment, channel_full
from .client import LinkLost

__all__ = ["Clock", "Faults", "Partition", "Position", "Store", "parse"]

Position = tuple[int, int]
"""(milliseconds, events up to and including): an entry id, in the order of the stream."""


class Clock:
    """The time the store goes by: leases, due times, ages. `advance` moves it on, beside real time."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def now(self) -> float:
        return time.time() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


class Faults:
    """Faults to come, by operation: `publish`, `commit`, `read`. Each happens once."""

    def __init__(self) -> None:
        self._lost: dict[str, int] = {}
        self._unanswered: dict[str, int] = {}

    def lose(self, operation: str, times: int = 1) -> None:
        """The connection breaks before the operation reaches the store."""
        self._lost[operation] = self._lost.get(operation, 0) + times

    def drop_reply(self, operation: str, times: int = 1) -> None:
        """The operation is done, and its answer is lost."""
        self._unanswered[operation] = self._unanswered.get(operation, 0) + times

    def run(self, operation: str, work: Callable[[], Any]) -> Any:
        if self._take(self._lost, operation):
            raise LinkLost(f"injected: {operation} was not sent")
        result = work()
        if self._take(self._unanswered, operation):
            raise LinkLost(f"injected: the answer to {operation} was lost")
        return result

    @staticmethod
    def _take(faults: dict[str, int], operation: str) -> bool:
        if not faults.get(operation):
            return False
        faults[operation] -= 1
        return True


@dataclass(slots=True)
class _Pending:
    consumer: str
    since: float
    deliveries: int


@dataclass(slots=True)
class _Due:
    at: float
    body: bytes
    count: int
    taken: int
    origin: int


@dataclass
class _Group:
    before: int
    last: Position
    handled: int = 0
    dead: int = 0
    retried: int = 0
    suppressed: int = 0
    dropped: int = 0
    rid: int = 0
    paused: bool = False
    pending: dict[Position, _Pending] = field(default_factory=dict)
    progress: dict[Position, str] = field(default_factory=dict)
    due: dict[str, _Due] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    consumers: set[str] = field(default_factory=set)

    def behind(self, published: int) -> int:
        return published - self.before - self.handled - self.dead - self.dropped

    def wait(self, now: float, retry: Retried) -> None:
        self.rid += 1
        due = _Due(now + retry.delay, retry.body, retry.count, retry.deliveries, retry.origin)
        self.due[f"r{self.rid}x{retry.count}@{retry.origin}"] = due


class Partition:
    """A stream and its groups."""

    def __init__(self, clock: Clock) -> None:
        self.entries: list[tuple[Position, int, bytes]] = []
        self.published = 0
        self.duplicates = 0
        self.groups: dict[str, _Group] = {}
        self._clock = clock
        self._sources: dict[str, int] = {}
        self._newest: Position = (0, 0)
        self._size = 0.0
        """Mean bytes of an event of late."""

    # -- writing -------------------------------------------------------------------------------------------------

    def add(self, count: int, body: bytes) -> None:
        self.published += count
        size = len(body) / count
        self._size += (size - self._size) / 16 if self._size else size
        self._newest = (max(int(self._clock.now() * 1000), self._newest[0]), self.published)
        self.entries.append((self._newest, count, body))

    def publish(self, frame: Outgoing, channel: Channel[Any]) -> bool:
        """False when the channel is full and the publisher is to wait. Raises ChannelFull."""
        last = self._sources.get(frame.source, 0)
        if last >= frame.first + frame.count - 1:
            self.duplicates += frame.count
            return True
        if channel.drops_oldest:
            self.drop_oldest(channel.limit, frame.count)
        elif channel.limit and (held := self.outstanding()) and held + frame.count > self.in_events(channel.limit):
            if channel.overflow == "raise":
                raise channel_full(channel, held)
            return False
        self.add(frame.count, frame.body)
        self._sources[frame.source] = frame.first + frame.count - 1
        return True

    def outstanding(self) -> int:
        return max((group.behind(self.published) for group in self.groups.values()), default=self.published)

    def in_events(self, limit: int | str) -> int:
        """See add.lua."""
        return limit if isinstance(limit, int) else max(1, int(int(limit.removesuffix("B")) / (self._size or 1)))

    def drop_oldest(self, limit: int | str, count: int) -> None:
        """Make room for `count` more events: skip the oldest unread frames of groups too far behind. See add.lua."""
        most = self.in_events(limit) - count
        for group in self.groups.values():
            for position, events, _ in self.entries:
                if group.behind(self.published) <= most:
                    break
                if position > group.last:
                    group.last = position
                    group.dropped += events

    # -- groups --------------------------------------------------------------------------------------------------

    def join(self, name: str, start: str, consumer: str) -> None:
        if name not in self.groups:
            oldest = self.entries[0] if self.entries and start == "oldest" else None
            before = oldest[0][1] - oldest[1] if oldest else self.published
            self.groups[name] = _Group(before, (0, 0) if oldest else self._newest)
        self.groups[name].consumers.add(consumer)

    def read(self, name: str, consumer: str, most: int) -> list[Entry]:
        group = self.groups[name]
        found: list[Entry] = []
        for position, count, body in self.entries:
            if position > group.last and len(found) < most:
                group.last = position
                group.pending[position] = _Pending(consumer, self._clock.now(), 1)
                found.append(_entry(position, count, body))
        return found

    def take_due(self, name: str, lease: float, most: int, empty: bool) -> tuple[list[Entry], bool]:
        """Due events; and whether suspects wait for an empty hand. See take.lua."""
        group, now = self.groups[name], self._clock.now()
        found: list[Entry] = []
        waiting = False
        for rid, due in sorted(group.due.items(), key=lambda item: item[1].at)[:most]:
            if due.at > now:
                break
            suspect = due.taken >= SUSPICION
            if suspect and not (empty and not found):
                waiting = True
                continue
            due.at, due.taken = now + lease, due.taken + 1
            found.append(Entry(rid, due.body, due.count, deliveries=due.taken))
            if suspect:
                return found, True
        return found, waiting

    def claim(self, name: str, consumer: str, lease: float, most: int) -> list[Entry]:
        group, now = self.groups[name], self._clock.now()
        bodies = {position: (count, body) for position, count, body in self.entries}
        found: list[Entry] = []
        for position, pending in sorted(group.pending.items()):
            if now - pending.since >= lease and len(found) < most and position in bodies:
                pending.consumer, pending.since, pending.deliveries = consumer, now, pending.deliveries + 1
                done = group.progress.get(position, "")
                found.append(_entry(position, *bodies[position], done, pending.deliveries))
        return found

    def renew(self, name: str, consumer: str, lease: float, held: list[str]) -> list[str]:
        """Ids that are no longer this consumer's."""
        group, now = self.groups.get(name), self._clock.now()
        lost = []
        for id_ in held:
            pending = group.pending.get(parse(id_)) if group and not id_.startswith("r") else None
            due = group.due.get(id_) if group else None
            if pending is not None and pending.consumer == consumer:
                pending.since = now
            elif due is not None:
                due.at = now + lease
            else:
                lost.append(id_)
        return lost

    def release(self, name: str, consumer: str, ids: list[str]) -> None:
        group = self.groups[name]
        for id_ in ids:
            if id_ in group.due:
                group.due[id_].at = self._clock.now()
                group.due[id_].taken -= 1
                continue
            pending = None if id_.startswith("r") else group.pending.get(parse(id_))
            if pending is not None and pending.consumer == consumer:
                pending.since, pending.deliveries = float("-inf"), pending.deliveries - 1

    # -- commit --------------------------------------------------------------------------------------------------

    def check(self, name: str, segments: list[Segment]) -> list[str | None]:
        """[] when all stand; else what each conflicts with, counted as suppressed."""
        group = self.groups[name]
        statuses: list[str | None] = []
        suppressed = 0
        for segment in segments:
            if segment.entry.startswith("r"):
                gone = segment.entry not in group.due
                suppressed += segment.count if gone else 0
                statuses.append("" if gone else None)
                continue
            position = parse(segment.entry)
            done = group.progress.get(position, "")
            marked = done[segment.low : segment.high + 1].count("1")
            if position not in group.pending:
                suppressed += segment.high - segment.low + 1
                statuses.append("")
            else:
                suppressed += marked
                statuses.append(done if marked else None)
        group.suppressed += suppressed
        return statuses if any(status is not None for status in statuses) else []

    def settle(self, name: str, commit: Commit) -> None:
        group, now = self.groups[name], self._clock.now()
        for segment in commit.segments:
            if segment.entry.startswith("r"):
                del group.due[segment.entry]
                continue
            position = parse(segment.entry)
            done = list(group.progress.get(position) or "0" * segment.count)
            done[segment.low : segment.high + 1] = "1" * (segment.high - segment.low + 1)
            group.progress[position] = "".join(done)
            if "0" not in done:
                del group.pending[position]
                del group.progress[position]
        self.count(name, commit)
        for retry in commit.retries:
            group.wait(now, retry)

    def count(self, name: str, commit: Commit) -> None:
        group = self.groups[name]
        group.handled += commit.handled
        group.dead += commit.dead
        group.retried += commit.retried

    # -- looking after -------------------------------------------------------------------------------------------

    def settle_letter(self, name: str, letter: str, again: Retried | None) -> bool:
        """See replay.lua."""
        group = self.groups.get(name)
        if group is None or letter in group.settled:
            return False
        if again is not None:
            if group.dead >= again.count:
                group.dead -= again.count
            elif group.handled >= again.count:
                group.handled -= again.count
            else:
                return False
            group.wait(self._clock.now(), again)
        group.settled.add(letter)
        return True

    def pause(self, name: str, paused: bool) -> bool:
        """See pause.lua."""
        group = self.groups.get(name)
        if group is None:
            raise ConfigurationError(f"no group {name!r}")
        before, group.paused = group.paused, paused
        return before != paused

    def rewind(self, name: str, to: Position) -> int:
        """See rewind.lua."""
        group = self.groups.get(name)
        if group is None:
            raise ConfigurationError(f"no group {name!r}")
        later = [(position, count) for position, count, _ in self.entries if position > to]
        target = later[0][0][1] - later[0][1] if later else self.published
        current = max(group.before, group.last[1])
        if target >= current:
            return self.published - current
        undone = 0
        counts = {position: count for position, count, _ in self.entries}
        for position in [position for position in group.pending if position > to]:
            undone += counts[position] - group.progress.pop(position, "").count("1")
            del group.pending[position]
        for rid in [rid for rid, due in group.due.items() if due.origin > target]:
            undone += group.due.pop(rid).count
        earlier = [position for position, _, _ in self.entries if position <= to]
        group.last = earlier[-1] if earlier else (0, target)
        back = current - max(group.before, target) - undone
        group.before = min(group.before, target)
        from_handled = min(back, group.handled)
        group.handled -= from_handled
        from_dead = min(back - from_handled, group.dead)
        group.dead -= from_dead
        group.dropped -= back - from_handled - from_dead
        return self.published - target

    def trim(self, keep: float) -> int:
        """See trim.lua."""
        if not self.entries:
            return 0
        low = min(self.entries[-1][0], (int((self._clock.now() - keep) * 1000), 0))
        for group in self.groups.values():
            low = min(low, *group.pending) if group.pending else min(low, (group.last[0], group.last[1] + 1))
        before = len(self.entries)
        self.entries = [entry for entry in self.entries if entry[0] >= low]
        return before - len(self.entries)

    def stats(self) -> PartitionStats:
        counts = {position: count for position, count, _ in self.entries}
        return PartitionStats(
            self.published,
            self.duplicates,
            len(self.entries),
            {name: self._group_stats(group, counts) for name, group in self.groups.items()},
        )

    def _group_stats(self, group: _Group, counts: dict[Position, int]) -> GroupStats:
        held = sum(counts.get(position, 0) - group.progress.get(position, "").count("1") for position in group.pending)
        oldest = min((position[0] / 1000 for position in group.pending), default=None)
        return GroupStats(
            before=group.before,
            handled=group.handled,
            dead=group.dead,
            retried=group.retried,
            suppressed=group.suppressed,
            dropped=group.dropped,
            pending=held + sum(due.count for due in group.due.values()),
            lag=self.published - max(group.before, group.last[1]),
            consumers=len(group.consumers),
            oldest=0.0 if oldest is None else self._clock.now() - oldest,
            paused=group.paused,
        )

    def after(self, position: Position) -> list[Entry]:
        return [_entry(where, count, body) for where, count, body in self.entries if where > position]

    def newest_entries(self, most: int, below: Position | None) -> list[Entry]:
        older = (entry for entry in reversed(self.entries) if below is None or entry[0] < below)
        return [_entry(*entry) for entry in itertools.islice(older, most)]

    @property
    def newest(self) -> Position:
        return self._newest


class Store:
    """Everything of one memory:// URL."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.faults = Faults()
        self.lock = threading.RLock()
        self.channels: dict[str, bytes] = {}
        self.replies: dict[str, deque[bytes]] = {}
        self.listeners: dict[str, list[Callable[[bytes], None]]] = {}
        self.owners: dict[tuple[str, str], dict[int, str]] = {}
        """Of an ordered group, by channel and name: who reads which partition."""
        self.turns: dict[str, float] = {}
        self.users = 0
        self._partitions: dict[tuple[str, int], Partition] = {}

    def partition(self, channel: str, partition: int = 0) -> Partition:
        return self._partitions.setdefault((channel, partition), Partition(self.clock))

    def tell(self, channel: str, body: bytes) -> None:
        for put in self.listeners.get(channel, []):
            put(body)

    def expire_leases(self) -> None:
        """Every lease ends now, as if all workers had stalled."""
        with self.lock:
            for partition in self._partitions.values():
                for group in partition.groups.values():
                    for pending in group.pending.values():
                        pending.since = float("-inf")

    def flush(self) -> None:
        """Forget everything, as FLUSHALL does."""
        with self.lock:
            self._partitions.clear()
            self.channels.clear()
            self.owners.clear()


def parse(id_: str) -> Position:
    ms, _, offset = id_.partition("-")
    return int(ms), int(offset)


def _entry(position: Position, count: int, body: bytes, done: str = "", deliveries: int = 1) -> Entry:
    return Entry(f"{position[0]}-{position[1]}", body, count, done, deliveries, position[1])

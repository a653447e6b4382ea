"""One suite for every transport, driven by what it promises: memory, streams, and Pub/Sub with both of its clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import redis

from pipeline import Channel
from pipeline.errors import ConfigurationError
from pipeline.ledger import GroupLedger
from pipeline.transports import Answered, Backend, Commit, Entry, Group, GroupStats, Outgoing, Output, Retried, Segment
from pipeline.transports.client import ReplyError
from pipeline.transports.memory import MemoryBackend
from pipeline.transports.redis import RedisBackend

FRAME = 4
LEASE = 0.3


@dataclass
class Place:
    """A transport under test, and the backend it belongs to."""

    backend: Backend
    channel: Channel[Any]
    url: str

    @property
    def transport(self) -> Any:
        return self.backend.durable if self.channel.durable else self.backend.live

    async def publish(self, first: int, count: int = FRAME, *, source: str = "s") -> None:
        body = f"{source}:{first}+{count}".encode()
        await self.transport.publish(self.channel, 0, [Outgoing(body, count, source, first)])

    async def join(self, consumer: str = "a", group: str = "g", **options: Any) -> Any:
        return await self.transport.join(self.channel, 0, replace(Group(group, consumer, LEASE), **options))

    async def stats(self, group: str = "g") -> GroupStats:
        """The group's counts, which must balance."""
        _, found = await self.backend.ledger({self.channel.name: (True, 1)})
        (part,) = found[self.channel.name]
        one = part.groups[group]
        ledger = GroupLedger(
            before=one.before, handled=one.handled, dead=one.dead, pending=one.pending, lag=one.lag, dropped=one.dropped
        )
        assert ledger.difference(part.published) == 0, f"{one} of {part.published} published"
        return one


DURABLE = ["memory", "valkey", "redis7"]
LIVE = ["memory", "valkey", "redis7", "asyncio-redis"]


@pytest.fixture(params=[*((kind, True) for kind in DURABLE), *((kind, False) for kind in LIVE)], ids=str)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Every transport."""
    async with opened(request, *request.param) as found:
        yield found


@pytest.fixture(params=DURABLE)
async def durable(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Those that promise to be durable."""
    async with opened(request, request.param, True) as found:
        assert found.transport.guarantees.durable
        yield found


@asynccontextmanager
async def opened(request: pytest.FixtureRequest, kind: str, durable: bool) -> AsyncIterator[Place]:
    if kind == "memory":
        url = f"memory://conformance-{id(request)}"
        backend: Any = MemoryBackend.at(url)
    else:
        url = request.getfixturevalue("redis7" if kind == "redis7" else "valkey").url
        with redis.Redis.from_url(url) as client:
            client.flushall()
        backend = RedisBackend(url, "conformance", "asyncio-redis" if kind == "asyncio-redis" else "redis")
    await backend.open(1.0)
    yield Place(backend, Channel("c", bytes, durable=durable), url)
    await backend.close()


async def take(reader: Any, count: int, wait: float = 2.0) -> list[Entry]:
    """Read until so many frames came."""
    found: list[Entry] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            found += await reader.read(count - len(found), wait)
    return found


def whole(entry: Entry) -> Segment:
    return Segment(entry.id, entry.count, 0, entry.count - 1)


# -- every transport ---------------------------------------------------------------------------------------------


async def test_frames_arrive_in_order_as_they_were_written(place: Place) -> None:
    reader = await place.join()
    for first in range(1, 40, FRAME):
        await place.publish(first)
    found = await take(reader, 10)
    assert [entry.body for entry in found] == [f"s:{first}+4".encode() for first in range(1, 40, FRAME)]
    await reader.close()


async def test_a_tail_listens_from_when_it_was_opened_and_disturbs_nobody(place: Place) -> None:
    await place.publish(1)
    reader = await place.join(start="latest")
    tail = await place.transport.tail(place.channel, 0, None)
    await place.publish(5)
    async with asyncio.timeout(5):
        assert (await anext(aiter(tail))).body == b"s:5+4"
    assert [entry.body for entry in await take(reader, 1)] == [b"s:5+4"]
    await tail.close()
    await reader.close()


async def test_a_read_ends_empty_after_its_time_and_at_once_when_stopped(place: Place) -> None:
    reader = await place.join()
    assert await reader.read(1, 0.05) == []
    waiting = asyncio.create_task(reader.read(1, 30.0))
    await asyncio.sleep(0.02)
    await reader.stop()
    async with asyncio.timeout(0.5):
        assert await waiting == []
    await reader.close()


async def test_what_is_retried_comes_again_when_it_is_due(place: Place) -> None:
    reader = await place.join()
    await place.publish(1)
    (entry,) = await take(reader, 1)
    segments = [whole(entry)] if place.channel.durable else []
    assert await reader.commit(Commit(segments, handled=3, retried=1, retries=[Retried(0.1, b"again")])) == []
    (again,) = await take(reader, 1)
    assert (again.body, again.apart, again.count) == (b"again", True, 1)
    await reader.close()


async def test_outputs_and_replies_appear_with_the_commit(place: Place) -> None:
    reader = await place.join()
    output, heard = Channel("out", bytes), Channel("heard", bytes, durable=False)
    there = await place.backend.durable.join(output, 0, Group("g", "b", LEASE))
    listening = await place.backend.live.tail(heard, 0, None)
    await place.publish(1)
    (entry,) = await take(reader, 1)
    commit = Commit([whole(entry)] if place.channel.durable else [], handled=4)
    commit.outputs = [Output(output, 0, b"result", 2), Output(heard, 0, b"news", 1)]
    commit.replies = [Answered("pipeline:reply:x", b"answer")]
    assert await reader.commit(commit) == []
    (result,) = await take(there, 1)
    assert (result.body, result.count, result.position) == (b"result", 2, 2)
    async with asyncio.timeout(5):
        assert (await anext(aiter(listening))).body == b"news"
    assert await place.backend.replies("pipeline:reply:x", 1.0) == [b"answer"]
    await listening.close()
    for one in (reader, there):
        await one.close()


# -- durable transports ------------------------------------------------------------------------------------------


async def test_a_repeated_publish_is_dropped_and_a_gap_is_forced_through(durable: Place) -> None:
    reader = await durable.join()
    await durable.publish(1)
    await durable.publish(1)
    await durable.publish(1, source="other")
    await durable.publish(21)  # 5…20 were lost with the server's memory
    found = await take(reader, 3)
    assert [entry.body for entry in found] == [b"s:1+4", b"other:1+4", b"s:21+4"]
    assert (await durable.stats()).pending == 12
    await reader.close()


async def test_groups_get_everything_and_consumers_share_it(durable: Place) -> None:
    one, two, other = await durable.join("a"), await durable.join("b"), await durable.join("a", "other")
    for first in range(1, 9, FRAME):
        await durable.publish(first)
    shared = [*await take(one, 1), *await take(two, 1)]
    assert len({entry.id for entry in shared}) == 2
    assert len(await take(other, 2)) == 2
    for reader in (one, two, other):
        await reader.close()


async def test_progress_inside_a_frame_survives_its_worker(durable: Place) -> None:
    one, two = await durable.join("a"), await durable.join("b")
    await durable.publish(1)
    (entry,) = await take(one, 1)
    assert await one.commit(Commit([Segment(entry.id, 4, 1, 2)], handled=2)) == []
    assert (await durable.stats()).pending == 2
    await stall(durable, one)
    (again,) = await take(two, 1)
    assert (again.id, again.done, again.deliveries) == (entry.id, "0110", 2)
    assert await two.commit(Commit([Segment(entry.id, 4, 0, 0), Segment(entry.id, 4, 3, 3)], handled=2)) == []
    stats = await durable.stats()
    assert (stats.handled, stats.pending, stats.lag) == (4, 0, 0)
    for reader in (one, two):
        await reader.close()


async def stall(place: Place, reader: Any) -> None:
    """End a reader's leases as if its process had been stopped."""
    if isinstance(place.backend, MemoryBackend):
        place.backend.store.expire_leases()
    else:
        reader._streams.renewer.discard(reader)
        await asyncio.sleep(LEASE * 1.1)


async def test_the_first_to_finish_wins_and_the_late_one_writes_nothing(durable: Place) -> None:
    one, two = await durable.join("a"), await durable.join("b")
    output = Channel("out", bytes)
    await durable.publish(1)
    await durable.publish(5)
    first, second = await take(one, 2)
    await stall(durable, one)
    again = await take(two, 2)
    assert await two.commit(Commit([whole(again[0])], handled=4, outputs=[Output(output, 0, b"two", 4)])) == []
    late = Commit([whole(first), whole(second)], handled=8, outputs=[Output(output, 0, b"one", 8)])
    assert await one.commit(late) == ["", None]
    stats = await durable.stats()
    assert (stats.handled, stats.suppressed, stats.pending) == (4, 4, 4)
    _, found = await durable.backend.ledger({"out": (True, 1)})
    assert found["out"][0].published == 4
    assert await one.commit(Commit([whole(second)], handled=4)) == [], "what stands may still be committed, by anyone"
    for reader in (one, two):
        await reader.close()


async def test_a_held_entry_is_renewed(durable: Place) -> None:
    one, two = await durable.join("a"), await durable.join("b")
    await durable.publish(1)
    (entry,) = await take(one, 1)
    for _ in range(10):
        await one.read(1, 0.05)
        assert await two.read(1, 0.02) == []
    assert await one.commit(Commit([whole(entry)], handled=4)) == []
    for reader in (one, two):
        await reader.close()


async def test_what_is_handed_back_is_taken_over_at_once(durable: Place) -> None:
    one, two = await durable.join("a", lease=30.0), await durable.join("b", lease=30.0)
    await two.read(1, 0.01)
    await durable.publish(1)
    (entry,) = await take(one, 1)
    await one.release([entry.id])
    async with asyncio.timeout(0.5):
        (again,) = await take(two, 1)
    assert (again.id, again.deliveries) == (entry.id, 1), "handing back is no delivery that failed"
    for reader in (one, two):
        await reader.close()


async def test_retries_stay_in_their_group_and_count_as_pending(durable: Place) -> None:
    one, other = await durable.join("a"), await durable.join("a", "other")
    await durable.publish(1)
    (entry,) = await take(one, 1)
    await take(other, 1)
    assert await one.commit(Commit([whole(entry)], handled=3, retried=1, retries=[Retried(0.0, b"again")])) == []
    stats = await durable.stats()
    assert (stats.handled, stats.retried, stats.pending) == (3, 1, 1)
    (again,) = await take(one, 1)
    assert await other.read(1, 0.15) == []
    assert await one.commit(Commit([Segment(again.id, 1, 0, 0)], dead=1)) == []
    assert await one.commit(Commit([Segment(again.id, 1, 0, 0)], dead=1)) == [""]
    assert (await durable.stats()).dead == 1
    for reader in (one, other):
        await reader.close()


async def test_retries_due_at_one_time_come_in_their_order(durable: Place) -> None:
    reader = await durable.join()
    await durable.publish(1, 12)
    (entry,) = await take(reader, 1)
    bodies = [b"%d" % n for n in range(12)]
    await reader.commit(Commit([whole(entry)], retried=12, retries=[Retried(0.0, body) for body in bodies]))
    assert [again.body for again in await take(reader, 12)] == bodies
    await reader.close()


async def test_a_group_begins_at_the_oldest_or_the_latest(durable: Place) -> None:
    await durable.publish(1)
    old, new = await durable.join(group="old"), await durable.join(group="new", start="latest")
    await durable.publish(5)
    assert len(await take(old, 2)) == 2
    assert [entry.body for entry in await take(new, 1)] == [b"s:5+4"]
    assert ((await durable.stats("old")).before, (await durable.stats("new")).before) == (0, 4)
    for reader in (old, new):
        await reader.close()


async def test_a_dead_letter_is_settled_once(durable: Place) -> None:
    reader = await durable.join()
    await durable.publish(1)
    (entry,) = await take(reader, 1)
    await reader.commit(Commit([whole(entry)], handled=3, dead=1))
    settle = durable.backend.settle_letter
    assert await settle("c", 0, "g", "letter:1", Retried(0.0, b"again"), 60.0)
    assert not await settle("c", 0, "g", "letter:1", Retried(0.0, b"again"), 60.0)
    stats = await durable.stats()
    assert (stats.dead, stats.pending) == (0, 1)
    assert (await take(reader, 1))[0].body == b"again"
    assert await durable.backend.settled_letters("c", 0, "g") == {"letter:1"}
    await reader.close()


async def test_a_paused_group_reads_nothing_new_due_or_abandoned_and_may_commit_what_it_holds(durable: Place) -> None:
    one, two = await durable.join("a"), await durable.join("b")
    await durable.publish(1)
    await durable.publish(5)
    first, second = await take(one, 2)
    assert await durable.backend.pause("c", 0, "g", True)
    assert not await durable.backend.pause("c", 0, "g", True), "it is paused already"
    assert [await reader.read(1, 0.1) for reader in (one, two)] == [[], []]
    assert await one.commit(Commit([whole(first)], handled=3, retried=1, retries=[Retried(0.0, b"again")])) == []
    one.settled(first.id)
    await durable.publish(9)
    for _ in range(3):
        assert await one.read(4, 0.1) == []
    assert one.holding().paused
    assert one.holding().leases == 1
    assert 0 < one.holding().oldest < 5
    await stall(durable, one)
    assert await two.read(4, 0.3) == [], "an abandoned entry waits too"
    late = await durable.join("c")
    assert await late.read(4, 0.1) == [], "and a reader that comes later finds the group paused"
    stats = await durable.stats()
    assert (stats.paused, stats.handled, stats.pending, stats.lag) == (True, 3, 5, 4)
    assert await durable.backend.pause("c", 0, "g", False)
    assert not await durable.backend.pause("c", 0, "g", False)
    found = await take(late, 3)
    assert {entry.body for entry in found} == {b"again", second.body, b"s:9+4"}
    stats = await durable.stats()
    assert (stats.paused, stats.lag) == (False, 0)
    for reader in (one, two, late):
        await reader.close()


async def test_only_a_group_there_is_can_be_paused_and_it_alone(durable: Place) -> None:
    reader, other = await durable.join(), await durable.join(group="other")
    with pytest.raises(ConfigurationError, match="no group 'nobody'"):
        await durable.backend.pause("c", 0, "nobody", True)
    await durable.backend.pause("c", 0, "g", True)
    assert await reader.read(1, 0.1) == []
    await durable.publish(1)
    assert len(await take(other, 1)) == 1
    assert await reader.read(1, 0.15) == []
    for one in (reader, other):
        await one.close()


async def test_a_rewound_group_reads_again_and_balances(durable: Place) -> None:
    reader = await durable.join()
    for first in (1, 5, 9):
        await durable.publish(first)
    first, second, third = await take(reader, 3)
    await reader.commit(Commit([whole(first), whole(second)], handled=8))
    assert await durable.backend.rewind("c", 0, "g", first.id) == 8
    stats = await durable.stats()
    assert (stats.handled, stats.pending, stats.lag) == (4, 0, 8)
    again = await take(reader, 2)
    assert [entry.body for entry in again] == [second.body, third.body]
    await reader.close()


async def test_a_rewind_over_dropped_events_balances(durable: Place) -> None:
    reader = await durable.join()
    bounded = Channel("c", bytes, capacity=8, overflow="drop_oldest")
    for first in range(1, 40, FRAME):
        await durable.transport.publish(bounded, 0, [Outgoing(b"%d" % first, FRAME, "s", first)])
    assert (await durable.stats()).dropped == 32
    (entry,) = await take(reader, 1)
    await reader.commit(Commit([whole(entry)], handled=3, dead=1))
    assert await durable.backend.rewind("c", 0, "g", "0-0") == 40
    stats = await durable.stats()
    assert (stats.handled, stats.dead, stats.dropped, stats.lag) == (0, 0, 0, 40)
    await reader.close()


async def test_outputs_make_room_where_a_channel_drops_its_oldest(durable: Place) -> None:
    bounded = Channel("out", bytes, capacity=2 * FRAME, overflow="drop_oldest")
    behind = await durable.transport.join(bounded, 0, Group("g", "slow", 5.0))
    reader = await durable.join()
    await durable.publish(1)
    (entry,) = await take(reader, 1)
    outputs = [Output(bounded, 0, b"%d" % n, FRAME) for n in range(5)]
    assert await reader.commit(Commit([whole(entry)], handled=FRAME, outputs=outputs)) == []
    assert [found.body for found in await take(behind, 2)] == [b"3", b"4"]
    _, ledger = await durable.backend.ledger({"out": (True, 1)})
    stats = ledger["out"][0]
    assert (stats.published, stats.groups["g"].dropped, stats.groups["g"].pending) == (5 * FRAME, 3 * FRAME, 2 * FRAME)
    await behind.close()
    await reader.close()


async def test_a_tail_can_begin_in_the_past(durable: Place) -> None:
    assert durable.transport.guarantees.replay
    await durable.publish(1)
    await durable.publish(5)
    tail = await durable.transport.tail(durable.channel, 0, "0-0")
    entries = aiter(tail)
    async with asyncio.timeout(5):
        assert [(await anext(entries)).position for _ in range(2)] == [4, 8]
    await entries.aclose()
    await tail.close()


async def test_a_letter_whose_death_the_group_knows_no_more_cannot_be_replayed_and_stays(durable: Place) -> None:
    """The group has expired and was made anew since."""
    reader = await durable.join()
    letter = ("c", 0, "g", "letter")
    assert not await durable.backend.settle_letter(*letter, Retried(0.0, b"x"), 60.0)
    assert await durable.backend.settled_letters("c", 0, "g") == set()
    assert await durable.backend.settle_letter(*letter, None, 60.0), "dropping it needs no group"
    await reader.close()
    assert not await durable.backend.settle_letter("c", 0, "none", "letter", Retried(0.0, b"x"), 60.0)


# -- memory alone ------------------------------------------------------------------------------------------------


async def test_what_changes_a_store_in_memory_holds_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines of several threads may share it."""
    backend = MemoryBackend.at("memory://conformance-lock")
    await backend.open(1.0)
    place, held = backend.store.partition("c"), []
    monkeypatch.setattr(place, "trim", lambda keep: held.append(backend.store.lock._is_owned()))  # type: ignore[attr-defined]
    await Place(backend, Channel("c", bytes), "").publish(1)
    assert held == [True]
    await backend.dropped("c", "flushed meanwhile", 1)
    await backend.close()


# -- Redis alone -------------------------------------------------------------------------------------------------


async def test_a_foreign_entry_is_left_out_loudly(url: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    there = Place(backend, Channel("c", bytes), url)
    reader = await there.join()
    with redis.Redis.from_url(url) as client:
        foreign: Any = [{"hello": "world"}, *({"n": n, "b": "x"} for n in ("many", 0, 65537, "9" * 5000)), {"x": "1"}]
        for number, fields in enumerate(foreign * 2, 1):
            client.xadd("pipeline:{c}:s", fields, id=f"1-{number}")
        client.xreadgroup("g", "killed before it could say so", {"pipeline:{c}:s": ">"}, count=len(foreign))
    await there.publish(1)
    assert [entry.body for entry in await take(reader, 1)] == [b"s:1+4"]
    assert "was not written by the pipeline" in caplog.text
    assert await reader.read(10, 3 * LEASE) == []
    with redis.Redis.from_url(url) as client:
        assert client.xpending("pipeline:{c}:s", "g")["pending"] == 1
    assert (await there.stats()).pending == 4
    await reader.close()
    await backend.close()


async def test_an_output_key_of_another_type_is_refused_with_nothing_written(url: str) -> None:
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    there = Place(backend, Channel("c", bytes), url)
    reader = await there.join()
    await there.publish(1)
    (entry,) = await take(reader, 1)
    with redis.Redis.from_url(url) as client:
        client.set("pipeline:{out}:s", "mine")
        with pytest.raises(ReplyError, match="WRONGTYPE"):
            await reader.commit(Commit([whole(entry)], handled=4, outputs=[Output(Channel("out", bytes), 0, b"x", 1)]))
        assert client.get("pipeline:{out}:s") == b"mine"
    stats = await there.stats()
    assert (stats.handled, stats.pending) == (0, 4)
    await reader.close()
    await backend.close()


async def test_an_output_that_a_foreign_entry_leaves_no_place_is_refused_with_nothing_written(url: str) -> None:
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    there = Place(backend, Channel("c", bytes), url)
    reader = await there.join()
    await there.publish(1)
    (entry,) = await take(reader, 1)
    commit = Commit([whole(entry)], handled=4, outputs=[Output(Channel("out", bytes), 0, b"x", 1)])
    with redis.Redis.from_url(url) as client:
        client.xadd("pipeline:{out}:s", {"x": "y"}, id="9999999999999-1000000")
        with pytest.raises(ReplyError, match=r"FOREIGN .* holds entry 9999999999999-1000000"):
            await reader.commit(commit)
        stats = await there.stats()
        assert (stats.handled, stats.pending) == (0, 4)
        client.delete("pipeline:{out}:s")
        assert await reader.commit(commit) == []
        assert client.xlen("pipeline:{out}:s") == 1
    await reader.close()
    await backend.close()


async def test_foreign_entries_keep_nobody_out_and_the_ledger_balances(url: str) -> None:
    """The first that a group finds, its last, among what a full channel drops, and what a rewind finds."""
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    there = Place(backend, Channel("c", bytes, capacity=3 * FRAME, overflow="drop_oldest"), url)
    with redis.Redis.from_url(url) as client:

        def intrude() -> None:
            client.xadd("pipeline:{c}:s", {"x": "7"})
            time.sleep(0.002)

        intrude()
        reader = await there.join()
        await there.publish(1)
        intrude()
        (entry,) = await take(reader, 1)
        assert await reader.read(9, 0.0) == []
        assert await reader.commit(Commit([whole(entry)], handled=FRAME)) == []
        reader.settled(entry.id)
        assert (await there.stats()).lag == 0
        for first in range(5, 22, FRAME):
            await there.publish(first)
            intrude()
        stats = await there.stats()
        assert (stats.lag, stats.dropped) == (3 * FRAME, 2 * FRAME)
        assert await backend.rewind("c", 0, "g", "0-0") == 6 * FRAME
    assert [entry.body for entry in await take(reader, 6)] == [f"s:{first}+4".encode() for first in range(1, 22, FRAME)]
    assert (await there.stats()).pending == 6 * FRAME
    await reader.close()
    await backend.close()


@pytest.mark.parametrize("deleted", ["stream", "group"])
async def test_what_waits_apart_outlives_its_stream_and_is_not_counted_twice(url: str, deleted: str) -> None:
    """Somebody has deleted a group with redis-cli: what the stream still has is read again, and nothing beside it."""
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    there = Place(backend, Channel("c", bytes), url)
    reader = await there.join()
    await there.publish(1)
    (entry,) = await take(reader, 1)
    retries = [Retried(0.0, b"again", origin=FRAME) for _ in range(FRAME)]
    assert await reader.commit(Commit([whole(entry)], retried=FRAME, retries=retries)) == []
    await reader.close()
    with redis.Redis.from_url(url) as client:
        if deleted == "stream":
            client.delete("pipeline:{c}:s")
        else:
            client.xgroup_destroy("pipeline:{c}:s", "g")
    reader = await there.join()
    stats = await there.stats()
    assert (stats.pending, stats.lag) == ((FRAME, 0) if deleted == "stream" else (0, FRAME))
    bodies = [b"again"] * FRAME if deleted == "stream" else [b"s:1+4"]
    assert [entry.body for entry in await take(reader, len(bodies))] == bodies
    await reader.close()
    await backend.close()


async def test_an_answer_to_a_key_of_another_type_is_dropped_and_the_rest_is_written_once(url: str) -> None:
    backend = RedisBackend(url, "conformance")
    await backend.open(1.0)
    reader = await Place(backend, Channel("c", bytes, durable=False), url).join()
    answers = [Answered("pipeline:reply:mine", b"a"), Answered("pipeline:reply:awaited", b"b")]
    with redis.Redis.from_url(url) as client:
        client.set("pipeline:reply:mine", "mine")
        await reader.commit(Commit(handled=1, outputs=[Output(Channel("out", bytes), 0, b"x", 1)], replies=answers))
        assert (client.get("pipeline:reply:mine"), client.ttl("pipeline:reply:mine")) == (b"mine", -1)
        assert await backend.replies("pipeline:reply:awaited", 1.0) == [b"b"]
        assert client.xlen("pipeline:{out}:s") == 1
    await reader.close()
    await backend.close()

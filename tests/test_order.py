"""Order by key across processes: partitions are leased to workers, and move when one joins, leaves or dies."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import redis

from pipeline import Channel, Message, Pipeline, RetryPolicy
from pipeline.server import Server
from pipeline.transports import CHANCES, SUSPICION, Commit, Group, Outgoing, Segment
from pipeline.transports.client import LinkLost
from pipeline.transports.redis import RedisBackend
from pipeline.transports.streams import Streams

from .apps import failing_once, idle, serving, until
from .workers import Number, Worker, ended_or, ordered

KEYS = "abcdefghijkl"


async def feed(app: Pipeline, rounds: int, pause: float) -> None:
    for n in range(rounds):
        for key in KEYS:
            await app.publish(ordered, Number(n=n), key=key)
        await asyncio.sleep(pause)


async def test_order_by_key_holds_while_workers_join_and_leave(anywhere: str) -> None:
    publisher, apps = Pipeline("publisher", anywhere), [Pipeline(f"app{n}", anywhere) for n in range(3)]
    seen: dict[str, list[int]] = {key: [] for key in KEYS}
    by_app = [0, 0, 0]
    for index, app in enumerate(apps):

        @app.subscriber(ordered, group="g", ordered=True, concurrency=3, lease=1.0, retry=RetryPolicy(3, 0.01))
        async def work(message: Message[Number], index: int = index) -> None:
            await asyncio.sleep(0.001)
            if message.event.n == 7 and message.attempt == 1:
                raise OSError("again")
            assert message.key is not None
            seen[message.key].append(message.event.n)
            by_app[index] += 1

    async with publisher:
        feeding = asyncio.create_task(feed(publisher, 100, 0.02))
        async with serving(apps[0]):
            await asyncio.sleep(0.5)
            async with serving(apps[1]):
                await asyncio.sleep(1.0)
            async with serving(apps[2]):
                await feeding
                ledger = await idle(publisher, "ordered", 30)
    assert seen == {key: list(range(100)) for key in KEYS}
    assert ledger.groups["g"].handled == 100 * len(KEYS)
    assert ledger.groups["g"].retried == len(KEYS)
    assert all(by_app), "every worker had partitions"


async def test_partitions_of_a_killed_worker_move_and_order_holds(url: str) -> None:
    """Its worker writes each number to a durable channel: what was committed is in order and complete."""
    app = Pipeline("app", url)
    written: Channel[Number] = Channel("written", Number)
    async with app:
        feeding = asyncio.create_task(feed(app, 150, 0.02))
        with Worker("ordered", url), Worker("ordered", url) as doomed:
            await asyncio.sleep(1.2)
            doomed.kill()
            await feeding
            await idle(app, "ordered", 30)
        seen: dict[str, list[int]] = {key: [] for key in KEYS}
        async with app.watch(written, since="1h") as stream:
            async with asyncio.timeout(10):
                async for message in stream:
                    assert message.key is not None
                    seen[message.key].append(message.event.n)
                    if sum(map(len, seen.values())) == 150 * len(KEYS):
                        break
    assert seen == {key: list(range(150)) for key in KEYS}


async def test_the_ledger_balances_while_a_group_joins_partition_after_partition(url: str) -> None:
    backend, app = RedisBackend(url, "joins"), Pipeline("app", url)
    await backend.open(1.0)
    async with app:
        await feed(app, 2, 0.0)
        for partition in range(ordered.partitions):
            await backend.durable.join(ordered, partition, Group("g", "a", 1.0))
            ledger = (await app.stats()).channels["ordered"]
            assert (ledger.groups["g"].lag, ledger.groups["g"].difference(ledger.published)) == (2 * len(KEYS), 0)
    await backend.close()


async def test_nothing_overtakes_an_event_that_kills_its_workers(valkey_url: str) -> None:
    """From its third death on it is handed out alone; what came after it, and what comes meanwhile, waits behind it."""
    app = Pipeline("app", valkey_url)
    written: Channel[Number] = Channel("written", Number)
    async with app:
        for n in range(30):
            await app.publish(ordered, Number(n=n), key="a")
        deaths = 0
        while True:
            # Later ones take more ahead: what follows it has been delivered less often.
            with Worker(f"ordered-deadly-{1 if deaths < 2 else 8}", valkey_url) as worker:
                waiting = asyncio.create_task(idle(app, "ordered", 30))
                code = await asyncio.to_thread(ended_or, worker, waiting)
                if code is None:
                    ledger = await waiting
                    break
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                deaths += 1
                await app.publish(ordered, Number(n=29 + deaths), key="a")
        seen = []
        async with app.watch(written, since="1h") as stream:
            async with asyncio.timeout(10):
                async for message in stream:
                    seen.append(message.event.n)
                    if len(seen) == ledger.published - 1:
                        break
    assert deaths == SUSPICION + CHANCES
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (29 + deaths, 1)
    assert seen == [n for n in range(30 + deaths) if n != 13]


async def test_order_holds_through_an_outage_longer_than_the_lease() -> None:
    """Nobody else has taken the partition, so what its owner commits late is no stranger's."""
    seen: list[int] = []
    with Server(appendonly=True, appendfsync="always") as server:
        app = Pipeline("app", server.url)

        @app.subscriber(ordered, group="g", ordered=True, lease=0.5)
        async def work(event: Number) -> None:
            seen.append(event.n)
            await asyncio.sleep(0.1)

        async with app, serving(app):
            await app.publish(ordered, [Number(n=n) for n in range(12)], key="a")
            await until(lambda: len(seen) == 2)
            server.kill()
            await asyncio.sleep(0.8)
            await asyncio.to_thread(server.start)
            ledger = await idle(app, "ordered", 20)
    assert seen == list(range(12))
    assert (ledger.groups["g"].handled, ledger.groups["g"].duplicates_suppressed) == (12, 0)


async def test_an_owner_whose_lease_ran_out_begins_with_what_others_left_meanwhile(url: str) -> None:
    streams = Streams(url, "test")
    pair: Channel[Number] = Channel("pair", Number, partitions=2)
    one = await streams.join(pair, 0, Group("g", "one", 5.0, exclusive=True))
    await streams.publish(pair, 0, [Outgoing(b"1", 1, "s", 1)])
    (held,) = await one.read(1, 1.0)
    for n in (2, 3):
        await streams.publish(pair, 0, [Outgoing(b"%d" % n, 1, "s", n)])
    with redis.Redis.from_url(url) as client:  # two had it, read on, and died
        client.xreadgroup("g", "two", {one.keys.stream: ">"}, count=1)
        client.delete(one.keys.group("g", "owner"))
    assert await one.commit(Commit([Segment(held.id, 1, 0, 0)], handled=1)) == []
    one.settled(held.id)
    assert [entry.body for _ in range(2) for entry in await one.read(1, 1.0)] == [b"2", b"3"]
    await one.close()
    await streams.close()


async def test_nothing_new_is_read_before_what_a_partition_came_with_though_asking_fails_once(url: str) -> None:
    streams = Streams(url, "test")
    pair: Channel[Number] = Channel("pair", Number, partitions=2)
    reader = await streams.join(pair, 0, Group("g", "two", 5.0, exclusive=True))
    for n in (1, 2):
        await streams.publish(pair, 0, [Outgoing(b"%d" % n, 1, "s", n)])
    with redis.Redis.from_url(url) as client:
        client.xreadgroup("g", "dead", {reader.keys.stream: ">"}, count=1)
    with failing_once(streams, "claim"):
        assert [entry.body for _ in range(2) for entry in await reader.read(1, 1.0)] == [b"1", b"2"]
    await reader.close()
    await streams.close()


async def test_what_was_taken_of_a_partition_is_handed_out_before_it_is_given_up(url: str) -> None:
    """The second page of what it came with could not be had, and meanwhile it is more than this one's share."""
    streams = Streams(url, "test")
    pair: Channel[Number] = Channel("pair", Number, partitions=2)
    reader = await streams.join(pair, 1, Group("g", "two", 5.0, exclusive=True))
    await streams.publish(pair, 1, [Outgoing(b"%d" % n, 1, "s", n) for n in range(1, 151)])
    with redis.Redis.from_url(url) as client:
        client.xreadgroup("g", "dead", {reader.keys.stream: ">"}, count=150)
    assert reader.share is not None
    claim, pages = streams.run, []

    async def lossy(script: str, *arguments: Any, **options: Any) -> Any:
        if script == "claim" and len(pages) == 1:
            reader.share.most = 0  # type: ignore[union-attr]
            pages.append(None)
            raise LinkLost("injected")
        pages.extend([None] * (script == "claim"))
        return await claim(script, *arguments, **options)

    streams.run = lossy  # type: ignore[method-assign]
    taken = await reader.read(1, 1.0)
    assert [entry.body for entry in taken] == [b"%d" % n for n in range(1, 101)]
    await reader.release([entry.id for entry in taken])
    assert await reader.read(1, 0.1) == []
    assert reader.owner == ""
    await reader.close()
    await streams.close()


async def test_who_stops_serving_and_stays_open_leaves_its_partitions_to_others(anywhere: str) -> None:
    one, two = Pipeline("one", anywhere), Pipeline("two", anywhere)
    seen: list[int] = []
    for app in (one, two):

        @app.subscriber(ordered, group="g", ordered=True, lease=1.0)
        async def work(event: Number) -> None:
            seen.append(event.n)

    async with one, serving(two):
        async with serving(one):
            await asyncio.sleep(0.5)
        for n in range(12):
            await one.publish(ordered, Number(n=n), key=KEYS[n])
        await idle(one, "ordered", 5)
    assert sorted(seen) == list(range(12))


async def test_an_ordered_worker_stops_though_redis_hangs() -> None:
    with Server() as server:
        app = Pipeline("app", server.url)

        @app.subscriber(ordered, group="g", ordered=True, lease=3.0)
        async def work(event: Number) -> None:
            """Nothing comes."""

        stop = asyncio.Event()
        running = asyncio.create_task(app.serve(stop))
        await asyncio.wait_for(app.ready.wait(), 10)
        await asyncio.sleep(0.2)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            stop.set()
            await asyncio.wait_for(running, 9)
        finally:
            os.kill(server.pid, signal.SIGCONT)

"""Pausing a group: its workers stop reading, whoever they are, and the ledger says so; resumed, nothing was lost."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis

from pipeline import Channel, Event, Message, Pipeline, Reject, Retry, RetryPolicy
from pipeline.errors import ConfigurationError, ServerUnavailable, UnknownChannel
from pipeline.ledger import GroupLedger
from pipeline.server import Server

from .apps import idle, serving, until
from .workers import Number, Worker, jobs


class Order(Event):
    n: int


orders = Channel("orders", Order, frame=4)
news = Channel("news", Order, durable=False)


async def group_of(app: Pipeline, channel: str = "orders", group: str = "g") -> GroupLedger:
    """Its counts, which must balance."""
    ledger = (await app.stats()).channels[channel]
    assert ledger.groups[group].difference(ledger.published) == 0, ledger
    return ledger.groups[group]


async def test_a_paused_group_takes_nothing_within_a_second_and_loses_nothing(anywhere: str) -> None:
    app, other = Pipeline("app", anywhere), Pipeline("other", anywhere)
    seen: list[int] = []
    elsewhere: list[int] = []

    @app.subscriber(orders, group="g", retry=RetryPolicy(3, 0.05))
    async def work(message: Message[Order]) -> None:
        if message.event.n % 10 == 3 and message.attempt == 1:
            raise Retry(delay=0.3)
        if message.event.n % 10 == 7:
            raise Reject("seven")
        seen.append(message.event.n)

    @other.subscriber(orders, group="other")
    async def look(event: Order) -> None:
        elsewhere.append(event.n)

    async with app, serving(app, other):
        feeding = asyncio.create_task(feed(app, 200, 0.004))
        await until(lambda: len(seen) > 20)
        assert await app.pause("orders", "g")
        paused_at = time.monotonic()
        assert not await app.pause("orders", "g")
        await until(lambda: app._routers[0][0].flow.events == 0)
        assert time.monotonic() - paused_at < 1.0, "what it held is finished, or handed over to the retries"
        await asyncio.sleep(0.15)
        before = len(seen)
        await feeding
        await until(lambda: len(elsewhere) == 200)
        stopped = await group_of(app)
        assert len(seen) == before, "neither new events nor due retries"
        assert stopped.paused
        assert stopped.lag > 0
        assert not (await group_of(app, group="other")).paused
        await app.resume("orders", "g")
        await idle(app, "orders")
        assert not (await group_of(app)).paused
    assert sorted(seen) == sorted(n for n in range(200) if n % 10 != 7)


async def test_a_group_is_paused_while_memory_is_full_and_a_refusal_is_no_strange_error() -> None:
    with Server() as server, redis.Redis.from_url(server.url) as bare:
        app = Pipeline("app", server.url)

        @app.subscriber(orders, group="g")
        async def work(event: Order) -> None:
            """Nothing comes."""

        async with app, serving(app):
            bare.config_set("maxmemory", "1mb")
            assert await app.pause("orders", "g")
            bare.config_set("maxmemory", "0")
            bare.config_set("min-replicas-to-write", 1)
            with pytest.raises(ServerUnavailable, match="pause of group 'g': Redis refuses: NOREPLICAS"):
                await app.pause("orders", "g")
            bare.config_set("min-replicas-to-write", 0)


async def feed(app: Pipeline, count: int, pause: float) -> None:
    for n in range(count):
        await app.publish(orders, Order(n=n))
        await asyncio.sleep(pause)


async def test_a_worker_that_starts_later_finds_its_group_paused(anywhere: str) -> None:
    async with Pipeline("keeper", anywhere) as keeper:
        first, second = Pipeline("first", anywhere), Pipeline("second", anywhere)
        seen: list[int] = []
        for app in (first, second):

            @app.subscriber(orders, group="g")
            async def work(event: Order) -> None:
                seen.append(event.n)

        async with serving(first):
            await keeper.publish(orders, [Order(n=n) for n in range(8)])
            await idle(keeper, "orders")
            await keeper.pause("orders", "g")
            await asyncio.sleep(0.15)
        async with serving(second):
            await keeper.publish(orders, [Order(n=n) for n in range(8, 16)])
            await asyncio.sleep(0.3)
            assert (await group_of(keeper)).lag == 8
            assert second._routers[0][0].holding().paused
            await keeper.resume("orders", "g")
            await idle(keeper, "orders")
    assert seen == list(range(16))


async def test_partitions_of_a_paused_ordered_group_go_to_nobody_new(anywhere: str) -> None:
    numbered: Channel[Order] = Channel("numbered", Order, partitions=4, frame=1)
    publisher, apps = Pipeline("publisher", anywhere), [Pipeline(f"app{n}", anywhere) for n in range(2)]
    seen: list[int] = []
    for app in apps:

        @app.subscriber(numbered, group="g", ordered=True, lease=0.6)
        async def work(event: Order) -> None:
            seen.append(event.n)

    async with publisher, serving(apps[0]):
        await publisher.publish(numbered, [Order(n=n) for n in range(20)])
        await idle(publisher, numbered)
        await publisher.pause("numbered", "g")
        await asyncio.sleep(0.2)
        async with serving(apps[1]):
            await publisher.publish(numbered, [Order(n=n) for n in range(20, 40)])
            await asyncio.sleep(1.0)
            group = await group_of(publisher, "numbered")
            assert (group.handled, group.lag, group.paused) == (20, 20, True)
            await publisher.resume("numbered", "g")
            await idle(publisher, numbered)
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("kind", ["valkey", "redis7"])
async def test_a_pause_outlives_the_server_and_the_workers(kind: str, request: pytest.FixtureRequest) -> None:
    binary = request.getfixturevalue("redis7_binary") if kind == "redis7" else None
    with Server(binary=binary, appendonly=True, appendfsync="always") as server:
        async with Pipeline("keeper", server.url) as keeper:
            with Worker("finishes", server.url) as worker:
                await keeper.publish(jobs, Number(n=1))
                await asyncio.to_thread(worker.wait_for, "finished 1")
                await idle(keeper, "jobs")
                await keeper.pause("jobs", "g")
                await asyncio.sleep(0.2)
                await keeper.publish(jobs, Number(n=2))
                server.kill()
                await asyncio.to_thread(server.start)
                worker.kill()
            with Worker("finishes", server.url) as worker:
                async with asyncio.timeout(20):
                    while (await group_of(keeper, "jobs")).consumers == 0:
                        await asyncio.sleep(0.1)
                await asyncio.sleep(0.5)
                group = await group_of(keeper, "jobs")
                assert (group.paused, group.handled, group.lag, group.pending) == (True, 1, 1, 0)
                await keeper.resume("jobs", "g")
                await asyncio.to_thread(worker.wait_for, "finished 2")
                await idle(keeper, "jobs")


async def test_what_cannot_be_paused_is_refused_with_the_reason(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @app.subscriber(orders, group="g")
    @app.subscriber(news, group="listeners")
    async def work(event: Order) -> None:
        """Nothing to do."""

    async with app, serving(app):
        with pytest.raises(ConfigurationError, match="no group 'x'"):
            await app.pause("orders", "x")
        with pytest.raises(UnknownChannel, match="no channel 'nowhere'"):
            await app.pause("nowhere", "g")
        with pytest.raises(ConfigurationError, match="'news' is live: nothing waits there"):
            await app.pause("news", "listeners")

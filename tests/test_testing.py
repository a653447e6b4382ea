"""What users get for their own tests: the in-memory transport with its clock and its faults."""

from __future__ import annotations

import asyncio

import pytest
import redis

from pipeline import Channel, Event, Message, Pipeline, Retry
from pipeline.errors import ConfigurationError
from pipeline.testing import embedded_server, first, serving, settled, store


class Number(Event):
    n: int


numbers = Channel("numbers", Number)
doubles = Channel("doubles", Number)


def doubling(url: str) -> Pipeline:
    app = Pipeline("app", url)

    @app.subscriber(numbers, group="g", publishes=doubles, lease=5.0)
    async def double(message: Message[Number]) -> Number:
        if message.event.n == 7 and message.attempt == 1:
            raise Retry(delay=3600)
        return Number(n=2 * message.event.n)

    return app


async def test_lost_replies_neither_lose_nor_double() -> None:
    app = doubling("memory://faults")
    async with serving(app):
        faults = store(app).faults
        faults.drop_reply("publish", 2)
        faults.lose("publish")
        faults.drop_reply("commit", 2)
        faults.lose("commit", 2)
        faults.lose("read", 3)
        await app.publish(numbers, [Number(n=n) for n in range(5)])
        ledger = await settled(app, numbers)
        assert (ledger.published, ledger.groups["g"].handled, ledger.duplicates) == (5, 5, 10)
        assert (await app.stats()).channels["doubles"].published == 5


async def test_the_clock_can_be_moved_on() -> None:
    app = doubling("memory://clock")
    async with serving(app), app.watch(doubles) as stream:
        await app.publish(numbers, Number(n=7))
        with pytest.raises(TimeoutError):
            await settled(app, numbers, seconds=0.2)
        store(app).clock.advance(3601)
        assert (await first(stream)).event == Number(n=14)
        await settled(app, numbers)


async def test_when_leases_end_the_first_to_finish_wins() -> None:
    slow, quick = Pipeline("slow", "memory://leases"), doubling("memory://leases")
    begun, go = asyncio.Event(), asyncio.Event()

    @slow.subscriber(numbers, group="g", publishes=doubles)
    async def stall(event: Number) -> Number:
        begun.set()
        await go.wait()
        return Number(n=-1)

    async with serving(slow):
        await slow.publish(numbers, Number(n=4))
        await begun.wait()
        store(slow).expire_leases()
        async with serving(quick):
            await settled(slow, numbers)
            go.set()
            while (ledger := await settled(slow, numbers)).groups["g"].duplicates_suppressed == 0:
                await asyncio.sleep(0.005)
            async with slow.watch(doubles, since=60) as stream:
                assert (await first(stream)).event == Number(n=8)
    assert ledger.groups["g"].handled == 1


async def test_after_a_flush_work_goes_on() -> None:
    app = doubling("memory://flush")
    async with serving(app):
        await app.publish(numbers, Number(n=1))
        await settled(app, numbers)
        store(app).flush()
        await app.publish(numbers, Number(n=2))
        assert (await settled(app, numbers)).published == 1


def test_an_app_of_a_module_serves_one_test_after_the_other(anywhere: str) -> None:
    """Each in an event loop of its own."""
    app = doubling(anywhere)

    async def test(n: int) -> None:
        waiting = asyncio.create_task(app.ready.wait())
        async with serving(app):
            await waiting
            await asyncio.gather(*(app.publish(numbers, Number(n=n)) for _ in range(3)))
            await settled(app, numbers)

    for n in range(3):
        asyncio.run(test(n))


async def test_a_store_is_forgotten_with_its_last_user() -> None:
    async with Pipeline("one", "memory://brief") as app:
        await app.publish(numbers, Number(n=1))
        async with Pipeline("two", "memory://brief") as other:
            assert (await other.stats()).channels["numbers"].published == 1
    async with Pipeline("three", "memory://brief") as app:
        assert (await app.stats()).channels == {}


async def test_an_embedded_server_is_a_real_one() -> None:
    with embedded_server() as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        async with Pipeline("app", server.url) as app:
            with pytest.raises(ConfigurationError, match="not on memory://"):
                store(app)

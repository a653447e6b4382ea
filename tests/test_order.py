"""Order by key across processes: partitions are leased to workers, and move when one joins, leaves or dies."""

from __future__ import annotations

import asyncio

from pipeline import Channel, Message, Pipeline, RetryPolicy

from .apps import idle, serving
from .workers import Number, Worker, ordered

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

"""Task queues and another client, as their documentation recommends: `… benchmarks.queue_peers SIDE ROLE URL EVENTS`.

taskiq    RedisStreamBroker, 64 publishes in flight, the receiver's own concurrency
dramatiq  RedisBroker, one `send` an event (it has no other), a worker of eight threads
arq       64 enqueues in flight, 64 jobs at a time, results not kept
glide     valkey-glide's streams: one event an entry, 64 commands a batch, COUNT 64
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from .sample import Reading, sample

__all__ = ["main"]

FLIGHT = 64


class Counter:
    def __init__(self, events: int) -> None:
        self.left = events
        self.began = 0.0
        self.done = asyncio.Event()

    def count(self, data: str) -> None:
        self.began = self.began or time.time()
        Reading.model_validate_json(data)
        self.left -= 1


def finish(began: float) -> None:
    """Say so and end here: shutting down is not what is measured, and not every worker can be told to."""
    print(json.dumps({"began": began, "ended": time.time(), "cpu": time.process_time()}), flush=True)
    os._exit(0)


def texts() -> list[str]:
    return [sample(n).model_dump_json() for n in range(4096)]


# -- taskiq --------------------------------------------------------------------------------------------------------


async def taskiq(side: str, url: str, events: int) -> float:
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisStreamBroker

    broker, counter = RedisStreamBroker(url), Counter(events)

    @broker.task(task_name="handle")  # type: ignore[untyped-decorator]
    async def handle(data: str) -> None:
        counter.count(data)
        if counter.left == 0:
            counter.done.set()

    if side == "produce":
        await broker.startup()
        began, many = time.time(), texts()
        for start in range(0, events, FLIGHT):
            await asyncio.gather(*(handle.kiq(many[n % 4096]) for n in range(start, min(start + FLIGHT, events))))
        await broker.shutdown()
        return began
    broker.is_worker_process = True
    receiving = asyncio.create_task(run_receiver_task(broker, run_startup=True))
    await asyncio.sleep(1.0)
    print("ready", flush=True)
    await counter.done.wait()
    finish(counter.began)
    await receiving
    return counter.began


# -- dramatiq ------------------------------------------------------------------------------------------------------


async def dramatiq(side: str, url: str, events: int) -> float:
    import dramatiq as library
    from dramatiq.brokers.redis import RedisBroker

    broker, counter = RedisBroker(url=url, middleware=[]), Counter(events)
    library.set_broker(broker)

    def handle(data: str) -> None:
        counter.count(data)

    actor = library.actor(handle, broker=broker)
    if side == "produce":
        began, many = time.time(), texts()
        for n in range(events):
            actor.send(many[n % 4096])
        return began
    worker = library.Worker(broker, worker_threads=8)
    worker.start()
    print("ready", flush=True)
    while counter.left > 0:  # noqa: ASYNC110  # its threads count
        await asyncio.sleep(0.002)
    finish(counter.began)
    return counter.began


# -- arq -----------------------------------------------------------------------------------------------------------


async def arq(side: str, url: str, events: int) -> float:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    options, counter = RedisSettings.from_dsn(url), Counter(events)

    async def handle(_: Any, data: str) -> None:
        counter.count(data)
        if counter.left == 0:
            counter.done.set()

    if side == "produce":
        pool = await create_pool(options)
        began, many = time.time(), texts()
        for start in range(0, events, FLIGHT):
            chunk = range(start, min(start + FLIGHT, events))
            await asyncio.gather(*(pool.enqueue_job("handle", many[n % 4096]) for n in chunk))
        await pool.aclose()
        return began
    worker = Worker(
        [func(handle, name="handle", keep_result=0)], redis_settings=options, max_jobs=64, poll_delay=0.01,
        handle_signals=False,
    )  # fmt: skip
    working = asyncio.create_task(worker.main())
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await counter.done.wait()
    finish(counter.began)
    await working
    return counter.began


# -- valkey-glide --------------------------------------------------------------------------------------------------


async def glide(side: str, url: str, events: int) -> float:
    from glide import (
        Batch,
        GlideClient,
        GlideClientConfiguration,
        NodeAddress,
        StreamGroupOptions,
        StreamReadGroupOptions,
    )

    where = urlsplit(url)
    client = await GlideClient.create(GlideClientConfiguration([NodeAddress(where.hostname or "", where.port or 0)]))
    if side == "produce":
        began, many = time.time(), texts()
        for start in range(0, events, FLIGHT):
            batch = Batch(is_atomic=False)
            for n in range(start, min(start + FLIGHT, events)):
                batch.xadd("glide", [("d", many[n % 4096])])
            await client.exec(batch, raise_on_error=True)
        await client.close()
        return began
    await client.xgroup_create("glide", "g", "0", StreamGroupOptions(make_stream=True))
    print("ready", flush=True)
    counter = Counter(events)
    while counter.left:
        found = await client.xreadgroup({"glide": ">"}, "g", "c", StreamReadGroupOptions(block_ms=1000, count=64))
        for entries in (found or {}).values():
            for fields in entries.values():
                counter.count(fields[0][1].decode())
            await client.xack("glide", "g", list(entries))
    await client.close()
    return counter.began


def main() -> None:
    side, role, url, events = sys.argv[1:5]
    began = asyncio.run(
        {"taskiq": taskiq, "dramatiq": dramatiq, "arq": arq, "glide": glide}[role](side, url, int(events))
    )
    finish(began)


if __name__ == "__main__":
    main()

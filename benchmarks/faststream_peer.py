"""FastStream on Redis streams (extra `bench`). `python -m benchmarks.faststream_peer SIDE ROLE URL EVENTS`."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from faststream import FastStream
from faststream.redis import RedisBroker, StreamSub

from .sample import Reading, sample


async def produce(role: str, url: str, events: int) -> float:
    async with RedisBroker(url) as broker:
        many = [sample(n) for n in range(4096)]
        began = time.time()
        for start in range(0, events, 64):
            await asyncio.gather(
                *(broker.publish(many[n % 4096], stream="peer") for n in range(start, min(start + 64, events)))
            )
    return began


async def work(role: str, url: str, events: int) -> float:
    broker = RedisBroker(url)
    app = FastStream(broker)
    began, left = 0.0, events

    def count(many: int) -> None:
        nonlocal began, left
        began = began or time.time()
        left -= many
        if left <= 0:
            app.exit()

    if role == "batches":

        @broker.subscriber(stream=StreamSub("peer", group="g", consumer="c", batch=True, max_records=1024))
        async def handle_batch(batch: list[Reading]) -> None:
            count(len(batch))
    else:

        @broker.subscriber(stream=StreamSub("peer", group="g", consumer="c", max_records=64))
        async def handle(event: Reading) -> None:
            count(1)

    @app.after_startup
    async def ready() -> None:
        print("ready", flush=True)

    await app.run()
    return began


if __name__ == "__main__":
    side, role, url, events = sys.argv[1:5]
    began = asyncio.run((work if side == "work" else produce)(role, url, int(events)))
    print(json.dumps({"began": began, "ended": time.time(), "cpu": time.process_time()}), flush=True)

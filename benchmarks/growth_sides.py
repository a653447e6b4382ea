"""The growth benchmark's processes: `python -m benchmarks.growth_sides work|produce ours|raw URL EVENTS SIZE WORK`.

Workers count what they handled in Redis, ten times a second, so that several may share the work.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import redis.asyncio as redis

from pipeline import Batch, Channel, Event, Pipeline

__all__ = ["main"]

PIPELINE = 64


class Blob(Event):
    text: str


blobs: Channel[Blob] = Channel("bench.blobs", Blob)
jobs: Channel[Blob] = Channel("bench.jobs", Blob, frame=4)


class Count:
    def __init__(self, url: str) -> None:
        self.value = 0
        self._told = 0
        self._url = url

    async def tell(self) -> None:
        async with redis.Redis.from_url(self._url) as client:
            while True:
                await asyncio.sleep(0.02)
                new, now = self.value - self._told, time.time()
                if new:
                    self._told += new
                    await client.set("bench:ended", now)
                    await client.incrby("bench:done", new)


async def work_ours(url: str, events: int, work: float) -> None:
    app, count = Pipeline("bench-worker", url), Count(url)
    if work:

        @app.subscriber(jobs, group="bench")
        def one(event: Blob) -> None:
            end = time.perf_counter() + work
            while time.perf_counter() < end:
                """Busy, as computing is."""
            count.value += 1
    else:

        @app.subscriber(blobs, group="bench", batch=Batch(1024), run_in="loop")
        def many(batch: list[Blob]) -> None:
            count.value += len(batch)

    app.on_start(lambda: asyncio.sleep(0, app.spawn(count.tell())))  # type: ignore[arg-type]
    serving = asyncio.create_task(app.serve())
    await app.ready.wait()
    print("ready", flush=True)
    await serving


async def produce_ours(url: str, events: int, size: int, work: float) -> float:
    many = [Blob(text="x" * (size - 11)) for _ in range(max(64, min(4096, (4 << 20) // size)))]
    async with Pipeline("bench-producer", url) as app:
        began = time.time()
        for start in range(0, events, len(many)):
            await app.publish(jobs if work else blobs, many[: events - start])
    return began


async def work_raw(url: str) -> None:
    count = Count(url)
    telling = asyncio.create_task(count.tell())
    async with redis.Redis.from_url(url) as client:
        await client.xgroup_create("raw", "g", id="0", mkstream=True)
        print("ready", flush=True)
        while not telling.done():
            found: Any = await client.xreadgroup("g", "c", {"raw": ">"}, count=PIPELINE, block=1000)
            for _, entries in found:
                pipe = client.pipeline(transaction=False)
                for id_, fields in entries:
                    Blob.model_validate_json(fields[b"d"])
                    pipe.xack("raw", "g", id_)
                await pipe.execute()
                count.value += len(entries)


async def produce_raw(url: str, events: int, size: int) -> float:
    blob = Blob(text="x" * (size - 11))
    async with redis.Redis.from_url(url) as client:
        began = time.time()
        for start in range(0, events, PIPELINE):
            pipe = client.pipeline(transaction=False)
            for _ in range(min(PIPELINE, events - start)):
                pipe.xadd("raw", {"d": blob.model_dump_json()})
            await pipe.execute()
    return began


def main() -> None:
    role, side, url, events, size, work = sys.argv[1:7]
    if role == "work":
        asyncio.run(work_ours(url, int(events), float(work)) if side == "ours" else work_raw(url))
        return
    if side == "ours":
        began = asyncio.run(produce_ours(url, int(events), int(size), float(work)))
    else:
        began = asyncio.run(produce_raw(url, int(events), int(size)))
    print(json.dumps(began))


if __name__ == "__main__":
    main()

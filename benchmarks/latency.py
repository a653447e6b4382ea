"""Latency from publish to the handler's start at 200 events/s, and publishes awaited one by one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import redis.asyncio as redis

from pipeline import Channel, Message, Pipeline
from pipeline.server import Server

from .latency_peers import PEERS, end, sender, work
from .report import Figure
from .sample import Reading, sample

__all__ = ["run"]

RATE = 200
WARM = 200
"""Events before those that are counted: a second, for every side."""
timed: Channel[Reading] = Channel("bench.timed", Reading)
alone: Channel[Reading] = Channel("bench.alone", Reading)


def run(repeats: int, seconds: float) -> list[Figure]:
    names = {"ours": "ours", "raw": "raw redis-py stream", **PEERS}
    figures = {
        (side, what): Figure("latency", f"{name}, {what}", unit, peer=side != "ours")
        for side, name in names.items()
        for what, unit in {"p50": "ms p50", "p99": "ms p99", "publishes/s": "publishes/s"}.items()
        if what != "publishes/s" or side not in PEERS
    }
    with Server() as server:
        for _ in range(repeats):
            for side in names:
                p50, p99 = asyncio.run(_latency(side, server.url, WARM + int(RATE * seconds)))
                figures[side, "p50"].values.append(p50)
                figures[side, "p99"].values.append(p99)
                if side not in PEERS:
                    figures[side, "publishes/s"].values.append(asyncio.run(_awaited(side, server.url, 3000)))
    return list(figures.values())


async def _latency(side: str, url: str, events: int) -> tuple[float, float]:
    async with redis.Redis.from_url(url) as client:
        await client.flushall()
        worker = subprocess.Popen(  # noqa: ASYNC220  # starting one does not take long
            [sys.executable, "-m", "benchmarks.latency", side, url, str(events)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        await asyncio.to_thread(worker.stdout.readline)
        async with _sender(side, url, client) as send:
            for n in range(events):
                await send(sample(n))
                await asyncio.sleep(1 / RATE)
    output, _ = await asyncio.to_thread(worker.communicate, None, 60)
    seen = sorted(json.loads(output.splitlines()[-1])[WARM:])
    return 1000 * seen[len(seen) // 2], 1000 * seen[int(len(seen) * 0.99)]


@contextlib.asynccontextmanager
async def _sender(side: str, url: str, client: Any) -> AsyncIterator[Callable[[Reading], Awaitable[Any]]]:
    if side == "ours":
        async with Pipeline("bench", url) as app:
            yield lambda event: app.publish(timed, event, headers={"t": repr(time.time())})
    elif side == "raw":
        yield lambda event: client.xadd("timed", {"d": event.model_dump_json(), "t": repr(time.time())})
    else:
        async with sender(side, url) as send:
            yield lambda event: send(event.model_dump_json(), time.time())


async def _awaited(side: str, url: str, events: int) -> float:
    event = sample(1)
    async with redis.Redis.from_url(url) as client, Pipeline("bench", url) as app:
        await app.publish(alone, event)
        began = time.perf_counter()
        for _ in range(events):
            if side == "ours":
                await app.publish(alone, event)
            else:
                await client.xadd("alone", {"d": event.model_dump_json()})
        return events / (time.perf_counter() - began)


async def work_ours(url: str, events: int) -> list[float]:
    app, seen = Pipeline("bench-worker", url), []

    @app.subscriber(timed, group="bench")
    async def handle(message: Message[Reading]) -> None:
        seen.append(time.time() - float(message.headers["t"]))
        if len(seen) == events:
            app.stop()

    serving = asyncio.create_task(app.serve())
    await app.ready.wait()
    print("ready", flush=True)
    await serving
    return seen


async def work_raw(url: str, events: int) -> list[float]:
    seen: list[float] = []
    async with redis.Redis.from_url(url) as client:
        await client.xgroup_create("timed", "g", id="0", mkstream=True)
        print("ready", flush=True)
        while len(seen) < events:
            replies: Any = await client.xreadgroup("g", "c", {"timed": ">"}, count=64, block=1000)
            for _, entries in replies:
                for id_, fields in entries:
                    Reading.model_validate_json(fields[b"d"])
                    seen.append(time.time() - float(fields[b"t"]))
                    await client.xack("timed", "g", id_)
    return seen


if __name__ == "__main__":
    side, url, count = sys.argv[1:4]
    if side in PEERS:

        async def peer() -> None:
            print(json.dumps(await work(side, url, int(count))), flush=True)
            end()

        asyncio.run(peer())
    print(json.dumps(asyncio.run((work_ours if side == "ours" else work_raw)(url, int(count)))))

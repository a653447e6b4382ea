"""Raw redis-py, used well: one event an entry, 64 commands a pipeline: `… benchmarks.raw SIDE ROLE URL EVENTS`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import redis.asyncio as redis

from .sample import Reading, sample

PIPELINE = 64


async def produce(role: str, url: str, events: int) -> float:
    client = redis.Redis.from_url(url)
    many = [sample(n) for n in range(4096)]
    began = time.time()
    for start in range(0, events, PIPELINE):
        pipe = client.pipeline(transaction=False)
        for n in range(start, min(start + PIPELINE, events)):
            data = many[n % 4096].model_dump_json()
            if role == "live":
                pipe.publish("raw", data)
            else:
                pipe.xadd("raw", {"d": data})
        await pipe.execute()
    await client.aclose()
    return began


async def work(role: str, url: str, events: int) -> float:
    client = redis.Redis.from_url(url)
    began = await (_listen if role == "live" else _read)(client, events)
    await client.aclose()
    return began


async def _read(client: Any, events: int) -> float:
    await client.xgroup_create("raw", "g", id="0", mkstream=True)
    print("ready", flush=True)
    began, left = 0.0, events
    while left:
        for _, entries in await client.xreadgroup("g", "c", {"raw": ">"}, count=PIPELINE, block=1000):
            began = began or time.time()
            pipe = client.pipeline(transaction=False)
            for id_, fields in entries:
                Reading.model_validate_json(fields[b"d"])
                pipe.xack("raw", "g", id_)
            await pipe.execute()
            left -= len(entries)
    return began


async def _listen(client: Any, events: int) -> float:
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    await pubsub.subscribe("raw")
    await pubsub.get_message(timeout=1)
    print("ready", flush=True)
    began, left = 0.0, events
    async for message in pubsub.listen():
        began = began or time.time()
        Reading.model_validate_json(message["data"])
        left -= 1
        if left == 0:
            break
    await pubsub.aclose()
    return began


if __name__ == "__main__":
    side, role, url, events = sys.argv[1:5]
    began = asyncio.run((work if side == "work" else produce)(role, url, int(events)))
    print(json.dumps({"began": began, "ended": time.time(), "cpu": time.process_time()}), flush=True)

"""Tensors from one process to another: 602,112 B ones a second, and how long 100 MB take. The limits beside them.

As a program it is one side of one set-up: `python -m benchmarks.tensors produce|work ROLE URL TENSORS`.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis
import redis.asyncio as aredis

from pipeline import Batch, Channel, Event, Pipeline, Tensor
from pipeline.server import Server

from .report import Figure

__all__ = ["run"]


class Image(Event):
    pixels: Tensor


SHAPE = (3, 224, 224)
"""float32: 602,112 bytes."""
images: Channel[Image] = Channel("bench.images", Image, capacity=64, keep=0)
large: Channel[Image] = Channel("bench.large", Image, frame=1, keep=0)
PIPELINE = 8
SLOTS = 16
HUNDRED = 25_000_000
"""float32: 100 MB."""


@dataclass(frozen=True)
class Setup:
    name: str
    role: str
    rate: float
    peer: bool = False
    mode: str = "auto"


SETUPS = (
    Setup("ours, shared memory", "ours", 4000),
    Setup("ours, blobs in Redis", "ours", 500, mode="blobs"),
    Setup("raw redis-py stream", "stream", 400, peer=True),
    Setup("raw redis-py SET/GET", "blobs", 400, peer=True),
    Setup("shared-memory copy limit", "limit", 8000, peer=True),
)


def run(repeats: int, seconds: float) -> list[Figure]:
    figures = {setup: Figure("tensors", setup.name, "tensors/s", peer=setup.peer) for setup in SETUPS}
    latency = Figure("tensors", "ours, 100 MB, publish to its sum", "ms")
    bound = Figure("tensors", "two memcpy and one sum of 100 MB", "ms", peer=True)
    with Server() as server:
        for _ in range(repeats):
            for setup in SETUPS:
                figures[setup].values.append(_rate(setup, server.url, int(setup.rate * seconds)))
            bound.values.append(_bound())
            latency.values.append(_hundred(server.url))
    return [*figures.values(), latency, bound]


def _rate(setup: Setup, url: str, tensors: int) -> float:
    """Tensors/s from the first publish to the last one summed; every sum is checked."""
    began, ends = _both(setup.role, url, tensors, setup.mode)
    return tensors / (ends[-1] - began[0])


def _hundred(url: str) -> float:
    """Median of the milliseconds from publish to the sum, of eight after the first two."""
    began, ends = _both("large", url, 10, "auto")
    return 1000 * float(np.median(np.subtract(ends, began)[2:]))


def _both(role: str, url: str, tensors: int, mode: str) -> tuple[list[float], list[float]]:
    with redis.Redis.from_url(url) as client:
        client.flushall()
    command = [sys.executable, "-m", "benchmarks.tensors"]
    arguments = [role, url, str(tensors)]
    environment = {**os.environ, "PIPELINE_PAYLOADS": mode}
    worker = subprocess.Popen([*command, "work", *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    assert worker.stdout is not None
    worker.stdout.readline()
    produced = subprocess.run(
        [*command, "produce", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
        env=environment,
    )
    output, _ = worker.communicate(timeout=60)
    return json.loads(produced.stdout), json.loads(output)


def _bound() -> float:
    """Milliseconds of two copies and a sum, here and now, in warm memory."""
    source, target = np.ones(HUNDRED, np.float32), np.zeros(HUNDRED, np.float32)
    copies, sums = [], []
    for _ in range(7):
        started = time.perf_counter()
        np.copyto(target, source)
        copied = time.perf_counter()
        target.sum()
        copies.append(copied - started)
        sums.append(time.perf_counter() - copied)
    return 1000 * float(2 * np.median(copies) + np.median(sums))


# -- ours ----------------------------------------------------------------------------------------------------------


def check(pixels: Any) -> None:
    total = float(np.asarray(pixels).sum())
    if total != pixels.size:
        raise AssertionError(f"the sum is {total}, not {pixels.size}")


async def work_ours(role: str, url: str, tensors: int) -> list[float]:
    app, ends = Pipeline("bench-worker", url), []

    def ended(number: int) -> None:
        ends.extend([time.time()] * number)
        if len(ends) == tensors:
            app.stop()

    if role == "large":

        @app.subscriber(large, group="bench", run_in="loop")
        def one(image: Image) -> None:
            check(np.asarray(image.pixels))
            ended(1)
    else:

        @app.subscriber(images, group="bench", batch=Batch(16), run_in="loop")
        def many(batch: list[Image]) -> None:
            for image in batch:
                check(np.asarray(image.pixels))
            ended(len(batch))

    serving = asyncio.create_task(app.serve())
    await app.ready.wait()
    print("ready", flush=True)
    await serving
    return ends


async def produce_ours(role: str, url: str, tensors: int) -> list[float]:
    began = []
    async with Pipeline("bench-producer", url) as app:
        if role == "large":
            image = Image(pixels=np.ones(HUNDRED, np.float32))
            for _ in range(tensors):
                began.append(time.time())
                await app.publish(large, image)
                await asyncio.sleep(0.4)
            return began
        many = [Image(pixels=np.ones(SHAPE, np.float32)) for _ in range(PIPELINE)]
        began.append(time.time())
        for start in range(0, tensors, PIPELINE):
            await app.publish(images, many[: tensors - start])
    return began


# -- raw redis-py --------------------------------------------------------------------------------------------------


async def produce_raw(role: str, url: str, tensors: int) -> list[float]:
    """Eight a pipeline; it rests while 64 wait, as our channel's capacity makes us rest."""
    many = [np.ones(SHAPE, np.float32) for _ in range(PIPELINE)]
    began = [time.time()]
    async with aredis.Redis.from_url(url) as client:
        for start in range(0, tensors, PIPELINE):
            pipe = client.pipeline(transaction=False)
            for number in range(start, min(start + PIPELINE, tensors)):
                data = many[number - start].tobytes()
                if role == "stream":
                    pipe.xadd("raw", {"d": data})
                else:
                    pipe.set(f"raw:{number}", data)
                    pipe.rpush("raw", number)
            await pipe.execute()
            while await (client.xlen("raw") if role == "stream" else client.llen("raw")) > 56:  # type: ignore[misc]  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    return began


async def work_raw(role: str, url: str, tensors: int) -> list[float]:
    ends: list[float] = []
    async with aredis.Redis.from_url(url) as client:
        if role == "stream":
            await client.xgroup_create("raw", "g", id="0", mkstream=True)
        print("ready", flush=True)
        while len(ends) < tensors:
            pipe = client.pipeline(transaction=False)
            if role == "stream":
                found: Any = await client.xreadgroup("g", "c", {"raw": ">"}, count=PIPELINE, block=1000)
                entries = found[0][1] if found else []
                bodies = [fields[b"d"] for _, fields in entries]
                for id_, _ in entries:
                    pipe.xack("raw", "g", id_)
                    pipe.xdel("raw", id_)
            else:
                taken: Any = await client.blmpop(1, 1, "raw", direction="LEFT", count=PIPELINE)  # type: ignore[misc]
                keys = [f"raw:{number.decode()}" for number in taken[1]] if taken else []
                bodies = await client.mget(keys) if keys else []
                for key in keys:
                    pipe.delete(key)
            for body in bodies:
                check(np.frombuffer(body, np.float32))
                ends.append(time.time())
            if bodies:
                await pipe.execute()
    return ends


# -- the limit -----------------------------------------------------------------------------------------------------

RING = Path("/dev/shm/pipeline-benchmark-ring")


def ring() -> np.ndarray[Any, Any]:
    with RING.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.float32).reshape(SLOTS, -1)


async def work_limit(role: str, url: str, tensors: int) -> list[float]:
    """Sum what the other side copied into a warm ring; two named pipes say which slots are whose. Nothing else."""
    size = int(np.prod(SHAPE))
    RING.write_bytes(bytes(4 * SLOTS * size))
    full, free = RING.with_suffix(".full"), RING.with_suffix(".free")
    for path in (full, free):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    print("ready", flush=True)
    with full.open("rb", buffering=0) as reading, free.open("wb", buffering=0) as writing:
        slots = ring()
        writing.write(bytes(range(SLOTS)))
        done = 0
        while done < tensors:
            for slot in reading.read(SLOTS):
                check(slots[slot])
                writing.write(bytes([slot]))
                done += 1
    for path in (full, free, RING):
        path.unlink()
    return [time.time()]


async def produce_limit(role: str, url: str, tensors: int) -> list[float]:
    image = np.ones(SHAPE, np.float32).reshape(-1)
    full, free = RING.with_suffix(".full"), RING.with_suffix(".free")
    with full.open("wb", buffering=0) as writing, free.open("rb", buffering=0) as reading:
        slots = ring()
        for slot in slots:
            slot[:] = image  # every page is there
        began = time.time()
        sent = 0
        while sent < tensors:
            for slot in reading.read(min(SLOTS, tensors - sent)):
                np.copyto(slots[slot], image)
                writing.write(bytes([slot]))
                sent += 1
        while reading.read(SLOTS):
            """Until the other side is through."""
    return [began]


SIDES: dict[tuple[str, str], Callable[[str, str, int], Any]] = {
    ("produce", "ours"): produce_ours,
    ("produce", "large"): produce_ours,
    ("work", "ours"): work_ours,
    ("work", "large"): work_ours,
    ("produce", "limit"): produce_limit,
    ("work", "limit"): work_limit,
}

if __name__ == "__main__":
    side, role, url, tensors = sys.argv[1:5]
    main = SIDES.get((side, role)) or (produce_raw if side == "produce" else work_raw)
    print(json.dumps(asyncio.run(main(role, url, int(tensors)))))

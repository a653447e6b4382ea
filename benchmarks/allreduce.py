"""The mean of a float32 vector over worker processes of one host, every worker getting it; and the physical limit.

`python -m benchmarks.allreduce SIDE URL RANK WORKERS` is one worker.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pipeline.server import Server

from .report import Figure

__all__ = ["aggregating", "run"]

Vector = npt.NDArray[np.float32]
Reduce = Callable[[Vector], object]

SIZES = {"4 kB": 1_000, "1 MB": 250_000, "10 MB": 2_500_000, "100 MB": 25_000_000}
"""Values of a vector."""
WORKERS = (2, 4)
SIDES = {
    "shm": "ours, shared memory",
    "blobs": "ours, through Redis",
    "torch": "ours, plane torch",
    "gloo": "gloo",
    "raw": "raw redis-py SET/GET",
}
OURS = ("shm", "blobs", "torch")
PEERS = ("gloo", "raw")


def run(repeats: int, seconds: float) -> list[Figure]:
    figures = {
        (side, workers, size): Figure(
            "allreduce", f"{SIDES[side]}, {size}, {workers} workers", f"ms {size} × {workers}", peer=side in PEERS
        )
        for size in SIZES
        for workers in WORKERS
        for side in SIDES
    }
    copies = {size: Figure("allreduce", f"memcpy, {size}", f"ms {size}", peer=True) for size in SIZES}
    with Server() as server, aggregating(server.url, payloads="blobs"):
        for _ in range(repeats):
            for workers in WORKERS:
                for side in SIDES:
                    for size, milliseconds in _measure(side, server.url, workers, seconds).items():
                        figures[side, workers, size].values.append(milliseconds)
            for size, count in SIZES.items():
                copies[size].values.append(_memcpy(count, seconds / 4))
    return [*(figure for figure in figures.values() if figure.values), *copies.values()]


@contextmanager
def aggregating(url: str, payloads: str = "auto") -> Iterator[None]:
    """An aggregator in a process of its own."""
    code = (
        "import asyncio\nfrom subscribers.aggregation import app\n"
        "async def tell():\n    await app.ready.wait(); print('ready', flush=True)\n"
        "app.on_start(lambda: asyncio.sleep(0, app.spawn(tell())))\napp.run()\n"
    )
    environment = {**os.environ, "PIPELINE_REDIS_URL": url, "PIPELINE_PAYLOADS": payloads}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def _measure(side: str, url: str, workers: int, seconds: float) -> dict[str, float]:
    """Milliseconds by size: the median of the slowest worker."""
    environment = {**os.environ, "PIPELINE_PAYLOADS": "blobs"} if side == "blobs" else {**os.environ}
    environment |= {"ALLREDUCE_RUN": f"allreduce-{secrets.token_hex(4)}", "OMP_NUM_THREADS": "1"}
    team = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.allreduce", side, url, str(rank), str(workers), str(seconds)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(workers)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in team]
    if any(process.returncode for process in team):
        raise RuntimeError(f"a worker of {side} failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {size: max(one[size] for one in found) for size in SIZES if size in found[0]}


def _memcpy(count: int, seconds: float) -> float:
    source, target = np.ones(count, np.float32), np.empty(count, np.float32)
    return 1000 * _time(lambda _: np.copyto(target, source), source, seconds, lambda done: done)


# -- a worker --------------------------------------------------------------------------------------------------------


def _time(reduce: Reduce, vector: Vector, seconds: float, agree: Callable[[float], float]) -> float:
    """Seconds of one, the median of as many as fit; `agree` makes all workers count the same."""
    reduce(vector)
    began = time.perf_counter()
    reduce(vector)
    once = agree(time.perf_counter() - began)
    times = []
    for _ in range(max(5, min(500, int(seconds / 4 / once)))):
        began = time.perf_counter()
        reduce(vector)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def work(side: str, url: str, rank: int, workers: int, seconds: float) -> dict[str, float]:
    found = {}
    for size, count in SIZES.items():
        with {"gloo": _gloo, "raw": _raw}.get(side, _ours)(side, url, rank, workers, count) as (reduce, agree):
            found[size] = 1000 * _time(reduce, np.full(count, rank + 1.0, np.float32), seconds, agree)
            mean = np.asarray(reduce(np.full(count, rank + 1.0, np.float32)))
            if not np.allclose(mean[::997], (workers + 1) / 2):
                raise AssertionError(f"{side}: {mean[:3]} is not the mean")
    return found


@contextmanager
def _ours(
    side: str, url: str, rank: int, workers: int, count: int
) -> Iterator[tuple[Reduce, Callable[[float], float]]]:
    from publishers.training import join

    plane = {"shm": "shm", "blobs": "redis", "torch": "torch"}[side]
    name = f"{os.environ['ALLREDUCE_RUN']}-{count}"
    with join(
        name, {"w": np.zeros(count, np.float32)}, plane=plane, workers=workers, rank=rank, lease=20.0, url=url,  # type: ignore[arg-type]
        metrics=False,
    ) as run:  # fmt: skip

        def agree(seconds: float) -> float:
            return float(run.all_reduce(np.full(count, seconds, np.float32))[0])

        yield run.all_reduce, agree


@contextmanager
def _gloo(
    side: str, url: str, rank: int, workers: int, count: int
) -> Iterator[tuple[Reduce, Callable[[float], float]]]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        import redis

        with redis.Redis.from_url(url, socket_timeout=None) as client:  # where the store is
            key = f"{os.environ['ALLREDUCE_RUN']}-store"
            if rank == 0:
                store = dist.TCPStore("127.0.0.1", 0, workers, is_master=True, wait_for_workers=False)
                client.rpush(key, *[store.port] * workers)
            else:
                store = dist.TCPStore("127.0.0.1", int(client.blpop([key])[1]), workers, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)

    def reduce(vector: Vector) -> Vector:
        tensor = torch.from_numpy(vector)
        dist.all_reduce(tensor)
        tensor /= workers
        return vector

    def agree(seconds: float) -> float:
        return float(reduce(np.full(1, seconds, np.float32))[0])

    yield reduce, agree


@contextmanager
def _raw(side: str, url: str, rank: int, workers: int, count: int) -> Iterator[tuple[Reduce, Callable[[float], float]]]:
    """Everybody sets its vector, tells the others, gets theirs."""
    import redis

    name = f"{os.environ['ALLREDUCE_RUN']}-{count}"
    others = [other for other in range(workers) if other != rank]
    with redis.Redis.from_url(url, socket_timeout=None) as client:
        turn = 0

        def reduce(vector: Vector) -> Vector:
            nonlocal turn
            turn += 1
            client.set(f"{name}-{rank}-{turn % 2}", vector.data.cast("B"))
            for other in others:
                client.rpush(f"{name}-to-{other}-from-{rank}", 1)
            total = vector.copy()
            for other in others:
                client.blpop([f"{name}-to-{rank}-from-{other}"])
                total += np.frombuffer(client.get(f"{name}-{other}-{turn % 2}"), np.float32)
            total /= workers
            return total

        def agree(seconds: float) -> float:
            return float(reduce(np.full(1, seconds, np.float32))[0])

        yield reduce, agree
        for _ in range(2):  # both of our keys are small then
            reduce(np.zeros(1, np.float32))


if __name__ == "__main__":
    side, url, rank, workers, seconds = sys.argv[1:6]
    print(json.dumps(work(side, url, int(rank), int(workers), float(seconds))))

"""Events a second, end to end: one producer process, one worker process, 206 B events, counted at both ends."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import redis

from pipeline.server import Server

from .report import Figure

__all__ = ["run"]


@dataclass(frozen=True)
class Setup:
    name: str
    module: str
    role: str
    rate: float
    """Roughly expected events/s: how many events fill the time."""
    peer: bool = False


OURS = (
    Setup("one at a time, async def", "ours", "one-async", 250_000),
    Setup("one at a time, plain function", "ours", "one-plain", 250_000),
    Setup("batch handlers", "ours", "batches", 300_000),
    Setup("with outputs committed", "ours", "through", 150_000),
    Setup("live channel", "ours", "live", 250_000),
)
PEERS = (
    Setup("raw redis-py stream", "raw", "stream", 40_000, peer=True),
    Setup("raw redis-py Pub/Sub", "raw", "live", 45_000, peer=True),
)
FASTSTREAM = (
    Setup("FastStream stream", "faststream_peer", "one", 2_500, peer=True),
    Setup("FastStream batch", "faststream_peer", "batches", 15_000, peer=True),
)


QUEUES = {
    "taskiq_redis": Setup("Taskiq stream", "queue_peers", "taskiq", 2_500, peer=True),
    "dramatiq": Setup("Dramatiq", "queue_peers", "dramatiq", 1_500, peer=True),
    "arq": Setup("arq", "queue_peers", "arq", 1_000, peer=True),
    "glide": Setup("valkey-glide stream", "queue_peers", "glide", 40_000, peer=True),
}


def run(repeats: int, seconds: float) -> list[Figure]:
    """Every set-up in turn, repeated: what drifts, drifts for all."""
    setups = OURS + PEERS + (FASTSTREAM if importlib.util.find_spec("faststream") else ())
    setups += tuple(setup for module, setup in QUEUES.items() if importlib.util.find_spec(module))
    figures = {setup: Figure("events", setup.name, "events/s", peer=setup.peer) for setup in setups}
    with Server() as server:
        for _ in range(repeats):
            for setup in setups:
                figures[setup].values.append(once(setup, server.url, int(setup.rate * seconds)))
    return list(figures.values())


def once(setup: Setup, url: str, events: int) -> float:
    """Start the worker, then the producer; events/s from the first publish to the last event handled."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
    command = [sys.executable, "-m", f"benchmarks.{setup.module}"]
    arguments = [setup.role, url, str(events)]
    worker = subprocess.Popen([*command, "work", *arguments], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.strip() == "ready":
            break
    produced = subprocess.run(
        [*command, "produce", *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    try:
        output, _ = worker.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        worker.kill()
        raise RuntimeError(f"{setup.name}: the worker has not seen all {events} events") from None
    sent: dict[str, Any] = json.loads(produced.stdout.splitlines()[-1])
    seen: dict[str, Any] = json.loads(output.splitlines()[-1])
    return events / (seen["ended"] - sent["began"])

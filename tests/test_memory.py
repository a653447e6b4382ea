"""Falling behind and being held back cost no memory: the events wait in Redis, not in the process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from pipeline import Pipeline

from .workers import Number, Worker, backlog

EVENTS = 1_000_000


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_a_worker_a_million_events_behind_stays_small(valkey_url: str) -> None:
    async with Pipeline("app", valkey_url) as app:
        with Worker("slow", valkey_url) as worker:
            many = [Number(n=n) for n in range(10_000)]
            for _ in range(EVENTS // len(many)):
                await app.publish(backlog, many)
            most = 0
            for _ in range(20):
                await asyncio.sleep(0.05)
                most = max(most, resident(worker.pid))
            behind = (await app.stats()).channels["backlog"].groups["g"]
    assert behind.lag + behind.pending > 0.9 * EVENTS
    assert most < 200 << 20, f"{most >> 20} MiB"


async def test_a_publisher_held_back_stays_flat(valkey_url: str) -> None:
    async with Pipeline("app", valkey_url) as app:
        with Worker("unbounded_publisher", valkey_url) as publisher:

            async def held_back() -> bool:
                channels = (await app.stats()).channels
                return "full" in channels and channels["full"].published >= 9_000

            async with asyncio.timeout(20):
                while not await held_back():
                    await asyncio.sleep(0.05)
            before = resident(publisher.pid)
            await asyncio.sleep(2)
            after = resident(publisher.pid)
            assert (await app.stats()).channels["full"].published <= 10_000
    assert after - before < 4 << 20, f"{before >> 20} → {after >> 20} MiB"

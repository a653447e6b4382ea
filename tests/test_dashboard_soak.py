"""Ten minutes at 6,000 events/s: neither the dashboard nor the browser grows. `SOAK_SECONDS` makes it shorter."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import Any

import psutil
import pytest

from benchmarks.dashboard import browser_page, load, ours
from pipeline.server import Server

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
RATE = 6000.0
WARM = 90.0
"""Seconds until windows of a minute are full and everything has been loaded."""
MOST = 1.0
"""MB a minute that is no growth: the allocators' own."""


@pytest.mark.soak
async def test_memory_is_flat_on_both_sides_for_ten_minutes() -> None:
    with Server() as server, load(server.url, RATE), ours(server.url) as (address, pid):
        process = psutil.Process(pid)
        await asyncio.sleep(3)
        async with browser_page() as page:
            await page.goto(f"{address}/?window=60")
            session = await page.context.new_cdp_session(page)
            began, server_sizes, heap_sizes = time.monotonic(), [], []
            cpu = sum(process.cpu_times()[:2])
            while (now := time.monotonic() - began) < SECONDS:
                if now > min(WARM, SECONDS / 3):
                    server_sizes.append((now, float(process.memory_info().rss)))
                    heap_sizes.append((now, float(await _heap(session))))
                await page.wait_for_timeout(5000)
            used = (sum(process.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
            assert await page.locator("#state").text_content() == "live"
    for side, sizes in (("server", server_sizes), ("browser", heap_sizes)):
        print(f"\n{side}: {sizes[-1][1] / 1e6:.0f} MB, {_growth(sizes):+.2f} MB/min over {SECONDS:.0f} s")
    print(f"server: {100 * used:.1f} % of a core")
    assert _growth(server_sizes) < MOST
    assert _growth(heap_sizes) < MOST


async def _heap(session: Any) -> int:
    await session.send("HeapProfiler.collectGarbage")
    return int((await session.send("Runtime.getHeapUsage"))["usedSize"])


def _growth(sizes: list[tuple[float, float]]) -> float:
    """MB a minute."""
    times, values = zip(*sizes, strict=True)
    return statistics.linear_regression(times, values).slope * 60 / 1e6

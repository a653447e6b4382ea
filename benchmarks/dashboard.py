"""The dashboard under 5,000 events/s on 12 channels and 20 training runs: how late pixels are, how smooth, how dear."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psutil
import websockets

from pipeline.server import Server

from .report import Figure

__all__ = ["CHROMIUM", "Measured", "browser_page", "load", "ours", "run", "watch_heap", "watch_page"]

RATE = 5000.0
WARM = 30.0
"""Seconds of load before anything is measured; afterwards a window of half a minute is full."""
PAGES = ("overview", "training", "serving")
CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --enable-precise-memory-info".split()
COUNT_FRAMES = """() => {
  window.frames_ = [];
  const count = (t) => { window.frames_.push(t); requestAnimationFrame(count); };
  requestAnimationFrame(count);
}"""
FOLLOW_PEER = """() => {
  window.pipelineMeasures = [];
  let before = 0;
  const look = () => {
    const figure = document.querySelector('#waiting .js-plotly-plot');
    const closed = figure?.layout?.meta?.closed;
    if (closed && closed !== before) {
      before = closed;
      requestAnimationFrame(() => window.pipelineMeasures.push(
        {closed: 1000 * figure.layout.meta.tick, drawn: Date.now(), bucket: closed}));
    }
    requestAnimationFrame(look);
  };
  look();
}"""


class Measured:
    """What one browser saw."""

    def __init__(self) -> None:
        self.late: list[float] = []
        """ms from the tick that closed a bucket to its pixels."""
        self.event: list[float] = []
        """ms from the middle of the newest bucket drawn, where its events were published on average."""
        self.frames: dict[str, float] = {}
        """Frames a second, by page."""
        self.heap: list[tuple[float, float]] = []
        """(seconds, bytes in use after a collection)."""
        self.cpu = 0.0
        """Cores' worth of the server."""

    def growth(self) -> float:
        """MB a minute, by a straight line."""
        if len(self.heap) < 2:
            return 0.0
        times, sizes = zip(*self.heap, strict=True)
        slope = statistics.linear_regression(times, sizes).slope
        return slope * 60 / 1e6


def run(repeats: int, seconds: float) -> list[Figure]:
    """`seconds` for each of: one viewer, ten viewers, the peer with one. At least 12."""
    seconds = max(12.0, seconds)
    figures: dict[str, Figure] = {}
    for _ in range(repeats):
        with Server() as server, load(server.url):
            time.sleep(WARM)
            for name, viewers in (("1 viewer", 1), ("10 viewers", 10)):
                with ours(server.url) as (address, pid):
                    found = asyncio.run(_measure(address, pid, viewers, seconds))
                _note(figures, f"ours, {name}", found, peer=False)
            with peer(server.url) as (address, pid):
                _note(figures, "dcc.Interval, 1 viewer", asyncio.run(_measure_peer(address, pid, seconds)), peer=True)
    return list(figures.values())


def _note(figures: dict[str, Figure], name: str, found: Measured, peer: bool) -> None:
    def add(what: str, unit: str, value: float) -> None:
        figure = figures.setdefault(f"{name}, {what}", Figure("dashboard", f"{name}, {what}", unit, peer=peer))
        figure.values.append(value)

    for what, values in (("bucket closed to pixels", found.late), ("event to pixels", found.event)):
        add(f"{what}, p50", "ms p50" if "bucket" in what else "ms p50 event", statistics.median(values))
        add(f"{what}, p95", "ms p95" if "bucket" in what else "ms p95 event", statistics.quantiles(values, n=20)[-1])
    for page, rate in found.frames.items():
        add(f"frames on {page}", "fps", rate)
    add("server", "% of a core", 100 * found.cpu)
    if found.heap:
        add("heap growth", "MB/min", found.growth())


# -- processes ---------------------------------------------------------------------------------------------------


@contextmanager
def load(url: str, rate: float = RATE) -> Iterator[None]:
    with _process("-m", "benchmarks.dashboard_load", url, str(rate)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield


@contextmanager
def ours(url: str) -> Iterator[tuple[str, int]]:
    """Our dashboard: its address and process id."""
    with _process("-m", "dashboards", "--port", "0", "--url", url) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process.pid


@contextmanager
def peer(url: str) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with _process("-m", "benchmarks.dashboard_peer", url, str(port)) as process:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid


@contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


# -- measuring ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def browser_page() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright  # of the tests

    binary = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary, args=CHROMIUM)
        yield await browser.new_page(viewport={"width": 1400, "height": 1300})
        await browser.close()


async def _measure(address: str, pid: int, viewers: int, seconds: float) -> Measured:
    found, process = Measured(), psutil.Process(pid)
    async with browser_page() as page:
        others = [asyncio.create_task(_listen(address)) for _ in range(viewers - 1)]
        await asyncio.sleep(3)
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        for name in PAGES:
            path = {"overview": "/", "training": "/training?runs=all"}.get(name, f"/{name}")
            await watch_page(page, f"{address}{path}", name, seconds / len(PAGES), found)
        found.cpu = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
        if viewers == 1:
            await watch_heap(page, f"{address}/?window=30", seconds / 2, found)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return found


async def watch_page(page: Any, url: str, name: str, seconds: float, found: Measured) -> None:
    """Look at a page for so long, after it has settled."""
    await page.goto(url)
    await page.wait_for_function("window.pipelineMeasures?.length > 3", timeout=30_000)
    await page.wait_for_timeout(1500)
    await page.evaluate("window.pipelineMeasures.length = 0")
    await page.evaluate(COUNT_FRAMES)
    await page.wait_for_timeout(1000 * seconds)
    await _collect(page, name, found)


async def watch_heap(page: Any, url: str, seconds: float, found: Measured) -> None:
    """The browser's memory in use, every few seconds, each after a collection."""
    await page.goto(url)
    await page.wait_for_timeout(5000)
    session = await page.context.new_cdp_session(page)
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        await session.send("HeapProfiler.collectGarbage")
        usage = await session.send("Runtime.getHeapUsage")
        found.heap.append((now, usage["usedSize"]))
        await page.wait_for_timeout(2500)


async def _collect(page: Any, name: str, found: Measured) -> None:
    frames = await page.evaluate("window.frames_")
    found.frames[name] = 1000 * (len(frames) - 1) / (frames[-1] - frames[0])
    measures = await page.evaluate("window.pipelineMeasures")
    found.late += [one["drawn"] - one["closed"] for one in measures]
    found.event += [one["drawn"] - 1000 * (one["bucket"] - 0.5) for one in measures if one.get("bucket")]


async def _listen(address: str) -> None:
    """A viewer without a browser."""
    async with websockets.connect(address.replace("http", "ws") + "/feed", max_size=None) as viewer:
        await viewer.send(json.dumps({"page": "overview"}))
        async for _ in viewer:
            """As a browser would take it."""


async def _measure_peer(address: str, pid: int, seconds: float) -> Measured:
    found, process = Measured(), psutil.Process(pid)
    async with browser_page() as page:
        await page.goto(address)
        await page.evaluate(FOLLOW_PEER)
        await page.wait_for_function("window.pipelineMeasures.length > 3", timeout=60_000)
        await page.evaluate("window.pipelineMeasures.length = 0")
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        await page.evaluate(COUNT_FRAMES)
        await page.wait_for_timeout(1000 * seconds)
        found.cpu = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
        await _collect(page, "overview", found)
    return found

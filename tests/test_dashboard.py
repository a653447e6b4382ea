"""The dashboard, in a real browser against real processes: what it shows is what there is, also after an outage."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import websockets
from playwright.async_api import Page, async_playwright

from dashboards.series import MOST, Chart
from pipeline import Channel, Event, Pipeline
from pipeline.server import Server

from .apps import serving
from .processes import line_with

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


class Reading(Event):
    n: int


readings = Channel("readings", Reading)


@contextmanager
def dashboard(url: str, **environment: str) -> Iterator[str]:
    """A dashboard process; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboards", "--port", "0", "--url", url],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield line_with("http://", process).split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) is not None
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(appendonly=True, appendfsync="always") as server:
        yield server


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """A page that fails the test on console errors and on requests to anywhere else."""
    binary = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    assert binary is not None, "no chromium on PATH; install it: `apt-get install chromium`"
    wrong: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary, args=QUIET)
        page = await browser.new_page(viewport={"width": 1300, "height": 1800})
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if _local(request.url) else wrong.append(f"external: {request.url}"))
        yield page
        await browser.close()
    expected = ("ERR_CONNECTION_REFUSED", "WebSocket connection")
    assert [text for text in wrong if not any(part in text for part in expected)] == []


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


async def drawn(page: Page, channel: str) -> float:
    """Events of a channel in the chart: the sum over its points."""
    total = await page.evaluate(
        """name => { const plot = document.getElementById('chart-rate');
        const trace = (plot.data || []).find(t => t.name === name);
        return trace ? trace.y.reduce((sum, y) => sum + (y || 0), 0) : 0; }""",
        channel,
    )
    return float(total)


async def shows(page: Page, channel: str, events: int, seconds: float = 20) -> None:
    """Wait until chart and table show exactly so many events."""
    row = page.locator("#channels tbody tr", has_text=channel).first
    text = ""
    async with asyncio.timeout(seconds):
        while True:
            if await row.count():
                text = (await row.locator("td").nth(2).text_content() or "").replace(",", "")
            if text == str(events) and await drawn(page, channel) == events:
                return
            await asyncio.sleep(0.1)


@pytest.mark.browser
async def test_what_is_drawn_is_what_was_published_and_a_late_viewer_sees_it_too(server: Server, page: Page) -> None:
    app = Pipeline("publisher", server.url)

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        """Nothing to do."""

    with dashboard(server.url) as address:
        await page.goto(address)
        await page.wait_for_selector(".pill.stale, .pill.live")
        async with app, serving(app):
            for n in range(30):
                await app.publish(readings, [Reading(n=n)] * 37)
                await asyncio.sleep(0.05)
            await shows(page, "readings", 30 * 37)
            await page.wait_for_selector(".pill.live")
            assert page.context.browser is not None
            late = await page.context.browser.new_page()
            await late.goto(address)
            await shows(late, "readings", 30 * 37)
            assert (await app.stats()).channels["readings"].published == 30 * 37
            assert "balances" in (
                await late.locator("#channels tbody tr", has_text="readings").first.text_content() or ""
            )
            await late.close()


@pytest.mark.browser
async def test_the_page_tells_when_redis_is_gone_and_recovers_with_exact_counts(server: Server, page: Page) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(readings, [Reading(n=n) for n in range(500)])
            await page.goto(address)
            await shows(page, "readings", 500)
            server.kill()
            await page.wait_for_selector("#banner:not([hidden])", timeout=15_000)
            assert "pipeline server" in (await page.locator("#banner").text_content() or "")
            await asyncio.to_thread(server.start)
            await app.publish(readings, [Reading(n=n) for n in range(250)])
            await page.wait_for_selector("#banner", state="hidden", timeout=15_000)
            await shows(page, "readings", 750)


@pytest.mark.browser
async def test_an_empty_page_says_what_to_type_and_both_themes_work(server: Server, page: Page) -> None:
    with dashboard(server.url) as address:
        await page.goto(address)
        await page.wait_for_selector("#empty-loss:visible")
        assert "python -m publishers.training" in (await page.locator("#empty-loss").text_content() or "")
        first = await page.evaluate("document.documentElement.dataset.theme")
        await page.click("#theme")
        assert await page.evaluate("document.documentElement.dataset.theme") != first


async def test_numbers_for_programs(server: Server) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(readings, [Reading(n=n) for n in range(42)])
            async with asyncio.timeout(15):
                while True:
                    found = await asyncio.to_thread(_json, f"{address}/api/series")
                    rate = found["charts"].get("rate", {}).get("readings", [[], []])
                    if sum(rate[1]) == 42:
                        break
                    await asyncio.sleep(0.2)
    assert found["tiles"]["published"] == 42


async def test_a_slow_viewer_gets_a_snapshot_and_holds_up_nobody(server: Server) -> None:
    with dashboard(server.url) as address:
        feed = address.replace("http", "ws") + "/feed"
        async with websockets.connect(feed, max_queue=1) as slow, websockets.connect(feed) as quick:
            kinds = [json.loads(await quick.recv())["kind"] for _ in range(5)]
            assert kinds == ["snapshot", "delta", "delta", "delta", "delta"]
            assert json.loads(await slow.recv())["kind"] == "snapshot"


async def test_foreign_pages_and_strangers_are_refused(server: Server) -> None:
    with dashboard(server.url, PIPELINE_TOKEN="s3cret") as address:
        feed = address.replace("http", "ws") + "/feed"
        bearer = {"Authorization": "Bearer s3cret"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(_json, f"{address}/api/series")
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(feed)
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(feed, additional_headers=bearer, origin="http://evil.example")  # type: ignore[arg-type]
        async with websockets.connect(feed, additional_headers=bearer) as socket:
            assert json.loads(await socket.recv())["kind"] == "snapshot"
        assert "kind" in await asyncio.to_thread(_json, f"{address}/api/series", bearer)


def test_a_taken_port_is_one_clear_line(server: Server) -> None:
    with dashboard(server.url) as address:
        port = address.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "dashboards", "--port", port],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert second.returncode == 1
    assert second.stderr.startswith(f"dashboard: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_a_series_holds_its_newest_points() -> None:
    chart = Chart()
    for n in range(MOST + 10):
        chart.add("a", n, 2 * n)
    xs, ys = chart.snapshot()["a"]
    assert (len(xs), xs[0], ys[-1]) == (MOST, 10, 2 * (MOST + 9))
    assert len(chart.delta()["a"][0]) == MOST + 10
    assert chart.delta() == {}


def _json(url: str, headers: dict[str, str] | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5) as response:
        return json.load(response)

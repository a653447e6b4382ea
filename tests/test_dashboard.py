"""The dashboard, in a real browser against real processes: what it shows is what there is, also after an outage."""

from __future__ import annotations

import asyncio
import colorsys
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import pytest_asyncio
import websockets
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import Browser, Page, Route, async_playwright, expect

from dashboards.state import MOST_HISTOGRAMS
from dashboards.wire import decode
from pipeline import Channel, Event, Pipeline, Reject, Tensor
from pipeline.catalog import (
    Answer,
    Inputs,
    ModelStatus,
    Score,
    TrainingMetrics,
    answers,
    model_status,
    requests_of,
    run_starts,
    training_metrics,
)
from pipeline.catalog.compression import CODECS
from pipeline.metrics import GroupSample, WorkerSample, metrics_channel
from pipeline.server import Server

from .apps import serving
from .processes import line_with
from .programs import collect

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 30_000
"""ms to wait for what a loaded machine may take long for."""
expect.set_options(timeout=PATIENCE)
PAGES = ("/", "/channels", "/training", "/serving", "/matmul", "/workers", "/dead")


class Reading(Event):
    n: int


readings = Channel("readings", Reading)


@contextmanager
def dashboard(url: str, port: str = "0", **environment: str) -> Iterator[str]:
    """A dashboard process; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboards", "--port", port, "--url", url],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield line_with("http://", process).split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) is not None
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(appendonly=True, appendfsync="always") as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One for all, because to start it takes long; a page has a profile of its own."""
    binary = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    assert binary is not None, "no chromium on PATH; install it: `apt-get install chromium`"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary, args=QUIET)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page that fails the test on console errors and on requests to anywhere else."""
    wrong: list[str] = []
    page = await browser.new_page(viewport={"width": 1300, "height": 1400}, color_scheme="dark")
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if _local(request.url) else wrong.append(f"external: {request.url}"))
    yield page
    await page.close()
    expected = ("ERR_CONNECTION_REFUSED", "WebSocket connection", "503 (Service Unavailable)")
    assert [text for text in wrong if not any(part in text for part in expected)] == []


def _local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


async def holds(page: Page, channel: str, events: int) -> None:
    """Wait until the chart holds exactly so many events of a channel, and has drawn them."""
    await page.wait_for_function(
        """([name, events]) => {
            const held = (window.pipelineCharts.rate || {})[name];
            const drawn = (document.getElementById('chart-rate')?.data || []).find((trace) => trace.name === name);
            const sum = (values) => values.reduce((all, value) => all + (value || 0), 0);
            return held && drawn && sum(held.columns[0]) === events && sum(drawn.y) === events;
        }""",
        arg=[channel, events],
        timeout=PATIENCE,
    )


async def test_what_is_drawn_is_what_was_published_in_numbers_and_pixels_also_for_who_comes_late(
    server: Server, page: Page, browser: Browser
) -> None:
    app = Pipeline("publisher", server.url)
    others = [Channel(f"c{n:02}", Reading) for n in range(11)]

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        """Nothing to do."""

    with dashboard(server.url) as address:
        await page.goto(f"{address}/?window=60")
        async with app, serving(app):
            for _ in range(30):
                await app.publish(readings, [Reading(n=0)] * 137)
                for n, channel in enumerate(others):
                    await app.publish(channel, [Reading(n=0)] * (10 * n + 5))
                await asyncio.sleep(0.05)
            await holds(page, "readings", 30 * 137)
            for n, channel in enumerate(others):
                await holds(page, channel.name, 30 * (10 * n + 5))
            await expect(page.locator("#state")).to_have_text("live")
            await every_series_is_in_the_pixels(page, 12)
            late = await browser.new_page(viewport={"width": 1300, "height": 1400})
            await late.goto(f"{address}/?window=60")
            await holds(late, "readings", 30 * 137)
            counts = (await asyncio.to_thread(_json, f"{address}/api/series"))["counts"]["readings"]
            published = (await app.stats()).channels["readings"].published
            assert counts == {"published": published, "held": published, "base": 0}
            assert published == 30 * 137
            await late.goto(f"{address}/channels")
            row = late.locator("#grid-channels .ag-center-cols-container [row-id^=readings]")
            await expect(row).to_contain_text("balances")
            await late.close()


async def every_series_is_in_the_pixels(page: Page, expected: int) -> None:
    """Each colour of the legend is found in the picture of the chart."""
    colours = await page.evaluate(
        """() => [...document.querySelectorAll('#legend-rate .swatch')].map((one) =>
            getComputedStyle(one).backgroundColor.match(/\\d+/g).map(Number))"""
    )
    assert len(colours) == expected
    assert len({tuple(colour) for colour in colours}) == expected
    await page.mouse.move(0, 0)
    shot = Image.open(io.BytesIO(await page.locator("[data-figure=rate] .frame").screenshot())).convert("RGB")
    pixels = {pixel for _, pixel in shot.getcolors(1 << 24) or []}
    for colour in colours:
        assert any(_alike(colour, pixel) for pixel in pixels), f"{colour} is not in the picture"


def _alike(colour: list[int], pixel: tuple[int, int, int]) -> bool:
    """The same hue, as a thin line over a dark ground has it."""
    one, other = (colorsys.rgb_to_hsv(*(value / 255 for value in values)) for values in (colour, pixel))
    turn = abs(one[0] - other[0])
    return min(turn, 1 - turn) < 0.02 and abs(one[1] - other[1]) < 0.18 and other[2] > 0.45


async def test_the_page_tells_when_redis_is_gone_and_recovers_with_exact_counts(server: Server, page: Page) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(readings, [Reading(n=n) for n in range(500)])
            await page.goto(address)
            await holds(page, "readings", 500)
            server.kill()
            await expect(page.locator("#banner")).to_contain_text("pipeline server")
            await expect(page.locator("#state")).to_have_text("stale")
            assert (await page.title()).startswith("⚠")
            await asyncio.to_thread(server.start)
            await app.publish(readings, [Reading(n=n) for n in range(250)])
            await expect(page.locator("#banner")).to_be_hidden()
            await holds(page, "readings", 750)
            assert "events/s" in await page.title()


async def test_runs_are_compared_by_step_and_by_time_and_a_zoom_asks_for_finer_buckets(
    server: Server, page: Page
) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            for run in ("one", "two", "three"):
                steps = 3000 if run == "one" else 40
                await app.publish(
                    training_metrics,
                    [
                        TrainingMetrics(run=run, step=n, values={"loss": 2 / (n + 1), "accuracy": n / steps})
                        for n in range(steps)
                    ],
                )
            lone = {
                "loss": 0.5, "bytes_sent": 4e5, "bytes_raw": 1e6, "bytes_saved": 6e5, "encode_seconds": 0.002,
                "decode_seconds": 0.001,
            }  # fmt: skip
            await app.publish(training_metrics, TrainingMetrics(run="lone", step=5, values=lone))
            for run in ("lr=0.1,bs=32", "all"):
                await app.publish(training_metrics, TrainingMetrics(run=run, step=5, values={"loss": 0.4}))
            await page.goto(f"{address}/training")
            await expect(page.locator("#runs tbody tr")).to_have_count(6)
            await expect(page.locator("#runs tbody tr", has_text="lone")).to_contain_text("2.5 × in 3 ms")
            await page.wait_for_function("window.pipelineCharts.loss?.one?.x.at(-1) === 2999", timeout=PATIENCE)
            assert await page.evaluate("window.pipelineCharts.loss.one.x.length") <= 600
            await page.wait_for_function(
                "document.getElementById('chart-loss').data?.some((t) => t.mode === 'markers' && t.x.includes(5))"
            )
            await drag(page, "loss", 0.5, 0.6)
            await page.wait_for_function(
                "new URLSearchParams(location.search).has('low') && window.pipelineCharts.loss?.one?.x.length > 100"
            )
            xs = await page.evaluate("window.pipelineCharts.loss.one.x")
            assert 1400 < xs[0] < xs[-1] < 1900
            assert xs[1] - xs[0] <= 2
            await page.click("#unzoom")
            await page.click("[data-axis=time]")
            await page.wait_for_function("window.pipelineCharts.loss?.two?.x[0] > 1e9")
            await page.locator("#runs .toggle", has_text="two").click(modifiers=["Shift"])
            await page.wait_for_function("document.getElementById('chart-loss').data.filter((t) => t.name).length <= 1")
            assert "runs=two" in page.url
            assert "axis=time" in page.url
            pressed = page.locator("#runs .toggle[aria-pressed=true]")
            for run in ("lr=0.1,bs=32", "all"):
                await page.get_by_role("button", name=run, exact=True).first.click(modifiers=["Shift"])
                await expect(pressed).to_have_text([run])
                await page.goto(page.url.replace("axis=time", "axis=step&smooth=100"))
                await expect(pressed).to_have_text([run])
                await page.wait_for_function("document.getElementById('chart-loss').data?.at(-1).y.at(-1) === 0.4")


async def drag(page: Page, figure: str, start: float, end: float) -> None:
    """Over a part of a chart."""
    frame = page.locator(f"[data-figure={figure}] .frame")
    await frame.scroll_into_view_if_needed()
    box = await frame.bounding_box()
    assert box is not None
    left, wide, middle = box["x"] + 62, box["width"] - 76, box["y"] + box["height"] / 2
    await page.mouse.move(left + start * wide, middle)
    await page.mouse.down()
    await page.mouse.move(left + (start + end) / 2 * wide, middle)
    await page.mouse.move(left + end * wide, middle)
    await page.mouse.up()


async def test_time_stands_still_goes_back_and_is_kept_in_the_address(server: Server, page: Page) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(readings, [Reading(n=n) for n in range(300)])
            await app.publish(Channel("others", Reading), Reading(n=0))
            await page.goto(f"{address}/?window=60")
            await holds(page, "readings", 300)
            await page.click("#pause")
            await expect(page.locator("#state")).to_have_text("paused")
            held = await page.evaluate("window.pipelineCharts.rate.readings.x.length")
            await app.publish(readings, Reading(n=1))
            await asyncio.sleep(2.5)  # more than two buckets, of which none may come
            assert await page.evaluate("window.pipelineCharts.rate.readings.x.length") == held
            await page.reload()
            await expect(page.locator("#state")).to_have_text("paused")
            end = ended(page)
            await page.focus("#scrub input")
            await page.keyboard.press("ArrowLeft")
            await until(lambda: ended(page) == end - 1)
            await page.click("#pause")
            await page.evaluate("(() => { const now = Date.now; Date.now = () => now() + 3600e3; })()")
            await holds(page, "readings", 301)
            assert await page.evaluate("pipelineNow()") == pytest.approx(time.time(), abs=5)
            frame = page.locator("[data-figure=rate] .frame")
            await frame.focus()
            await page.keyboard.press("ArrowLeft")
            await expect(page.locator("[data-figure=latency] .cursor")).to_be_visible()
            await expect(page.locator("[data-figure=waiting] .cursor")).to_be_visible()
            toggle = page.locator("#legend-rate .toggle", has_text="readings")
            await toggle.click()
            await page.reload()
            await expect(toggle).to_have_attribute("aria-pressed", "false")
            await toggle.click()
            assert "hide=" not in page.url
            async with page.expect_download() as download:
                await page.locator("[data-figure=rate] [data-export=csv]").click()
            text = (await (await download.value).path()).read_text()
            counts = [float(line.split(",")[2]) for line in text.splitlines()[1:] if '"readings"' in line]
            assert sum(counts) == 301
            await page.evaluate(
                "void (Plotly.toImage = ((of) => (what, how) => of((window.made = what), how))(Plotly.toImage))"
            )
            async with page.expect_download() as download:
                await page.locator("[data-figure=rate] [data-export=png]").click()
            assert (await (await download.value).path()).read_bytes().startswith(b"\x89PNG")
            assert await page.evaluate(
                "[made.layout.showlegend, made.data.filter((one) => one.showlegend).length]"
            ) == [
                True,
                2,
            ]
            await app.publish(metrics_channel, crowd(MOST_HISTOGRAMS + 12))
            await expect(page.locator("#left-out-latency")).to_have_text("without 12 more, for which there is no room")
            await page.click("[data-window='300']")
            await page.click('nav a[href="/workers"]')
            await page.wait_for_selector(".page-workers")
            await page.wait_for_function(
                "location.search.includes('window=300')"
            )  # as who is given the address sees it


def crowd(groups: int) -> WorkerSample:
    """The report of a process that has handled something in so many groups."""
    counts = {"handled": 1, "dead": 0, "retried": 0, "suppressed": 0, "in_hand": 0, "busy": 0.0}
    return WorkerSample(
        app="crowd", worker="w", host="h", pid=1, version="1", started=0.0, interval=1.0, rss=1, cpu=0.0, published={},
        dropped={}, groups=[
            GroupSample(channel=f"c{n}", group="g", batches={}, batch_sizes={}, latency={40: 1}, **counts)
            for n in range(groups)
        ],
    )  # fmt: skip


def ended(page: Page) -> int:
    """Where the window of the address ends."""
    return int(parse_qs(urlsplit(page.url).query)["end"][0])


async def test_every_page_says_what_to_type_when_empty_and_is_accessible_in_both_themes_and_on_a_phone(
    server: Server, page: Page
) -> None:
    with dashboard(server.url) as address:
        await page.goto(address)
        for path in PAGES:
            await page.click(f'nav a[href="{path}"]')
            await page.wait_for_selector(f".page-{path.strip('/') or 'overview'}")
            await page.wait_for_timeout(300)
            await accessible(page, f"{path} dark")
            await page.click("#theme")
            await accessible(page, f"{path} light", runOnly="color-contrast")
            await page.click("#theme")
        for path, empty in (
            ("/dead", "No dead letters here"),
            ("/serving", "Serve one"),
            ("/channels", "Publish something"),
        ):
            await page.goto(f"{address}{path}")
            await expect(page.locator(".grid")).to_contain_text(empty)
        await page.click('nav a[href="/training"]')
        await expect(page.locator("#empty-loss")).to_contain_text("python -m publishers.training")
        await page.set_viewport_size({"width": 390, "height": 844})
        for path in PAGES:
            await page.click("#burger")
            await page.click(f'nav a[href="{path}"]')
            await page.wait_for_selector(f".page-{path.strip('/') or 'overview'}")
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{path} is {wide} px wide on a phone"


async def accessible(page: Page, what: str, **options: str) -> None:
    found = await Axe().run(page, options={"resultTypes": ["violations"], **options})
    broken = [(one["id"], [node["target"] for node in one["nodes"]][:4]) for one in found.response["violations"]]
    assert broken == [], what


async def test_a_run_is_started_from_the_page(server: Server, page: Page) -> None:
    with dashboard(server.url) as address:
        await page.goto(f"{address}/training")
        await expect(page.locator("#smoothing-by")).to_be_visible()
        await page.click("#start-run")
        await expect(page.locator("#field-compress option")).to_have_text(list(CODECS))
        await page.fill("#field-run", "mine")
        await page.select_option("#field-mode", "local")
        await page.select_option("#field-compress", "powersgd")
        await page.locator("#dialog button[type=submit]").click()
        await expect(page.locator(".toast.good")).to_contain_text("run mine is asked for")
    async with Pipeline("t", server.url) as app:
        [started] = await collect(app, run_starts, 1)
    assert (started.event.run, started.event.mode, started.event.compress) == ("mine", "local", "powersgd")


async def test_a_dead_letter_is_replayed_a_group_paused_and_an_event_published_from_the_page(
    server: Server, page: Page
) -> None:
    app, refuse, handled = Pipeline("worker", server.url), True, []

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        if refuse:
            raise Reject("the sensor is off")
        handled.append(event.n)

    with dashboard(server.url) as address:
        async with app, serving(app):
            await app.publish(readings, [Reading(n=n) for n in range(3)])
            await page.goto(f"{address}/dead")
            rows = page.locator("#grid-dead .ag-center-cols-container .ag-row")
            await expect(rows).to_have_count(3)
            await expect(rows.first.locator("[col-id=time]")).to_have_text(re.compile(r"^[\d.]+ (ms|s|min)$"))
            await rows.first.locator("[col-id=reason]").click()
            await expect(page.locator("#letter")).to_contain_text("the sensor is off")
            await expect(page.locator("#letter .tree")).to_contain_text("n")
            refuse = False
            await page.locator("#grid-dead .ag-row [type=checkbox]").first.click()
            await expect(page.locator("#chosen")).to_have_text("1 chosen")
            await page.click("#replay")
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.locator(".toast.good")).to_contain_text("replayed 1")
            await until(lambda: len(handled) == 1)
            await expect(rows).to_have_count(2)
            await page.click("#replay-all")
            await page.locator("#dialog button[type=submit]").click()
            await until(lambda: sorted(handled) == [0, 1, 2])
            await page.goto(f"{address}/channels?channel=readings")
            await page.get_by_role("button", name="Pause g").click()
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.get_by_role("button", name="Resume g")).to_be_visible()
            slow: list[Route] = []

            async def first_is_slow(route: Route) -> None:
                if slow:
                    await route.continue_()
                slow.append(route)

            await page.route("**/api/channels/**", first_is_slow)
            await page.click("#publish")
            await page.fill("#field-n", "41")
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.locator("#dialog")).to_be_hidden()
            assert 41 not in handled
            await page.get_by_role("button", name="Resume g").click()
            await until(lambda: 41 in handled)
            await expect(page.locator("#events")).to_contain_text('{"n":41}')
            await until(lambda: bool(slow))
            await page.locator("#events summary").first.focus()
            await slow[0].continue_()
            for _ in range(2):  # the slow one, and the list is read again every few seconds
                await page.wait_for_event("response", lambda response: "/api/channels/" in response.url)
            await expect(page.locator("#events summary").first).to_be_focused()
        audit = await asyncio.to_thread(_json, f"{address}/api/audit")
        assert [one["action"] for one in audit] == ["resume", "publish", "pause", "replay", "replay"]


async def test_what_is_done_is_done_to_the_channel_that_is_shown(server: Server, page: Page) -> None:
    app, others = Pipeline("worker", server.url), Channel("others", Reading)

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        raise Reject("the sensor is off")

    @app.subscriber(others, group="g")
    async def more(event: Reading) -> None:
        raise Reject(f"{event.n} is {'odd' if event.n % 2 else 'even'}")

    with dashboard(server.url) as address:
        async with app, serving(app):
            await app.publish(readings, [Reading(n=n) for n in range(3)])
            await app.publish(others, [Reading(n=n) for n in range(2)])
            await page.goto(f"{address}/channels")
            for channel in ("readings", "others"):
                await page.locator(f"#grid-channels .ag-center-cols-container [row-id^={channel}]").click()
                await expect(page.locator("#channel-name")).to_have_text(channel)
            await page.get_by_role("button", name="Pause g").click()
            await expect(page.locator("#dialog")).to_contain_text("from others")
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.get_by_role("button", name="Resume g")).to_be_visible()
            await page.goto(f"{address}/dead?channel=readings")
            rows = page.locator("#grid-dead .ag-center-cols-container .ag-row")
            await expect(rows).to_have_count(3)
            asked, goes_on = asyncio.Event(), asyncio.Event()

            async def held(route: Route) -> None:
                asked.set()
                await goes_on.wait()
                await route.continue_()

            await page.route("**/api/dead", held)
            await app.publish(readings, Reading(n=3))  # its letter begins a load, during which another is chosen
            await asyncio.wait_for(asked.wait(), PATIENCE / 1000)
            await page.locator("#dead-channels button", has_text="others").click()
            await page.click("#drop-all")
            # The new letter is among them if a load before this one had still to ask for them.
            await expect(page.locator("#dialog h2")).to_have_text(re.compile(r"Drop [34] dead letters of readings\?"))
            await page.get_by_role("button", name="Cancel").click()
            goes_on.set()
            await expect(rows).to_have_count(2)
            await page.get_by_role("searchbox").fill("1 is odd")
            await expect(rows).to_have_count(1)
            await page.locator("#dead-group").select_option("g")
            await page.reload()
            await expect(rows).to_have_count(1)
            await page.click("#drop-all")
            await expect(page.locator("#dialog h2")).to_have_text("Drop 1 dead letter of others in g with “1 is odd”?")
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.locator(".toast.good")).to_contain_text("dropped 1")
            await expect(page.locator("#dead-channels")).to_contain_text("others 1")
            dropped = {"channel": "readings", "reason": "sensor"}
            await asyncio.to_thread(_post, f"{address}/api/dead/drop", dropped, {})  # by somebody else
            await expect(page.locator("#dead-channels")).not_to_contain_text("readings")
            await page.route("**/api/dead?channel=*", many)
            await page.get_by_role("searchbox").fill("")
            await expect(page.locator("#chosen")).to_have_text("the newest 1 of 20,000")
            await page.click('nav a[href="/"]')
            await page.wait_for_selector(".page-overview")
            await page.go_back()
            await page.click("#drop-all")
            await expect(page.locator("#dialog h2")).to_contain_text("of others")
            await page.go_forward()
            await page.wait_for_selector(".page-overview")
            await expect(page.locator("#dialog")).to_be_hidden()
        audit = await asyncio.to_thread(_json, f"{address}/api/audit")
        assert [(one["action"], one["subject"]) for one in audit] == [
            ("drop", "readings"), ("drop", "others/g"), ("pause", "others/g"),
        ]  # fmt: skip


async def many(route: Route) -> None:
    """As if there were more letters than a page shows."""
    answer = await route.fetch()
    await route.fulfill(response=answer, json={**await answer.json(), "open": 20_000})


class Odd(Event):
    """What a page may take for something else, and what a form may make of it."""

    tensor: str
    picture: str
    id: int
    level: Literal[1, 2, 3]
    kind: Literal["a", "b"] | None = None
    loud: bool | None = None
    times: int = 2


async def test_an_event_is_shown_as_it_is_and_published_as_it_is_given(server: Server, page: Page) -> None:
    """Whatever its fields are called, and however big its numbers are."""
    odd, big = Channel("odd" * 60, Odd), 2**53 + 1
    given = Odd(tensor="mine", picture="http://evil.example/", id=big, level=3)
    app = Pipeline("app", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(odd, given)
            await page.goto(f"{address}/channels?channel={odd.name}")
            row = page.locator("#events details")
            await expect(row.locator("summary")).to_contain_text(
                f'"picture":"http://evil.example/","id":{big},"level":3'
            )
            await row.locator("summary").click()
            await expect(row.locator(".tree")).to_contain_text("mine")
            await expect(row.locator("img")).to_have_count(0)
            await page.click("#publish")
            await page.fill("#field-tensor", "m")
            await page.fill("#field-picture", "p")
            await page.fill("#field-id", str(big))
            await page.select_option("#field-level", "2")
            await page.locator("#dialog button[type=submit]").click()
            await expect(page.locator(".toast.good")).to_contain_text("published")
            [published] = await app.newest(odd, 1)
            assert published.event == Odd(tensor="m", picture="p", id=big, level=2)
            await page.set_viewport_size({"width": 390, "height": 844})
            await page.wait_for_function("document.documentElement.scrollWidth <= 390")
            await page.set_viewport_size({"width": 1300, "height": 1400})
            await app.publish(
                model_status,
                [ModelStatus(model=name, version=version, worker="w", state="serving") for name, version in MODELS],
            )
            await page.click('nav a[href="/serving"]')
            await expect(page.locator("#grid-models")).to_contain_text("mnist")
            await page.click("#load-model")
            await page.select_option("#field-model", "mnist")
            await expect(page.locator("#field-version")).to_have_value("8")


MODELS = (("imagenet", 1), ("mnist", 7))


async def test_a_silence_between_answers_is_drawn_as_one_and_what_was_asked_is_shown(
    server: Server, page: Page
) -> None:
    app, drawn = Pipeline("worker", server.url), "document.getElementById('chart-answers').data?.[0]"
    with dashboard(server.url) as address:
        async with app:
            await page.set_viewport_size({"width": 1300, "height": 300})
            await page.goto(f"{address}/serving?window=60")
            await expect(page.locator("#state")).to_have_text("live")
            await page.evaluate("pipelineCharts.inference = {old: {x: [0, 1], columns: [[1, 1]], width: 1}}")
            await page.wait_for_function("!pipelineCharts.inference.old")  # also of a chart that is not in sight
            await page.set_viewport_size({"width": 1300, "height": 1400})
            for _ in range(2):
                await app.publish(answers, [Answer(model="m", version=1)] * 6)
                await expect(page.locator("#tile-asked")).to_have_text(re.compile("[1-9]"))
                await expect(page.locator("#tile-asked")).to_have_text("0")
            await page.wait_for_function(f"{drawn}?.y.includes(0) && {drawn}.x.at(-1) + 3 < pipelineNow()")
            end = "document.getElementById('chart-answers').layout.xaxis.range[1]"
            await page.wait_for_function(f"{end} > {await page.evaluate(end)}")
            await app.publish(
                model_status,
                ModelStatus(model="faces", version=3, worker="w", state="serving", shape=[8, 8, 3], dtype="uint8"),
            )
            picture, scores = Tensor(np.zeros((8, 8, 3), np.uint8)), [Score(label="smile", probability=0.9)]
            async with asyncio.timeout(PATIENCE / 1000):
                while not await page.get_by_title("faces v3").count():
                    asked = await app.publish(requests_of("faces"), Inputs(data=picture))
                    await asyncio.sleep(0.3)  # for the dashboard to have seen it
                    await app.publish(answers, Answer(model="faces", version=3, request=asked.id, predictions=scores))
            await expect(page.locator("#pictures")).to_contain_text("smile 90 %")


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE / 1000):
        while not done():
            await asyncio.sleep(0.05)


async def test_numbers_for_programs(server: Server) -> None:
    app = Pipeline("publisher", server.url)
    with dashboard(server.url) as address:
        async with app:
            await app.publish(readings, [Reading(n=n) for n in range(42)])
            async with asyncio.timeout(30):
                while True:
                    found = await asyncio.to_thread(_json, f"{address}/api/series")
                    if found["counts"].get("readings", {}).get("held") == 42:
                        break
                    await asyncio.sleep(0.2)
            events = await asyncio.to_thread(_json, f"{address}/api/channels/readings?count=3")
    assert found["totals"]["published"] == 42
    assert sum(found["charts"]["published"]["readings"][1]) == 42
    assert [one["data"] for one in events["events"]] == [{"n": 41}, {"n": 40}, {"n": 39}]


async def test_a_slow_viewer_gets_a_snapshot_and_holds_up_nobody(server: Server) -> None:
    with dashboard(server.url) as address:
        feed = address.replace("http", "ws") + "/feed"
        async with websockets.connect(feed, max_queue=1, close_timeout=0.5) as slow, websockets.connect(feed) as quick:
            for socket in (slow, quick):
                await socket.send(json.dumps({"page": "overview"}))
            kinds = [await kind(quick) for _ in range(3)]
            assert kinds == ["snapshot", "delta", "delta"]
            assert await kind(slow) == "snapshot"


async def kind(socket: websockets.ClientConnection) -> str:
    frame = await asyncio.wait_for(socket.recv(), 20)
    assert isinstance(frame, bytes)
    return str(decode(frame)[0]["kind"])


async def test_an_outage_is_told_with_its_cure(server: Server, page: Page) -> None:
    banner = page.locator("#banner")
    with dashboard(server.url) as address:
        await page.goto(address)
        await expect(page.locator("#state")).to_have_text("live")
        await expect(banner).to_be_hidden()
    await expect(banner).to_contain_text("python -m dashboards")
    with dashboard(server.url, address.rpartition(":")[2], PIPELINE_TOKEN="s3cret"):
        await expect(banner).to_contain_text("token")


async def test_foreign_pages_and_strangers_are_refused(server: Server) -> None:
    with dashboard(server.url, PIPELINE_TOKEN="s3cret") as address:
        feed = address.replace("http", "ws") + "/feed"
        bearer = {"Authorization": "Bearer s3cret"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(_json, f"{address}/api/series")
        async with websockets.connect(feed) as socket:
            await asyncio.wait_for(socket.wait_closed(), 20)
            assert socket.close_code == 1008
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(feed, additional_headers=bearer, origin="http://evil.example")  # type: ignore[arg-type]
        async with websockets.connect(feed, additional_headers=bearer) as socket:
            await socket.send(json.dumps({"page": "workers"}))
            assert await kind(socket) == "snapshot"
            await socket.send(json.dumps({"page": "nowhere"}))
            await asyncio.wait_for(socket.wait_closed(), 20)
            assert "nowhere" in socket.close_reason
        for nonsense in ("5", "[]", "null", '"x"', "[" * 100_000, "{"):
            async with websockets.connect(feed, additional_headers=bearer) as socket:
                await socket.send(nonsense)
                await asyncio.wait_for(socket.wait_closed(), 20)
                assert socket.close_code == 1003, nonsense
        assert "counts" in await asyncio.to_thread(_json, f"{address}/api/series", bearer)
        for headers, status in (({}, "401"), ({**bearer, "Origin": "http://evil.example"}, "403")):
            with pytest.raises(urllib.error.HTTPError, match=status):
                await asyncio.to_thread(
                    _post, f"{address}/api/dead/drop", {"channel": "readings", "all": True}, headers
                )


async def test_a_taken_port_is_one_clear_line(server: Server) -> None:
    with dashboard(server.url) as address:
        port = address.rpartition(":")[2]
        second = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "dashboards", "--port", port],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert second.returncode == 1
    assert second.stderr.startswith(f"dashboard: cannot listen on 127.0.0.1:{port}: Address already in use")


def _json(url: str, headers: dict[str, str] | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5) as response:
        return json.load(response)


def _post(url: str, body: Any, headers: dict[str, str]) -> Any:
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=5) as response:
        return json.load(response)

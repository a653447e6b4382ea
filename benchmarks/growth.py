"""How events/s grow with workers (1, 2, 4) and with the size of events (64 B … 64 KiB): table and docs/growth.png."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import redis
from plotly.subplots import make_subplots

from pipeline.server import Server

from .report import Figure, machine

__all__ = ["run"]

SIZES = (64, 256, 1024, 4096, 16384, 65536)
WORKERS = (1, 2, 4)
MOST_BYTES = 400 << 20
PLOT = Path("docs/growth.png")
SIDES = ("ours", "raw redis-py stream")


def run(repeats: int, seconds: float) -> list[Figure]:
    by_size = {
        (side, size): Figure("growth", f"{side}, {size} B", f"events/s of {size} B", peer=side != "ours")
        for side in SIDES
        for size in SIZES
    }
    by_workers = {
        count: Figure("growth", f"ours, {count} workers, 1 ms of work", "events/s, 1 ms of work") for count in WORKERS
    }
    with Server() as server:
        for _ in range(repeats):
            for (side, size), figure in by_size.items():
                expected = (250_000 if side == "ours" else 45_000) * seconds
                events = int(min(expected, MOST_BYTES / (2 * size)))
                figure.values.append(once(server.url, "ours" if side == "ours" else "raw", size, events, 1, 0.0))
            for count, figure in by_workers.items():
                figure.values.append(once(server.url, "ours", 206, int(800 * count * seconds), count, 0.001))
    draw(by_size, by_workers)
    return [*by_size.values(), *by_workers.values()]


def once(url: str, side: str, size: int, events: int, workers: int, work: float) -> float:
    """Events/s from the first publish until the last event is handled, as the ledger tells."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
        command = [sys.executable, "-m", "benchmarks.growth_sides"]
        arguments = [side, url, str(events), str(size), str(work)]
        started = [
            subprocess.Popen([*command, "work", *arguments], stdout=subprocess.PIPE, text=True) for _ in range(workers)
        ]
        try:
            for process in started:
                assert process.stdout is not None
                process.stdout.readline()
            produced = subprocess.run(
                [*command, "produce", *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=300
            )
            began: float = json.loads(produced.stdout)
            deadline = time.monotonic() + 120
            while int(client.get("bench:done") or 0) < events:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{side}: {client.get('bench:done')} of {events} events were handled")
                time.sleep(0.005)
            return events / (float(client.get("bench:ended") or 0.0) - began)
        finally:
            for process in started:
                process.kill()
                process.wait()


def draw(by_size: dict[tuple[str, int], Figure], by_workers: dict[int, Figure]) -> None:
    """Write the plot with a headless Chromium, where there is one."""
    plot = make_subplots(
        1, 2, subplot_titles=("One worker, by the size of events", "1 ms of work an event, by workers")
    )
    for side, colour in zip(SIDES, ("#4C9BE8", "#888888"), strict=True):
        rates = [by_size[side, size].median for size in SIZES]
        plot.add_scatter(x=list(SIZES), y=rates, name=side, line={"color": colour}, row=1, col=1)
    sizes = list(SIZES)
    plot.add_scatter(
        x=sizes, y=[1e9 / size for size in sizes], name="1 GB/s", line={"dash": "dot", "color": "#E4637A"}, row=1, col=1
    )
    counts = list(by_workers)
    plot.add_scatter(x=counts, y=[by_workers[n].median for n in counts], name="ours", showlegend=False,
                     line={"color": "#4C9BE8"}, row=1, col=2)  # fmt: skip
    alone = [1000 * min(n, os.cpu_count() or 1) for n in counts]
    plot.add_scatter(x=counts, y=alone, name="work alone, all cores", line={"dash": "dot", "color": "#3FB68B"},
                     row=1, col=2)  # fmt: skip
    plot.update_xaxes(type="log", title="bytes", row=1, col=1)
    plot.update_xaxes(title="workers", row=1, col=2)
    plot.update_yaxes(type="log", title="events/s", row=1, col=1)
    plot.update_yaxes(rangemode="tozero", row=1, col=2)
    plot.update_layout(template="plotly_white", width=1000, height=420, title=machine(), margin={"t": 80})
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        print(f"{PLOT} needs playwright and a Chromium on PATH", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 420})
        page.set_content(plot.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        page.wait_for_selector(".main-svg")
        page.screenshot(path=PLOT)
        browser.close()

"""The usual way, to compare with: Dash with `dcc.Interval`, whose callback returns whole figures of the same data.

`python -m benchmarks.dashboard_peer URL PORT` serves it. It shares the reader and the rings with ours: only how what is
new comes to the browser differs.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import plotly.graph_objects as go
import uvicorn
from dash import Dash, Input, Output, dcc, html
from fastapi import FastAPI

from dashboards.feed import Feed
from dashboards.figures import COLOURS, on_page
from dashboards.state import State
from dashboards.streams import View, closed, series_of
from pipeline import Pipeline

INTERVAL = 500
"""Milliseconds between two updates."""


def figures(state: State, closings: dict[int, float]) -> list[go.Figure]:
    """The three charts of the overview, whole."""
    now, found = time.time(), []
    for chart in on_page("overview"):
        figure = go.Figure(layout={"uirevision": "keep", "height": 260, "showlegend": False})
        last = int(closed(state, chart.kind, now))
        for n, (name, ring) in enumerate(series_of(state, chart, View("overview"))):
            y = ring.values(0, last - 300, last)[:, 1 if chart.columns else 0]
            x = np.arange(last - 300, last, dtype=float) * 1000
            figure.add_scatter(x=x, y=y, name=name, line_color=COLOURS[n % 12])
        meta = {"closed": last, "tick": closings.get(last, now)}
        figure.update_layout(xaxis_type="date", yaxis_type="log" if chart.log else "linear", meta=meta)
        found.append(figure)
    return found


def create(url: str) -> FastAPI:
    state = State()
    feed = Feed(Pipeline("peer", url), state)

    closings: dict[int, float] = {}

    async def note_closings() -> None:
        """When each bucket was closed: what lateness is counted from, as in ours."""
        while True:
            closings.setdefault(int(closed(state, "waiting", time.time())), time.time())
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        tasks = [asyncio.create_task(feed.run()), asyncio.create_task(note_closings())]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(lifespan=lifespan)
    dash = Dash("peer", server=app, backend="fastapi", serve_locally=True)
    names = ["rate", "latency", "waiting"]
    dash.layout = html.Div([dcc.Interval(id="tick", interval=INTERVAL), *(dcc.Graph(id=name) for name in names)])

    @dash.callback([Output(name, "figure") for name in names], Input("tick", "n_intervals"))
    def update(_: int | None) -> list[go.Figure]:
        return figures(state, closings)

    return app


if __name__ == "__main__":
    uvicorn.run(create(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")

"""Served models: how many are asked, how quickly they answer, in what batches, and what they say."""

from __future__ import annotations

from typing import Any

from dash import html

from ..components import button, charts, grid, number, page, panel, text, tiles

__all__ = ["layout"]

COLUMNS = [
    text("model", "model"),
    number("version", "version", "version"),
    text("state", "state", cellClassRules={"good": "params.value === 'serving'", "bad": "params.value === 'refused'"}),
    text("worker", "worker"),
    text("kind", "kind"),
    text("device", "device"),
    number("batch", "batch"),
    number("since", "since", "ago"),
]


def layout(**_: str) -> Any:
    return page(
        "serving",
        "Serving",
        tiles(
            ("asked", "answers per second"),
            ("p50", "p50, five minutes"),
            ("p99", "p99, five minutes"),
            ("digits", "accuracy on digits"),
            ("weights", "version of the digits' weights"),
        ),
        charts("serving"),
        html.Div(
            [
                panel(
                    "Latencies of the last five minutes", html.Div(id="histogram", className="histogram"),
                    note="served models",
                ),
                panel("Why batches were released", html.Div(id="reasons", className="reasons"), note="five minutes"),
            ],
            className="halves",
        ),
        panel(
            "Models",
            grid("models", COLUMNS, "Serve one: pipeline serve subscribers.serving:app"),
            tools=html.Div(
                [button("Load a version", "load-model", "small"), button("Roll back", "rollback", "small")],
                className="actions",
            ),
        ),
        panel("Last images", html.Div(id="pictures", className="pictures")),
    )  # fmt: skip

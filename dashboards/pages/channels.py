"""Channels and groups: the ledger, and one channel in detail down to its events."""

from __future__ import annotations

from typing import Any

from dash import html

from ..components import button, charts, grid, number, page, panel, text

__all__ = ["layout"]

COLUMNS = [
    text("channel", "channel", pinned="left", flex=2, minWidth=140, maxWidth=180),
    text("group", "group", minWidth=100),
    number("published", "published", minWidth=80),
    number("rate", "a second", "rate", minWidth=74),
    number("handled", "handled", minWidth=80),
    number("lag", "unread"),
    number("pending", "pending", minWidth=70),
    number("oldest", "oldest", "seconds"),
    number("dead", "dead", minWidth=56, cellClassRules={"bad": "params.value > 0"}),
    number("retried", "retried"),
    number(
        "off", "ledger", "balance", minWidth=84,
        cellClassRules={"good": "params.value === 0", "bad": "params.value != null && params.value !== 0"},
    ),
    number("p50", "p50", "seconds"),
    number("p99", "p99", "seconds"),
    number("consumers", "workers"),
    number("retained", "kept"),
]  # fmt: skip


def layout(**_: str) -> Any:
    return page(
        "channels",
        "Channels",
        panel(
            "Channels and groups",
            grid(
                "channels", COLUMNS, "Publish something: pipeline publish CHANNEL JSON", rowSelection={
                    "mode": "singleRow", "checkboxes": False, "enableClickSelection": True,
                },
            ),
            note="a row shows its channel below",
        ),
        html.Div(
            [
                html.Div(
                    [
                        html.H2(id="channel-name", className="big"),
                        html.Span(id="channel-kind", className="note"),
                        html.Span(className="grow"),
                        html.Div(id="group-actions", className="actions"),
                        button("Publish a test event", "publish"),
                    ],
                    className="detail-head",
                ),
                charts("channels"),
                panel(
                    "Newest events",
                    html.Div(id="events", className="events"),
                    tools=button("Refresh", "refresh", "small"),
                ),
            ],
            id="detail",
            hidden=True,
        ),
    )  # fmt: skip

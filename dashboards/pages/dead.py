"""Dead letters: why, with what traceback, and what to do with them."""

from __future__ import annotations

from typing import Any

from dash import html

from ..components import aria, button, grid, number, page, panel, text

__all__ = ["layout"]

COLUMNS = [
    number("time", "when", "ago", minWidth=110),
    text("channel", "channel"),
    text("group", "group"),
    text("reason", "reason", flex=5, minWidth=220),
    number("attempts", "attempts"),
    text("event_id", "event", flex=3),
]


def layout(**_: str) -> Any:
    return page(
        "dead",
        "Dead letters",
        html.Div(id="dead-channels", className="chips", role="group", **aria(label="Channel")),
        html.Div(id="dead-filters", className="chips"),
        panel(
            "Letters",
            grid(
                "dead", COLUMNS, "No dead letters here", rowSelection={
                    "mode": "multiRow", "checkboxes": True, "headerCheckbox": True, "enableClickSelection": False,
                },
                domLayout="normal",
            ),
            tools=html.Div(
                [
                    html.Span(id="chosen", className="note", role="status"),
                    button("Replay", "replay", "primary small", disabled=True),
                    button("Drop", "drop", "danger small", disabled=True),
                    button("Replay all", "replay-all", "small", disabled=True),
                    button("Drop all", "drop-all", "small", disabled=True),
                ],
                className="actions",
            ),
        ),
        panel("Letter", html.Div("Choose a letter to see its traceback and payload", id="letter", className="letter")),
        timed=False,
    )  # fmt: skip

"""Everything at a glance: totals, alerts, what flows where, and how fast."""

from __future__ import annotations

from typing import Any

from dash import html

from ..components import aria, charts, page, panel, tiles

__all__ = ["layout"]


def layout(**_: str) -> Any:
    return page(
        "overview",
        "Overview",
        tiles(
            ("rate", "events a second"),
            ("published", "published"),
            ("waiting", "unfinished"),
            ("dead", "dead letters"),
            ("retried", "retries"),
            ("ledger", "ledger"),
            ("accuracy", "digits accuracy"),
            ("workers", "live processes"),
        ),
        html.Div(id="alert-list", className="alert-list", role="status"),
        panel(
            "Flow",
            html.Div(
                [
                    html.Div(id="flow", className="flow", tabIndex=0, role="group", **aria(label="What flows where")),
                    html.Div("Start the pipeline: make run", id="flow-empty", className="empty"),
                ],
                className="flow-frame",
            ),
            note="apps publish on channels, groups read them; numbers are events per second",
        ),
        charts("overview"),
    )

"""Training runs beside each other."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from ..components import aria, button, charts, data, page, panel

__all__ = ["layout"]


def layout(**_: str) -> Any:
    return page(
        "training",
        "Training",
        panel(
            "Runs",
            html.Div(id="runs", className="runs", tabIndex=0, role="region", **aria(label="Runs")),
            tools=button("Start a run", "start-run", "small"),
        ),
        charts("training"),
        tools=html.Div(
            [
                html.Div(
                    [
                        html.Button("by step", className="choice", **data(axis="step"), **aria(pressed="true")),
                        html.Button("by time", className="choice", **data(axis="time"), **aria(pressed="false")),
                    ],
                    className="choices", role="group", **aria(label="Horizontal axis"),
                ),
                html.Label(
                    ["smoothing", dcc.Input(id="smoothing", type="range", min=0, max=99, step=1, value=0)],
                    className="slider",
                ),
                html.Button(
                    "band", id="band", className="button", **aria(pressed="true", label="Band of lowest to highest")
                ),
                html.Button("Whole run", id="unzoom", className="button", hidden=True),
            ],
            className="tools",
        ),
    )  # fmt: skip

"""Training runs beside each other."""

from __future__ import annotations

from typing import Any, get_args

from dash import html

from pipeline.catalog import Mode
from pipeline.catalog.compression import CODECS

from ..components import aria, button, charts, data, page, panel

__all__ = ["layout"]


def layout(**_: str) -> Any:
    return page(
        "training",
        "Training",
        panel(
            "Runs",
            html.Div(id="runs", className="runs", tabIndex=0, role="region", **aria(label="Runs")),
            tools=html.Div(
                [
                    html.Button("All runs", id="all-runs", className="button small", **aria(pressed="false")),
                    button(
                        "Start a run", "start-run", "small",
                        **data(modes=" ".join(get_args(Mode)), codecs=" ".join(CODECS)),
                    ),
                ],
                className="actions",
            ),
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
                html.Span(id="smoothing", className="slider"),
                html.Button(
                    "band", id="band", className="button", **aria(pressed="true", label="Band of lowest to highest")
                ),
                html.Button("Whole run", id="unzoom", className="button", hidden=True),
            ],
            className="tools",
        ),
    )  # fmt: skip

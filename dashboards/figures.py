"""How each chart looks: Plotly figures without data; the browser adds what arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

__all__ = ["COLOURS", "FIGURES", "Figure", "specification"]

COLOURS = ("#4C9BE8", "#F2A541", "#3FB68B", "#E4637A", "#A98BE8", "#5CC8D7", "#C9B44A", "#EE8F6B")
"""Told apart by most people with colour blindness, on dark and on light."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart: its title, its y axis, and what to do when it is empty."""

    name: str
    title: str
    unit: str
    empty: str
    time: bool = True
    """x is time; else a training step."""
    log: bool = False
    bars: bool = False
    zero: bool = True


FIGURES = (
    Figure("rate", "Events per second", "events/s", "Publish something: pipeline publish CHANNEL JSON"),
    Figure("latency", "Latency, publish to handled", "ms", "Start a subscriber: pipeline serve MODULE:APP", log=True),
    Figure("lag", "Waiting, per group", "events", "Start a subscriber: pipeline serve MODULE:APP"),
    Figure("loss", "Training loss", "loss", "Start a run: python -m publishers.training", time=False, log=True),
    Figure(
        "accuracy", "Training accuracy", "share", "Log it: Metrics(run).log(step=…, accuracy=…)", time=False, zero=False
    ),
    Figure(
        "inference",
        "Inference accuracy on held-out digits",
        "%",
        "Stream digits: python -m publishers.data",
        zero=False,
    ),
    Figure(
        "batches",
        "Batches by size",
        "batches/s",
        "Start inference: pipeline serve subscribers.inference:app",
        bars=True,
    ),
    Figure(
        "predictions",
        "Answers of served models",
        "answers/s",
        "Ask one: pipeline stress picture.jpg",
        bars=True,
    ),
    Figure("matmul", "Matrix products", "GFLOP/s", "Publish jobs: python -m publishers.jobs"),
)


def specification() -> list[dict[str, Any]]:
    """Everything the browser needs to draw them."""
    return [_one(figure) for figure in FIGURES]


def _one(figure: Figure) -> dict[str, Any]:
    layout = go.Layout(
        margin={"l": 52, "r": 12, "t": 8, "b": 30},
        showlegend=False,
        hovermode="x unified",
        uirevision="keep",
        barmode="stack",
        colorway=list(COLOURS),
        font={"family": "system-ui, sans-serif", "size": 11},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={
            "type": "date" if figure.time else "linear",
            "showgrid": False,
            "tickformat": "%H:%M:%S" if figure.time else "",
            "nticks": 6,
        },
        yaxis={
            "type": "log" if figure.log else "linear",
            "rangemode": "tozero" if figure.zero else "normal",
            "title": {"text": figure.unit, "standoff": 6},
            "nticks": 5,
        },
    )
    return {
        "name": figure.name,
        "layout": layout.to_plotly_json(),
        "time": figure.time,
        "bars": figure.bars,
        "unit": figure.unit,
    }

"""What charts there are: whose series each shows, on which page, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["COLOURS", "FIGURES", "PAGES", "Figure", "on_page", "specification"]

COLOURS = (
    "#4c9be8", "#f2a541", "#3fb68b", "#e4637a", "#a98be8", "#35b5c4",
    "#c9a227", "#ee8f6b", "#7c9a3d", "#d26fc0", "#8fa3bd", "#b07c4f",
)  # fmt: skip
"""Twelve that are told apart on dark and on light, in pairs that most people with colour blindness can tell as well."""

PAGES = ("overview", "channels", "training", "serving", "matmul", "workers", "dead")

Form = Literal["line", "bars", "area"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart. `kind` names the series of `State.kinds()` it shows, or with `run` the value that runs log."""

    name: str
    page: str
    title: str
    kind: str
    unit: str
    empty: str
    """What to do when there is nothing to see."""
    form: Form = "line"
    log: bool = False
    zero: bool = True
    scale: float = 1.0
    """Drawn is the stored value times this."""
    per_second: bool = False
    """Drawn is the count of a bucket over its seconds."""
    columns: tuple[str, ...] = ()
    """Of series with several columns: which are drawn, each as a series of its own with this ending."""
    match: str = ""
    """Only series whose name begins so; "channel" for those of the view's channel."""
    run: bool = False
    top: float | None = None
    """The y axis ends here."""
    tall: bool = False
    other: str = ""
    """Another value of runs, drawn dashed in the same chart."""


_SERVE = "Start a subscriber: pipeline serve MODULE:APP"
_TRAIN = "Start a run: python -m publishers.training"
_ASK = "Ask a model: pipeline stress picture.jpg"
_JOBS = "Publish jobs: python -m publishers.jobs"

FIGURES = (
    Figure(
        "rate", "overview", "Events per second", "published", "events/s",
        "Publish something: pipeline publish CHANNEL JSON", per_second=True, tall=True,
    ),
    Figure(
        "latency", "overview", "Latency p95, publish to handled", "latency", "s", _SERVE, log=True, columns=("p95",),
    ),
    Figure("waiting", "overview", "Waiting, per group", "waiting", "events", _SERVE),
    Figure(
        "channel-rate", "channels", "Published", "published", "events/s", "Nothing was published on this channel yet",
        per_second=True, match="channel",
    ),
    Figure(
        "channel-handled", "channels", "Handled", "handled", "events/s", _SERVE, per_second=True, match="channel",
    ),
    Figure(
        "channel-latency", "channels", "Latency, publish to handled", "latency", "s", _SERVE, log=True,
        columns=("p50", "p95", "p99"), match="channel",
    ),
    Figure("channel-lag", "channels", "Unread", "lag", "events", _SERVE, match="channel"),
    Figure("channel-pending", "channels", "In hand, delayed or retrying", "pending", "events", _SERVE, match="channel"),
    Figure("channel-oldest", "channels", "Age of the oldest in hand", "oldest", "s", _SERVE, match="channel"),
    Figure(
        "channel-retried", "channels", "Retried", "retried", "events/s", "No retries", per_second=True, match="channel",
        form="bars",
    ),
    Figure(
        "channel-retained", "channels", "Frames kept in the stream", "retained", "frames", "Live channels keep none",
        match="channel",
    ),
    Figure("loss", "training", "Loss", "loss", "", _TRAIN, log=True, zero=False, run=True, tall=True),
    Figure("accuracy", "training", "Accuracy", "accuracy", "%", _TRAIN, zero=False, run=True, scale=100, tall=True),
    Figure("gradient_norm", "training", "Gradient norm", "gradient_norm", "", _TRAIN, log=True, zero=False, run=True),
    Figure("staleness", "training", "Staleness", "staleness", "rounds", _TRAIN, run=True),
    Figure("round_seconds", "training", "Time of a round", "round_seconds", "s", _TRAIN, run=True),
    Figure("members", "training", "Members", "members", "ranks", _TRAIN, run=True),
    Figure(
        "bytes", "training", "Bytes sent a round, dotted: raw", "bytes_sent", "B", _TRAIN, run=True,
        log=True, zero=False, other="bytes_raw",
    ),
    Figure(
        "answers", "serving", "Answers of served models", "answers", "req/s", _ASK, form="bars", per_second=True,
    ),
    Figure(
        "serving-latency", "serving", "Latency, request to answer", "latency", "s", _ASK, log=True,
        columns=("p50", "p95", "p99"), match="models.",
    ),
    Figure(
        "batches", "serving", "Batches by size", "batches", "batches/s",
        "Start inference: pipeline serve subscribers.inference:app", form="bars", per_second=True,
    ),
    Figure(
        "released", "serving", "Batches by reason of release", "released", "batches/s",
        "Start inference: pipeline serve subscribers.inference:app", form="area", per_second=True,
    ),
    Figure(
        "inference", "serving", "Accuracy on held-out digits", "accuracy", "%",
        "Stream digits: python -m publishers.data", zero=False, scale=100,
    ),
    Figure("gflops", "matmul", "Speed, per kernel and device", "gflops", "GFLOP/s", _JOBS, tall=True),
    Figure(
        "peak", "matmul", "Share of the measured peak", "peak", "%", "Workers measure their peak when they start",
        scale=100, top=100,
    ),
    Figure("products", "matmul", "Products", "products", "jobs/s", _JOBS, form="bars", per_second=True),
    Figure("cpu", "workers", "CPU", "cpu", "% of a core", _SERVE, scale=100),
    Figure("memory", "workers", "Resident memory", "memory", "B", _SERVE),
    Figure("busy", "workers", "Time in handlers", "busy", "%", _SERVE, scale=100),
    Figure("gpu", "workers", "GPU utilisation", "gpu", "%", "No process reports a GPU here", scale=100, top=100),
)  # fmt: skip


def on_page(page: str) -> tuple[Figure, ...]:
    return tuple(figure for figure in FIGURES if figure.page == page)


def specification() -> dict[str, Any]:
    """What the browser needs to draw them."""
    return {
        "colours": COLOURS,
        "figures": {
            figure.name: {
                "title": figure.title,
                "unit": figure.unit,
                "form": figure.form,
                "log": figure.log,
                "zero": figure.zero,
                "run": figure.run,
                "top": figure.top,
            }
            for figure in FIGURES
        },
    }

"""Everything on one page: totals, the flow of events, training, inference, matmul, workers."""

from __future__ import annotations

from typing import Any

from dash import html

from ..figures import FIGURES, Figure

__all__ = ["layout"]

TILES = (
    ("rate", "events per second"),
    ("published", "events published"),
    ("waiting", "waiting or in hand"),
    ("dead", "dead letters"),
    ("accuracy", "inference accuracy"),
    ("version", "model version"),
    ("workers", "live processes"),
)
SECTIONS = (
    ("Events", ("rate", "latency", "lag")),
    ("Training", ("loss", "accuracy")),
    ("Inference", ("inference", "batches")),
    ("Serving", ("predictions",)),
    ("Matmul", ("matmul",)),
)


def layout(**_: str) -> Any:
    figures = {figure.name: figure for figure in FIGURES}
    return html.Main(
        [
            _header(),
            html.Div(id="banner", role="alert", hidden=True),
            html.Div([_tile(name, label) for name, label in TILES], className="tiles"),
            *(
                html.Section(
                    [
                        html.H2(title),
                        html.Div([_chart(figures[name]) for name in names], className="charts"),
                        html.Div(id="pictures", className="pictures") if title == "Serving" else None,
                    ],
                    className="section",
                )
                for title, names in SECTIONS
            ),
            html.Section([html.H2("Channels and groups"), html.Div(id="channels", className="table")]),
            html.Section([html.H2("Processes"), html.Div(id="workers", className="table")]),
        ]
    )


def _header() -> Any:
    return html.Header(
        [
            html.H1("Pipeline"),
            html.Span("connecting", id="state", className="pill", **_aria(live="polite")),
            html.Button("Theme", id="theme", title="Dark or light", **_aria(label="Switch between dark and light")),
        ]
    )


def _tile(name: str, label: str) -> Any:
    return html.Div(
        [html.Span("–", id=f"tile-{name}", className="value"), html.Span(label, className="label")], className="tile"
    )


def _chart(figure: Figure) -> Any:
    return html.Figure(
        [
            html.Figcaption([html.Span(figure.title), html.Span(figure.unit, className="unit")]),
            html.Div(figure.empty, className="empty", id=f"empty-{figure.name}"),
            html.Div(id=f"chart-{figure.name}", className="plot", role="img", **_aria(label=figure.title)),
            html.Div(id=f"legend-{figure.name}", className="legend"),
            html.Div(id="reasons", className="legend") if figure.name == "batches" else None,
        ],
        className="chart",
    )


def _aria(**attributes: str) -> Any:
    """ARIA attributes as Dash takes them."""
    return {f"aria-{name}": value for name, value in attributes.items()}

"""The pieces that pages are made of. The browser fills what moves; Dash renders each page once."""

from __future__ import annotations

import json
from typing import Any

import dash_ag_grid as dag
from dash import html

from .figures import Figure, on_page

__all__ = ["aria", "button", "charts", "grid", "number", "page", "panel", "text", "tiles"]

WINDOWS = ((30, "30 s"), (60, "1 min"), (300, "5 min"), (900, "15 min"), (3600, "1 h"), (21600, "6 h"))

THEME = {
    "backgroundColor": "var(--panel)", "foregroundColor": "var(--text)", "headerTextColor": "var(--soft)",
    "headerBackgroundColor": "var(--panel)", "borderColor": "var(--edge)", "rowHoverColor": "var(--hover)",
    "selectedRowBackgroundColor": "var(--chosen)", "accentColor": "var(--accent)", "wrapperBorder": False,
    "chromeBackgroundColor": "var(--panel)", "headerColumnResizeHandleColor": "transparent", "fontFamily": "inherit",
    "fontSize": 13, "headerFontWeight": 500, "headerFontSize": 12, "rowHeight": 34, "headerHeight": 34,
    "cellHorizontalPadding": 8, "columnBorder": False, "wrapperBorderRadius": 0,
}  # fmt: skip
"""Tables in the page's own colours (ag-grid's theming parameters)."""


def aria(**attributes: str) -> Any:
    """ARIA attributes as Dash takes them."""
    return {f"aria-{name}": value for name, value in attributes.items()}


def data(**attributes: str) -> Any:
    """data- attributes as Dash takes them."""
    return {f"data-{name}": value for name, value in attributes.items()}


def page(name: str, title: str, *children: Any, timed: bool = True, tools: Any = None) -> Any:
    """A page: its heading, its tools, what is on it. `timed` ones have a window of time."""
    return html.Div(
        [
            html.Div(
                [html.H1(title), html.Span(className="grow"), tools, _times() if timed else None], className="heading"
            ),
            *children,
        ],
        id="page",
        className=f"page page-{name}",
        **data(page=name),
    )


def _times() -> Any:
    return html.Div(
        [
            html.Div(
                [
                    html.Button(label, className="choice", **data(window=str(seconds)), **aria(pressed="false"))
                    for seconds, label in WINDOWS
                ],
                className="choices",
                role="group",
                **aria(label="Window of time"),
            ),
            html.Button("Pause", id="pause", className="button", **aria(pressed="false")),
            html.Div(id="scrub", className="scrub", hidden=True),
        ],
        className="times",
    )


def panel(title: str, *children: Any, id: str | None = None, note: str = "", tools: Any = None) -> Any:  # noqa: A002
    """A titled box."""
    head = [html.H2(title), html.Span(note, className="note") if note else None, html.Span(className="grow"), tools]
    more: Any = {"id": id} if id else {}
    return html.Section([html.Div(head, className="panel-head"), *children], className="panel", **more)


def charts(page_name: str, *names: str) -> Any:
    """The charts of a page, or some of them."""
    return html.Div(
        [_chart(figure) for figure in on_page(page_name) if not names or figure.name in names], className="charts"
    )


def _chart(figure: Figure) -> Any:
    name = figure.name
    return html.Figure(
        [
            html.Figcaption(
                [
                    html.H2(figure.title),
                    html.Span(figure.unit, className="unit"),
                    html.Span(id=f"left-out-{name}", className="note"),
                    html.Span(className="grow"),
                    html.Button("PNG", className="tiny", **data(export="png"), **aria(label=f"{figure.title} as PNG")),
                    html.Button("CSV", className="tiny", **data(export="csv"), **aria(label=f"{figure.title} as CSV")),
                ]
            ),
            html.Div(
                [
                    html.Div(id=f"chart-{name}", className="plot"),
                    html.Div(figure.empty, className="empty", id=f"empty-{name}"),
                ],
                className="frame tall" if figure.tall else "frame",
                tabIndex=0,
                role="img",
                **aria(label=figure.title),
            ),
            html.Div(id=f"legend-{name}", className="legend"),
        ],
        className="chart panel",
        **data(figure=name),
    )


def tiles(*items: tuple[str, str]) -> Any:
    """Headline numbers: (name, what it is)."""
    return html.Dl(
        [
            html.Div([html.Dt(label), html.Dd("–", id=f"tile-{name}")], className="tile", id=f"box-{name}")
            for name, label in items
        ],
        className="tiles",
    )


def button(label: str, id: str, kind: str = "", **more: Any) -> Any:  # noqa: A002
    return html.Button(label, id=id, className=f"button {kind}".strip(), **more)


def text(field: str, title: str, **more: Any) -> Any:
    """A column of words."""
    return {"field": field, "headerName": title, "minWidth": 110, "flex": 2, **more}


def number(field: str, title: str, form: str = "count", **more: Any) -> Any:
    """A column of numbers, shown by the function of that name in assets/grid.js."""
    least = 78 if form in ("seconds", "bytes") else 64
    return {
        "field": field, "headerName": title, "type": "rightAligned", "minWidth": least, "flex": 1,
        "valueFormatter": {"function": f"{form}(params.value)"}, **more,
    }  # fmt: skip


def grid(name: str, columns: list[Any], empty: str, **options: Any) -> Any:
    """A table whose rows, each with an `id`, come from the live feed."""
    return dag.AgGrid(
        id=f"grid-{name}",
        className="grid",
        columnDefs=columns,
        getRowId="params.data.id",
        defaultColDef={"sortable": True, "resizable": True, "suppressMovable": True},
        dashGridOptions={
            "theme": {"function": f"themeQuartz.withParams({json.dumps(THEME)})"},
            "domLayout": "autoHeight",
            "animateRows": False,
            "suppressCellFocus": False,
            "ensureDomOrder": True,
            "localeText": {"noRowsToShow": empty},
            **options,
        },
        style={"height": None},
    )

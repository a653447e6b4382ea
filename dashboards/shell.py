"""What surrounds every page: navigation, the state of things, the theme."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Input, Output, State, clientside_callback, html, page_container, page_registry

__all__ = ["INDEX", "shell"]

INDEX = """<!DOCTYPE html>
<html lang="en" data-mantine-color-scheme="dark">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pipeline</title>
<link rel="icon" id="favicon" href="data:,">
<script>
(() => {  // before anything is painted: no flash of the other theme
  const kept = localStorage.getItem("mantine-color-scheme-value");
  const light = kept === "light" || (kept !== "dark" && matchMedia("(prefers-color-scheme: light)").matches);
  localStorage.setItem("mantine-color-scheme-value", light ? "light" : "dark");
  document.documentElement.dataset.mantineColorScheme = light ? "light" : "dark";
})();
</script>
{%css%}
<script src="/assets/grid.js"></script>
<script src="/plotly.min.js" defer></script>
<script type="module" src="/assets/live/main.js"></script>
</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def shell() -> Any:
    """The layout of the app; Dash puts the page into its middle."""
    return dmc.MantineProvider(
        dmc.AppShell(
            [
                html.A("Skip to the page", href="#page", className="skip"),
                dmc.AppShellHeader(_header(), className="top"),
                dmc.AppShellNavbar(_navigation(), className="side", **_aria(label="Pages")),
                dmc.AppShellMain(
                    [html.Div(id="banner", className="banner", role="alert", hidden=True), page_container],
                    className="middle",
                ),
                html.Div(id="toasts", className="toasts", role="status", **_aria(live="polite")),
                html.Dialog(id="dialog", className="dialog"),
            ],
            id="shell",
            header={"height": 52},
            navbar={"width": 196, "breakpoint": "sm", "collapsed": {"mobile": True}},
            padding=0,
        ),
        defaultColorScheme="dark",
        theme={"fontFamily": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "primaryColor": "blue"},
    )


def _header() -> Any:
    return [
        dmc.Burger(id="burger", opened=False, hiddenFrom="sm", size="sm", **_aria(label="Show or hide the pages")),
        html.Div([html.Span(className="logo"), "Pipeline"], className="brand"),
        html.Span("connecting", id="state", className="pill", role="status"),
        html.A(id="alerts", href="/", className="pill alerts", hidden=True),
        html.Span(className="grow"),
        html.Span(id="clock", className="clock", **_aria(hidden="true")),
        dmc.ColorSchemeToggle(
            id="theme", lightIcon=html.Span("☀"), darkIcon=html.Span("☾"), variant="default", size="md",
            **_aria(label="Switch between dark and light"),
        ),
    ]  # fmt: skip


def _navigation() -> Any:
    return html.Div(
        [
            dmc.NavLink(
                id=f"to-{page['module']}", label=page["name"], href=page["path"], active="exact",
                leftSection=html.Span(className=f"icon icon-{page['module']}"),
            )
            for page in page_registry.values()
        ]
    )  # fmt: skip


def _aria(**attributes: str) -> Any:
    """ARIA attributes as Dash takes them."""
    return {f"aria-{name}": value for name, value in attributes.items()}


clientside_callback(
    """(opened, navbar) => ({...navbar, collapsed: {mobile: !opened}})""",
    Output("shell", "navbar"), Input("burger", "opened"), State("shell", "navbar"), prevent_initial_call=True,
)  # fmt: skip
clientside_callback(
    """() => false""", Output("burger", "opened"), Input("_pages_location", "pathname"), prevent_initial_call=True
)

"""The pages, a file each. Every `layout` takes what stands in the URL."""

from __future__ import annotations

import dash

from . import channels, dead, matmul, overview, serving, training, workers

__all__ = ["register"]

PAGES = (
    ("overview", "/", "Overview", overview),
    ("channels", "/channels", "Channels", channels),
    ("training", "/training", "Training", training),
    ("serving", "/serving", "Serving", serving),
    ("matmul", "/matmul", "Matmul", matmul),
    ("workers", "/workers", "Workers", workers),
    ("dead", "/dead", "Dead letters", dead),
)


def register() -> None:
    """Tell Dash of them."""
    for order, (name, path, title, module) in enumerate(PAGES):
        dash.register_page(  # type: ignore[no-untyped-call]
            name, path=path, name=title, title="Pipeline", order=order, layout=module.layout
        )

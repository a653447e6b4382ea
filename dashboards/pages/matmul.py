"""Matrix products: speed against the peak, tiles done, the wavefront of a systolic array."""

from __future__ import annotations

from typing import Any

from dash import html

from ..components import charts, page, panel

__all__ = ["layout"]


def layout(**_: str) -> Any:
    return page(
        "matmul",
        "Matmul",
        charts("matmul"),
        html.Div(
            [
                panel("Kernels", html.Div(id="kernels", className="table")),
                panel("Products in tiles", html.Div(id="tiles", className="tile-jobs")),
            ],
            className="halves",
        ),
        panel(
            "Systolic array",
            html.Div(id="systolic", className="systolic"),
            note="each cell is a processing element of the simulated array; lit ones multiply in this cycle",
        ),
    )

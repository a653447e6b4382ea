"""Figures: repeated, with median and spread, and the ratio to each peer measured in the same run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass, field

__all__ = ["Figure", "machine", "show"]


@dataclass
class Figure:
    """One quantity under one set-up. `values` has one item a repeat."""

    benchmark: str
    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    peer: bool = False
    """Somebody else's, or a limit: what ours is compared with."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def line(self, peers: list[Figure]) -> dict[str, object]:
        """What `--json` prints of it."""
        return {
            "benchmark": self.benchmark,
            "figure": self.name,
            "unit": self.unit,
            "median": round(self.median, 4),
            "min": round(min(self.values), 4),
            "max": round(max(self.values), 4),
            "repeats": len(self.values),
            "ratio": {peer.name: round(self.median / peer.median, 3) for peer in peers if peer.unit == self.unit},
            "note": self.note,
        }


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def show(figures: list[Figure], as_json: bool) -> None:
    """Print them: JSON lines, or a table."""
    peers = [figure for figure in figures if figure.peer]
    if as_json:
        for figure in figures:
            print(json.dumps(figure.line(peers)))
        return
    print(f"\n{machine()}; medians of {len(figures[0].values)} interleaved repeats (min … max)\n")
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        ratios = "  ".join(
            f"{figure.median / peer.median:.2f} × {peer.name}"
            for peer in peers
            if peer.unit == figure.unit and not figure.peer
        )
        spread = f"({_number(min(figure.values))} … {_number(max(figure.values))})"
        print(f"{figure.name:{width}}  {_number(figure.median):>12} {figure.unit:<9} {spread:<26} {ratios}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"

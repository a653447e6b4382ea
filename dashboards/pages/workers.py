"""Processes: who lives, what they hold, what they cost."""

from __future__ import annotations

from typing import Any

from ..components import button, charts, grid, number, page, panel, text

__all__ = ["layout"]

COLUMNS = [
    text("app", "app", pinned="left", minWidth=110),
    text("state", "state", minWidth=72, cellClassRules={
        "good": "params.value === 'live'", "bad": "params.value === 'silent'", "soft": "params.value === 'stopped'",
    }),
    text("host", "host", minWidth=64, flex=1),
    number("pid", "pid", "plain"),
    number("started", "up for", "ago"),
    number("cpu", "CPU", "percent"),
    number("memory", "memory", "bytes"),
    number("busy", "busy", "percent"),
    number("in_hand", "in hand"),
    number("leases", "leases"),
    number("oldest_lease", "oldest", "seconds"),
    number("threads", "threads", "plain", minWidth=70),
    number("gpu", "GPU", "percent"),
    number("gpu_memory", "GPU memory", "bytes", minWidth=96),
    text("version", "version", minWidth=68, flex=1),
    text("groups", "reads", minWidth=120, flex=3),
]  # fmt: skip


def layout(**_: str) -> Any:
    return page(
        "workers",
        "Workers",
        panel(
            "Processes",
            grid("workers", COLUMNS, "Start one: pipeline serve MODULE:APP"),
            tools=button("Set a publisher's rate", "set-rate", "small"),
        ),
        charts("workers"),
    )

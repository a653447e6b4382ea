"""Apps for the tests that serve one by its name."""

import os
from pathlib import Path

from pipeline import Channel, Event, Pipeline, Tensor


class Reading(Event):
    sensor: str
    value: float
    window: Tensor | None = None


app = Pipeline("served")


@app.subscriber(Channel("served", Reading), group="g", lease=1.0)
async def work(event: Reading) -> None:
    """Nothing to do."""


fragile = Pipeline("fragile")


@fragile.on_start
async def crash() -> None:
    """While there is a file."""
    if Path(os.environ["CRASHES_WHILE"]).exists():
        raise OSError("crashes while there is a file")

"""An app for the tests that serve one by its name."""

from pipeline import Channel, Event, Pipeline, Tensor


class Reading(Event):
    sensor: str
    value: float
    window: Tensor | None = None


app = Pipeline("served")


@app.subscriber(Channel("served", Reading), group="g", lease=1.0)
async def work(event: Reading) -> None:
    """Nothing to do."""

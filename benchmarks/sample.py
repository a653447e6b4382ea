"""The event that is measured with: 206 bytes of JSON."""

from __future__ import annotations

from pipeline import Channel, Event

__all__ = ["Reading", "live", "outputs", "readings", "sample"]


class Reading(Event):
    sensor: str
    value: float
    unit: str
    site: str
    note: str


readings: Channel[Reading] = Channel("bench.readings", Reading)
outputs: Channel[Reading] = Channel("bench.outputs", Reading)
live: Channel[Reading] = Channel("bench.live", Reading, durable=False)


def sample(n: int) -> Reading:
    reading = Reading(sensor=f"sensor-{n:06d}", value=n * 1.25 + 0.5, unit="celsius", site="hall 3", note="")
    missing = 206 - len(reading.model_dump_json())
    return reading.model_copy(update={"note": "x" * missing})

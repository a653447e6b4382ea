"""Publish from a script. See it live: `pipeline watch readings`, and on the dashboard."""

import math

from pipeline import Channel, Event, Pipeline


class Reading(Event):
    sensor: str
    value: float


readings = Channel("readings", Reading)

with Pipeline("thermometer").blocking() as pipe:
    for minute in range(5):
        celsius = round(20 + 3 * math.sin(minute), 1)
        pipe.publish(readings, Reading(sensor="attic", value=celsius), key="attic")
        print(f"attic: {celsius} °C")

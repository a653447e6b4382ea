"""A chain on durable channels: readings → detect → alerts → notify. Each event takes effect once, whatever crashes."""

import asyncio

from pipeline import Channel, Event, Pipeline, Reject


class Reading(Event):
    sensor: str
    value: float


readings = Channel("example.readings", Reading)
alerts = Channel("example.alerts", str)
app, told = Pipeline("monitoring"), asyncio.Event()


@app.subscriber(readings, group="detectors", publishes=alerts, ordered=True)
async def detect(reading: Reading) -> str | None:
    if reading.value < -273.15:
        raise Reject("colder than absolute zero")  # a dead letter: see `pipeline dead example.readings`
    return f"{reading.sensor} at {reading.value} °C" if reading.value > 90 else None


@app.subscriber(alerts, group="notifiers", ordered=True)
async def notify(alert: str) -> None:
    print(f"alert: {alert}")
    if alert.startswith("reactor"):
        told.set()


async def main() -> None:
    async with app:
        values = {"attic": 21.0, "boiler": 97.5, "freezer": -300.0, "reactor": 450.0}
        await app.publish(readings, [Reading(sensor=sensor, value=value) for sensor, value in values.items()])
        await app.serve(told)


asyncio.run(main())

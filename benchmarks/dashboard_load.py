"""What the dashboard is measured under: events on twelve channels, with workers, and twenty training runs.

`python -m benchmarks.dashboard_load URL EVENTS_A_SECOND` publishes until it is ended.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from pipeline import Batch, Channel, Pipeline
from pipeline.catalog import Prediction, TrainingMetrics, predictions, training_metrics

from .sample import Reading, sample

__all__ = ["CHANNELS", "RUNS"]

CHANNELS = tuple(Channel(f"bench.{name}", Reading) for name in "abcdefghijk")
"""Eleven; the twelfth is the catalog's predictions."""
RUNS = 20
STEPS = 4
"""Steps a second and run, of eight values each."""
TICKS = 20


async def main(url: str, rate: float) -> None:
    app = Pipeline("load", url)
    for channel in CHANNELS:

        @app.subscriber(channel, group="bench", batch=Batch(1024))
        async def handle(batch: list[Reading]) -> list[None]:
            return [None] * len(batch)

    serving = asyncio.create_task(app.serve())
    await app.ready.wait()
    print("ready", flush=True)
    await asyncio.gather(serving, _events(app, rate), _runs(app))


async def _events(app: Pipeline, rate: float) -> None:
    """The first channel has the most, the last the least."""
    weights = [1.0 / (n + 2) for n in range(len(CHANNELS))]
    readings = [sample(n) for n in range(2000)]
    owed, due = [0.0] * (len(CHANNELS) + 1), time.monotonic()
    shares = [*(0.96 * weight / sum(weights) for weight in weights), 0.04]
    while True:
        for n, share in enumerate(shares):
            owed[n] += rate * share / TICKS
            count, owed[n] = int(owed[n]), owed[n] % 1
            if count and n < len(CHANNELS):
                await app.publish(CHANNELS[n], readings[:count])
            elif count:
                await app.publish(predictions, [_prediction() for _ in range(count)])
        due += 1 / TICKS
        await asyncio.sleep(max(0.0, due - time.monotonic()))


def _prediction() -> Prediction:
    truth = random.randrange(10)
    label = truth if random.random() < 0.95 else 0
    return Prediction(model="digits", version=1, label=label, probabilities=[0.1] * 10, truth=truth, batch=1)


async def _runs(app: Pipeline) -> None:
    step, due = 0, time.monotonic()
    while True:
        for run in range(RUNS):
            loss = 2.3 / (1 + step / (20 + 5 * run)) * random.uniform(0.9, 1.1)
            values = {
                "loss": loss, "accuracy": 1 - loss / 2.4, "gradient_norm": loss * random.uniform(0.8, 1.2),
                "staleness": run % 3, "round_seconds": random.uniform(0.01, 0.05), "members": 4.0,
                "bytes_sent": 1e5 * (1 + run), "bytes_raw": 4e6,
            }  # fmt: skip
            await app.publish(training_metrics, TrainingMetrics(run=f"run-{run:02}", step=step, values=values))
        step += 1
        due += 1 / STEPS
        await asyncio.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))

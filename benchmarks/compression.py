"""What travels: each codec's ratio, its milliseconds, and what it does to the accuracy of the same 400 steps.

Two workers train the MLP of `benchmarks.training` through the aggregator, so that its merging counts too.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from pipeline.catalog.compression import Encoder, decode, merge
from pipeline.server import Server
from publishers.training.parameters import parameters_of

from .allreduce import aggregating
from .report import Figure
from .training import Work, measure

__all__ = ["run"]

CODECS = ("none", "bf16", "fp16", "int8", "topk:0.01", "powersgd:4")
UNITS = {"accuracy": "% held out", "ratio": "× smaller", "rate": "samples/s"}
STAGES = ("encode", "merge", "decode")
"""One vector, two of them, their mean."""
RAW_BYTES = 4 * 235_146
TIMES = 15


def run(repeats: int, seconds: float) -> list[Figure]:
    figures = {
        (codec, what): Figure("compression", f"{codec}, {what}", unit, peer=codec == "none")
        for what, unit in {**UNITS, **{stage: f"ms {stage}" for stage in STAGES}}.items()
        for codec in CODECS
    }
    with Server() as server, aggregating(server.url):
        for _ in range(repeats):
            for codec in CODECS:
                found = measure(f"compress={codec}", server.url)
                found["ratio"] = RAW_BYTES / found["bytes"]
                for what, value in [*((what, found[what]) for what in UNITS), *_stages(codec).items()]:
                    figures[codec, what].values.append(value)
    return list(figures.values())


def _stages(codec: str) -> dict[str, float]:
    """Milliseconds for one gradient of the model."""
    work = Work(0, 1)
    parameters = parameters_of(work.model)
    work.loss(work.model)
    gradient = parameters.gradient(None)
    encoder = Encoder(codec, parameters.size, parameters.matrices)
    spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
    out = np.empty(parameters.size, np.float32)
    for _ in range(TIMES):
        times = [time.perf_counter()]
        parts = encoder.encode(gradient)
        times.append(time.perf_counter())
        sent_as, mean, _ = merge([(0.5, codec, parts), (0.5, codec, parts)], parameters.size)
        times.append(time.perf_counter())
        decode(sent_as, mean, parameters.size, out)
        times.append(time.perf_counter())
        for stage, began, ended in zip(STAGES, times[:-1], times[1:], strict=True):
            spent[stage].append(1e3 * (ended - began))
    return {stage: statistics.median(values) for stage, values in spent.items()}

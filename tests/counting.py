"""An app for the map-reduce tests. It tells which part it begins, and a part may ask it to take its time."""

from __future__ import annotations

import re
import time
import zlib
from collections import Counter
from typing import Any

import numpy as np

from pipeline import Pipeline
from subscribers.mapreduce import mapper, reducer

BUCKETS = 4

app = Pipeline("counting")


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", text.lower()))


@mapper(app, "words", lease=60.0)
def count(part: dict[str, Any]) -> dict[str, dict[str, int]]:
    """{text, seconds} → bucket → word → how often"""
    print("begins", part["number"], flush=True)
    time.sleep(part["seconds"])
    found: dict[str, dict[str, int]] = {}
    for word, times in words(part["text"]).items():
        found.setdefault(str(zlib.crc32(word.encode()) % BUCKETS), {})[word] = times
    return found


@reducer(app, "words")
def add(bucket: str, counts: list[dict[str, int]]) -> dict[str, int]:
    return dict(sum((Counter(one) for one in counts), Counter()))


@mapper(app, "logistic", lease=1.0)
def gradient(part: dict[str, Any]) -> dict[str, Any]:
    """{x [n, d], y [n], weights [d], seconds} → the sums over its samples of gradient [d] and loss, float64"""
    print("begins", part["number"], flush=True)
    time.sleep(part["seconds"])
    return logistic(part["x"], part["y"], part["weights"])


@reducer(app, "logistic")
def total(name: str, values: list[Any]) -> Any:
    return np.sum(np.stack(values), axis=0)


def logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Of the logistic loss with labels 0 and 1."""
    z = x @ weights
    return {"gradient": x.T @ (1 / (1 + np.exp(-z)) - y), "loss": np.sum(np.logaddexp(0, z) - y * z, keepdims=True)}


if __name__ == "__main__":
    app.run()

"""scikit-learn's handwritten digits, split once for everybody: trainers never see what the stream shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Part", "Split", "digits"]

HELD_OUT = 0.2
VALIDATION = 0.15


@dataclass(frozen=True, slots=True)
class Part:
    """images: float32 [n, 8, 8], intensities 0…16 · labels: int64 [n], 0…9"""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def shard(self, rank: int, workers: int) -> Part:
        """Every `workers`-th digit, beginning with number `rank`."""
        return Part(self.images[rank::workers], self.labels[rank::workers])


@dataclass(frozen=True, slots=True)
class Split:
    train: Part
    """What gradients come from."""
    validation: Part
    """What decides which weights are good enough to publish."""
    held_out: Part
    """What is streamed for inference; nothing is ever chosen by it."""


@cache
def digits(seed: int = 0) -> Split:
    """The 1,797 digits in three disjoint parts. The same seed gives the same parts in every process."""
    table = _table()
    order = np.random.default_rng(seed).permutation(len(table))
    images = table[order, :64].reshape(-1, 8, 8).astype(np.float32)
    labels = table[order, 64].astype(np.int64)
    first = round(len(order) * HELD_OUT)
    second = first + round(len(order) * VALIDATION)
    return Split(
        train=Part(images[second:], labels[second:]),
        validation=Part(images[first:second], labels[first:second]),
        held_out=Part(images[:first], labels[:first]),
    )


def _table() -> npt.NDArray[np.float64]:
    """[1797, 65]: 64 pixels and the label of each digit.

    From scikit-learn's own file where it lies as usual: importing the package takes a second and 140 MB.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    return np.column_stack([raw.data, raw.target])

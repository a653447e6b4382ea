"""Optimizers of a parameter server: they change a flat float32 vector in place. Their state is arrays, for checkpoints.

sgd: Robbins & Monro. momentum: Polyak, 0.9. adagrad: Duchi et al. 2011, as DistBelief's Downpour SGD uses it (Dean et
al. 2012). adam: Kingma & Ba 2015, bias-corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from pipeline import Reject

__all__ = ["NAMES", "Optimizer"]

Vector = npt.NDArray[np.float32]

MOMENTUM = np.float32(0.9)
BETA = np.float32(0.999)
TINY = np.float32(1e-8)


def _sgd(gradient: Vector, rate: np.float32, state: dict[str, Vector], step: int) -> Vector:
    return rate * gradient


def _momentum(gradient: Vector, rate: np.float32, state: dict[str, Vector], step: int) -> Vector:
    velocity = state["velocity"]
    velocity *= MOMENTUM
    velocity += gradient
    return rate * velocity


def _adagrad(gradient: Vector, rate: np.float32, state: dict[str, Vector], step: int) -> Vector:
    squares = state["squares"]
    squares += gradient * gradient
    update: Vector = np.divide(rate * gradient, np.sqrt(squares) + TINY, dtype=np.float32)
    return update


def _adam(gradient: Vector, rate: np.float32, state: dict[str, Vector], step: int) -> Vector:
    mean, squares = state["mean"], state["squares"]
    mean += (1 - MOMENTUM) * (gradient - mean)
    squares += (1 - BETA) * (gradient * gradient - squares)
    corrected = mean / np.float32(1 - float(MOMENTUM) ** step)
    update: Vector = rate * corrected / (np.sqrt(squares / np.float32(1 - float(BETA) ** step)) + TINY)
    return update


_RULES: Mapping[str, tuple[tuple[str, ...], Callable[[Vector, np.float32, dict[str, Vector], int], Vector]]] = {
    "sgd": ((), _sgd),
    "momentum": (("velocity",), _momentum),
    "adagrad": (("squares",), _adagrad),
    "adam": (("mean", "squares"), _adam),
}
NAMES = tuple(_RULES)


class Optimizer:
    """One rule and its state. Raises Reject for an unknown name."""

    def __init__(self, name: str, rate: float, size: int) -> None:
        if name not in _RULES:
            raise Reject(f"the server's optimizer {name!r} is unknown; use one of {', '.join(NAMES)}")
        keys, self._rule = _RULES[name]
        self.rate = rate
        self.step = 0
        self.state: dict[str, Vector] = {key: np.zeros(size, np.float32) for key in keys}

    def apply(self, weights: Vector, gradient: Vector, scale: float = 1.0) -> None:
        """One step; `scale` multiplies the learning rate."""
        self.step += 1
        weights -= self._rule(gradient, np.float32(self.rate * scale), self.state, self.step)

"""Optimizers of a parameter server: they change a flat float32 vector in place. Their state is arrays, for checkpoints.

sgd: Robbins & Monro. momentum: Polyak, 0.9. adagrad: Duchi et al. 2011, as DistBelief's Downpour SGD uses it (Dean et
al. 2012). adam: Kingma & Ba 2015, bias-corrected.

A gradient may be worth a part of a step only. What an optimizer remembers of it is then as much less: a late gradient
of Adam's would else do its damage in the ten steps after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from pipeline import Reject

__all__ = ["NAMES", "Optimizer"]

Vector = npt.NDArray[np.float32]

MOMENTUM = 0.9
BETA = 0.999
TINY = np.float32(1e-8)


def _sgd(gradient: Vector, part: float, state: dict[str, Vector], steps: float) -> Vector:
    return gradient


def _momentum(gradient: Vector, part: float, state: dict[str, Vector], steps: float) -> Vector:
    velocity = state["velocity"]
    velocity *= np.float32(MOMENTUM**part)
    velocity += np.float32(part) * gradient
    return velocity


def _adagrad(gradient: Vector, part: float, state: dict[str, Vector], steps: float) -> Vector:
    squares = state["squares"]
    squares += np.float32(part) * gradient * gradient
    direction: Vector = np.divide(gradient, np.sqrt(squares) + TINY, dtype=np.float32)
    return direction


def _adam(gradient: Vector, part: float, state: dict[str, Vector], steps: float) -> Vector:
    mean, squares = state["mean"], state["squares"]
    mean += np.float32(1 - MOMENTUM**part) * (gradient - mean)
    squares += np.float32(1 - BETA**part) * (gradient * gradient - squares)
    corrected = mean / np.float32(1 - MOMENTUM**steps)
    direction: Vector = corrected / (np.sqrt(squares / np.float32(1 - BETA**steps)) + TINY)
    return direction


Rule = Callable[[Vector, float, dict[str, Vector], float], Vector]
"""Gradient, what part of a step it is worth, state, steps with this one → direction, to go along by the rate."""

_RULES: Mapping[str, tuple[tuple[str, ...], Rule]] = {
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
        self.steps = 0.0
        self.state: dict[str, Vector] = {key: np.zeros(size, np.float32) for key in keys}

    def apply(self, weights: Vector, gradient: Vector, part: float = 1.0) -> None:
        """One step, or a part of one (above 0, at most 1)."""
        self.steps += part
        weights -= np.float32(self.rate * part) * self._rule(gradient, part, self.state, self.steps)

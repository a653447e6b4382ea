"""Training runs: what workers send, what aggregators answer, and the numbers they log."""

from __future__ import annotations

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "Gradient",
    "Round",
    "TrainingMetrics",
    "Weights",
    "gradients",
    "rounds",
    "training_metrics",
    "weights",
]


class Weights(Event):
    """A model's parameters, ready to be loaded."""

    model: str
    version: int = Field(ge=0)
    parameters: dict[str, Tensor]
    """`state_dict` names → tensors."""
    run: str | None = None
    round: int | None = None
    """They are what the run had before this round."""
    score: float | None = None
    """Accuracy (0…1) on validation data, where it was measured."""


class Gradient(Event):
    """One worker's contribution to one round of a training run."""

    run: str
    round: int = Field(ge=0)
    rank: int = Field(ge=0)
    workers: int = Field(ge=1)
    """How many workers the run was started with; a round closes when all of them have contributed…"""
    quorum: int = Field(default=1, ge=1)
    """…or, after the deadline, so many of them."""
    deadline: float = Field(default=2.0, gt=0, le=3600)
    """Seconds from a round's first gradient."""
    samples: int = Field(ge=1)
    gradient: Tensor
    """float32, shape [parameters]: all gradients flattened in `state_dict` order, mean over `samples`."""
    loss: float
    accuracy: float
    weights: Weights | None = None
    """The model this gradient was taken at, when it is to be published for inference together with the round."""


class Round(Event):
    """A closed round: what every trainer of the run applies with its own optimizer."""

    run: str
    round: int = Field(ge=0)
    ranks: list[int]
    """Whose gradients are in the mean, in the order of summation."""
    gradient: Tensor
    """float32, shape [parameters]: the mean, weighted by samples."""
    loss: float
    accuracy: float
    seconds: float
    """From the first gradient's arrival to the mean."""


class TrainingMetrics(Event):
    """Numbers a training loop logs at a step."""

    run: str
    step: int
    values: dict[str, float]
    """Name → value: loss, accuracy, learning_rate, gradient_norm, …"""


weights: Channel[Weights] = Channel("weights", Weights, frame=1, keep=3600.0)


gradients: Channel[Gradient] = Channel("training.gradients", Gradient, frame=1)


rounds: Channel[Round] = Channel("training.rounds", Round, frame=1)


training_metrics: Channel[TrainingMetrics] = Channel("training.metrics", TrainingMetrics, keep=3600.0)

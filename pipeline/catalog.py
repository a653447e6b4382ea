"""The ML events and channels that publishers, subscribers and dashboards share. Nothing in the core imports this."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .channel import Channel
from .events import Event
from .tensors import Tensor

__all__ = [
    "Digit",
    "Gradient",
    "MatmulJob",
    "MatmulResult",
    "Prediction",
    "Record",
    "Round",
    "TrainingMetrics",
    "Weights",
    "digits",
    "gradients",
    "matmul_jobs",
    "matmul_results",
    "predictions",
    "records",
    "rounds",
    "training_metrics",
    "weights",
]


class Digit(Event):
    """A handwritten digit to classify."""

    image: Tensor
    """float32, shape [8, 8], intensities 0…16 as in scikit-learn's `load_digits`."""
    label: int | None = Field(default=None, ge=0, le=9)
    """The truth, where it is known."""


class Prediction(Event):
    """What a model said of one digit."""

    model: str
    version: int
    """Version of the weights that answered; 0 is the untrained model."""
    label: int
    probabilities: list[float]
    """One a class, summing to 1."""
    truth: int | None = None
    batch: int
    """Size of the batch it was computed in."""


class Weights(Event):
    """A model's parameters, ready to be loaded."""

    model: str
    version: int = Field(ge=0)
    parameters: dict[str, Tensor]
    """`state_dict` names → tensors."""
    run: str | None = None
    round: int | None = None


class Gradient(Event):
    """One worker's contribution to one round of a training run."""

    run: str
    round: int = Field(ge=0)
    rank: int = Field(ge=0)
    workers: int = Field(ge=1)
    """How many workers the run was started with."""
    samples: int = Field(ge=0)
    gradient: Tensor
    """float32, shape [parameters]: all gradients flattened in `state_dict` order, mean over `samples`."""
    loss: float
    accuracy: float


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


class MatmulJob(Event):
    """C = A · B."""

    a: Tensor
    """shape [m, k]"""
    b: Tensor
    """shape [k, n], dtype as `a`"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_result: bool = False
    """True: the product travels back in the result event."""


class MatmulResult(Event):
    job: str
    """Id of the job's event."""
    m: int
    k: int
    n: int
    dtype: str
    device: str
    kernel: str
    seconds: float
    gflops: float
    """2·m·k·n / seconds / 1e9"""
    checksum: float
    """Sum of all elements of C, in float64."""
    product: Tensor | None = None


class Record(Event):
    """One row of a file or one line of JSON, as publishers.data reads them."""

    source: str
    row: int
    values: dict[str, bool | int | float | str | None]


digits: Channel[Digit] = Channel("digits", Digit, reply=Prediction, frame=32)
predictions: Channel[Prediction] = Channel("predictions", Prediction)
weights: Channel[Weights] = Channel("weights", Weights, frame=1, keep=3600.0)
gradients: Channel[Gradient] = Channel("training.gradients", Gradient, frame=1)
rounds: Channel[Round] = Channel("training.rounds", Round, frame=1)
training_metrics: Channel[TrainingMetrics] = Channel("training.metrics", TrainingMetrics, keep=3600.0)
matmul_jobs: Channel[MatmulJob] = Channel("matmul.jobs", MatmulJob, reply=MatmulResult, frame=1, keep=60.0)
matmul_results: Channel[MatmulResult] = Channel("matmul.results", MatmulResult)
records: Channel[Record] = Channel("records", Record)

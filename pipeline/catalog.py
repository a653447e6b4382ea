"""The ML events and channels that publishers, subscribers and dashboards share. Nothing in the core imports this.

Models are described here without torch: names and shapes of parameters, from which trainers and servers build theirs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import Field

from .channel import Channel
from .events import Event
from .tensors import Tensor

__all__ = [
    "requests_of",
    "model_status",
    "model_loads",
    "answers",
    "Score",
    "ModelStatus",
    "LoadModel",
    "Inputs",
    "Answer",
    "DIGIT_MODEL",
    "DIGIT_PARAMETERS",
    "DIGIT_SHAPE",
    "INTENSITY",
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


DIGIT_MODEL = "digits"
DIGIT_SHAPE = (8, 8)
INTENSITY = 16.0
"""The brightest pixel of a digit; models see images divided by it."""
DIGIT_PARAMETERS: dict[str, tuple[int, ...]] = {
    "hidden.weight": (32, 64),
    "hidden.bias": (32,),
    "output.weight": (10, 32),
    "output.bias": (10,),
}
"""The digit model: flatten → hidden (linear) → ReLU → output (linear), logits of the classes 0…9. All float32."""


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


class Inputs(Event):
    """One item for a served model: a request, answered with an Answer."""

    data: Tensor
    """As the model's ModelStatus says, without a batch dimension."""
    deadline: float | None = None
    """Unix seconds after which nobody waits any more: it is not computed then."""
    top: int = Field(default=5, ge=1)
    """How many predictions are wanted."""


class Score(Event):
    label: str
    probability: float


class Answer(Event):
    """What a model said of one item."""

    model: str
    version: int
    request: str = ""
    """Id of the Inputs event."""
    predictions: list[Score] = Field(default_factory=list)
    """The likeliest first; empty for models that do not classify."""
    output: Tensor | None = None
    """What the model returned, where it does not classify."""
    error: str = ""
    """Why there is neither."""
    expired: bool = False
    """The deadline had passed before it was its turn."""
    batch: int = 0
    """Size of the batch it was computed in."""
    seconds: float = 0.0
    """What the batch took."""


class LoadModel(Event):
    """Workers that serve `model` are to load this, and to answer with it from the next batch on."""

    model: str
    version: int = Field(ge=0)
    """What answers will carry. Loading an earlier version's source again is a roll-back."""
    source: str
    """A specification file within the workers' PIPELINE_MODELS_DIR, or the name of a built-in model."""


class ModelStatus(Event):
    """What a worker serves from now on, or why it refused to."""

    model: str
    version: int
    worker: str
    state: Literal["serving", "refused"]
    reason: str = ""
    kind: str = ""
    shape: list[int | None] = Field(default_factory=list)
    """Of one item; None where any size will do."""
    dtype: str = ""
    classes: int = 0
    batch: int = 0
    """Items at most in one batch."""
    device: str = ""


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
    """From 0."""
    values: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Column → value."""
    tensor: Tensor | None = None
    """Rows of a `.npy` file: the row itself, with the file's dtype."""


digits: Channel[Digit] = Channel("digits", Digit, reply=Prediction, frame=32)
predictions: Channel[Prediction] = Channel("predictions", Prediction)
answers: Channel[Answer] = Channel("models.answers", Answer, durable=False)
model_loads: Channel[LoadModel] = Channel("models.loads", LoadModel, keep=7 * 86400.0)
model_status: Channel[ModelStatus] = Channel("models.status", ModelStatus, keep=86400.0)
weights: Channel[Weights] = Channel("weights", Weights, frame=1, keep=3600.0)
gradients: Channel[Gradient] = Channel("training.gradients", Gradient, frame=1)
rounds: Channel[Round] = Channel("training.rounds", Round, frame=1)
training_metrics: Channel[TrainingMetrics] = Channel("training.metrics", TrainingMetrics, keep=3600.0)
matmul_jobs: Channel[MatmulJob] = Channel("matmul.jobs", MatmulJob, reply=MatmulResult, frame=1, keep=10.0)
matmul_results: Channel[MatmulResult] = Channel("matmul.results", MatmulResult)
records: Channel[Record] = Channel("records", Record)


@lru_cache
def requests_of(model: str) -> Channel[Inputs]:
    """The channel on which a model is asked: `models.<name>`."""
    return Channel(f"models.{model}", Inputs, reply=Answer, frame=16, keep=0)

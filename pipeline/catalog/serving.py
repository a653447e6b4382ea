"""Served models: requests, answers, and which model a worker serves."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "Answer",
    "Cancellation",
    "Inputs",
    "LoadModel",
    "ModelStatus",
    "Score",
    "answers",
    "cancellations",
    "model_loads",
    "model_status",
    "requests_of",
]


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
    """Before it was its turn the deadline had passed, or nobody waited any more: it was not computed."""
    batch: int = 0
    """Size of the batch it was computed in."""
    seconds: float = 0.0
    """What the batch took."""


class Cancellation(Event):
    """Nobody waits for an answer any more: what no worker has begun need not be computed."""

    model: str
    request: str
    """Id of the Inputs event."""


class LoadModel(Event):
    """Workers that serve `model` are to load this, and to answer with it from the next batch on."""

    model: str
    version: int = Field(ge=0)
    """What answers will carry. Loading an earlier version's source again is a roll-back."""
    source: str
    """A specification file within the workers' PIPELINE_MODELS_DIR, or the name of a built-in model; "": what they were
    started with."""


class ModelStatus(Event):
    """What a worker serves from now on, or why it refused to."""

    model: str
    version: int
    worker: str
    state: Literal["serving", "refused"]
    reason: str = ""
    load: str = ""
    """Id of the LoadModel event that this answers; "": the worker was started with it."""
    kind: str = ""
    shape: list[int | None] = Field(default_factory=list)
    """Of one item; None where any size will do."""
    dtype: str = ""
    classes: int = 0
    batch: int = 0
    """Items at most in one batch."""
    device: str = ""


answers: Channel[Answer] = Channel("models.answers", Answer, durable=False)


cancellations: Channel[Cancellation] = Channel("models.cancelled", Cancellation, durable=False)


model_loads: Channel[LoadModel] = Channel("models.loads", LoadModel, keep=7 * 86400.0)


model_status: Channel[ModelStatus] = Channel("models.status", ModelStatus, keep=86400.0)


@lru_cache
def requests_of(model: str) -> Channel[Inputs]:
    """The channel on which a model is asked: `models.<name>`."""
    return Channel(f"models.{model}", Inputs, reply=Answer, frame=16, keep=0)

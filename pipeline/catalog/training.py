"""Training runs: what workers send, what aggregators answer, and the numbers they log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "NO_SUM",
    "Admission",
    "Contribution",
    "Mode",
    "Round",
    "RunPlan",
    "State",
    "TrainingMetrics",
    "Weights",
    "admissions",
    "contributions",
    "contributions_live",
    "mean_values",
    "rounds",
    "rounds_live",
    "states",
    "training_metrics",
    "weights",
]

Mode = Literal["sync", "async", "hogwild", "dogwild", "local"]


NO_SUM = "no sum"
"""Why a worker's part of a round failed: plane torch gave it none."""


def mean_values(given: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Of weights and values by name: the mean of each name over those who gave it."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for weight, values in given:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sorted(sums)}


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


class RunPlan(Event):
    """What all workers of a run agree on; it travels with everything they send, so any aggregator can take over."""

    mode: Mode = "sync"
    size: int = Field(ge=0)
    """Parameters of the model (of the shard, where there are several)."""
    workers: int = Field(default=1, ge=1)
    """The first round waits for so many."""
    quorum: int = Field(default=1, ge=1)
    """A round is closed with at least so many contributions."""
    deadline: float | Literal["adaptive"] | None = None
    """Seconds from a round's first contribution after which the quorum is enough; adaptive: four times what rounds
    usually take to gather. None: every worker is waited for as long as its lease lasts."""
    lease: float = Field(default=1.0, gt=0, le=3600)
    """Seconds without a sign of life after which a worker is no member any more."""
    late: Literal["drop", "scale"] = "drop"
    """What becomes of a contribution to a closed round: dropped, or added to the open one, divided by 1 + its age."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of a round's mean."""
    optimizer: str = "adagrad"
    """Of the server, in modes async and dogwild: sgd, momentum, adagrad or adam."""
    rate: float = Field(default=0.01, gt=0)
    """Its learning rate."""
    checkpoint: int = Field(default=0, ge=0)
    """Rounds between two checkpoints; 0: none."""
    plane: Literal["auto", "redis", "shm", "torch"] = "redis"
    """How vectors travel. redis: in the contributions. shm, torch: events carry members and rounds only, the workers
    sum among themselves, in one host's shared memory or by torch.distributed. auto: shm when all begin on one host."""


class Contribution(Event):
    """What a worker tells the aggregator of its run."""

    run: str
    worker: str
    """Unique, for as long as the process lives."""
    rank: int = Field(default=-1, ge=-1)
    """-1: not assigned yet."""
    life: int = Field(default=0, ge=0)
    """Of the run, that the worker knows of; see Admission."""
    plan: RunPlan
    action: Literal["join", "beat", "push", "state", "leave"]
    """join, beat: asked as requests, answered with an Admission. push: a part of a round. state: what the worker has,
    for a checkpoint, or for the server to begin with."""
    shard: int = Field(default=0, ge=0)
    round: int = Field(default=0, ge=-1)
    """push: in sync and local the round, else this worker's count of pushes. beat: the round waited for; -1: none."""
    base: int = Field(default=0, ge=0)
    """The version of the weights it was computed with, where a server keeps them; beat: the newest that is known. join:
    the attempt's number."""
    peers: int = Field(default=0, ge=0)
    """How many members the worker knows of, itself included."""
    samples: int = Field(default=1, ge=1)
    codec: str = "none"
    """See pipeline.catalog.compression."""
    parts: dict[str, Tensor] = Field(default_factory=dict)
    """The gradient, or delta of parameters, as `codec` left it; or a state's tensors by name."""
    values: dict[str, float] = Field(default_factory=dict)
    """loss, accuracy, …: each averaged over those of the round who gave it."""
    failed: str = ""
    """Why there are no parts: the round goes on without them. Plane torch: NO_SUM, and nobody applies the round."""
    note: str = ""
    """JSON that goes with a state."""
    host: str = ""
    """join: what workers that share memory have in common; empty: this one cannot."""


class Admission(Event):
    """Where a run stands, for one of its workers."""

    run: str
    worker: str
    rank: int
    shard: int = 0
    ready: bool
    """The run has begun, or begins now."""
    round: int = 0
    """The open one, or the version of the server's weights."""
    members: list[int] = Field(default_factory=list)
    """Ranks."""
    newcomers: dict[str, int] = Field(default_factory=dict)
    """Who joined and has no State yet: worker and attempt → rank."""
    life: int = 0
    """A run that nobody is left of begins anew, or from a checkpoint, in a later life; what is of an earlier one does
    not count. The moment of its beginning, in milliseconds since 1970; 0: not begun, or a server keeps the weights."""
    settled: bool = True
    """False: an aggregator has just taken over, and may not know of all members yet."""
    plane: str = ""
    """How vectors travel in this run."""
    source: int = -1
    """Who publishes the State to begin with; -1: the aggregator."""
    state_wanted: bool = False
    """Somebody joined: publish a State."""
    push_wanted: bool = False
    """What was pushed for the open round is not here: push again."""
    reason: str = ""
    """Why the worker is not admitted, and what to do."""


class Round(Event):
    """A closed round of a run: what every worker applies. With a server: a push that it applied."""

    run: str
    round: int = Field(ge=0)
    """With a server: the version of its weights afterwards."""
    shard: int = 0
    life: int = 0
    """Of the run; see Admission."""
    ranks: list[int]
    """Whose contributions are in it, in the order of summation."""
    members: list[int] = Field(default_factory=list)
    refused: list[int] = Field(default_factory=list)
    """Whose were not finite, or said to have failed."""
    again: bool = False
    """Plane torch: some have no sum, or a newcomer is to make up the quorum. Nobody applies it; all meet anew."""
    late: int = 0
    """How many were in it that belonged to an earlier round."""
    codec: str = "none"
    parts: dict[str, Tensor] = Field(default_factory=dict)
    """The mean, weighted by samples; with a server, the weights. Empty: nothing to apply."""
    values: dict[str, float] = Field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0
    """From the first contribution's arrival to the mean."""
    state_from: int | None = None
    """Somebody joined: this rank publishes a State after this round."""
    worker: str = ""
    sequence: int = -1
    """With a server: whose push it was, and which."""
    staleness: int = 0
    """Versions between the weights that the push was computed with and those it was applied to."""


class State(Event):
    """All that a worker needs to go on from a round: parameters, optimizer and what the mode keeps."""

    run: str
    round: int
    """The first one not yet in it."""
    shard: int = 0
    """With a server: which slice of the weights it is."""
    rank: int
    life: int = 0
    """Of the run; see Admission."""
    tensors: dict[str, Tensor] = Field(default_factory=dict)
    note: str = ""
    """JSON: what is no tensor."""


class TrainingMetrics(Event):
    """Numbers a training loop logs at a step."""

    run: str
    step: int
    values: dict[str, float]
    """Name → value: loss, accuracy, learning_rate, gradient_norm, …"""


weights: Channel[Weights] = Channel("weights", Weights, frame=1, keep=3600.0)
contributions: Channel[Contribution] = Channel(
    "training.contributions", Contribution, reply=Admission, frame=1, partitions=4, keep=10.0
)
"""Keyed by run and shard: all of it reaches one aggregator at a time, in order."""
contributions_live: Channel[Contribution] = Channel("training.contributions.live", Contribution, durable=False, frame=1)
"""Those of dogwild runs: some may be lost."""
admissions: Channel[Admission] = Channel("training.admissions", Admission, durable=False)
rounds: Channel[Round] = Channel("training.rounds", Round, frame=32)
rounds_live: Channel[Round] = Channel("training.rounds.live", Round, durable=False, frame=1)
states: Channel[State] = Channel("training.states", State, frame=1, keep=10.0)
training_metrics: Channel[TrainingMetrics] = Channel("training.metrics", TrainingMetrics, keep=3600.0)

"""Acting on what runs: rates of publishers, runs to start, and a record of who did what.

Models are swapped by `serving.LoadModel`; groups are paused and dead letters replayed by the pipeline itself.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from ..channel import Channel
from ..events import Event
from .compression import check_codec
from .training import Mode

__all__ = [
    "Action",
    "PublisherRate",
    "RunStatus",
    "SetRate",
    "StartRun",
    "audit",
    "publisher_rates",
    "rate_settings",
    "run_starts",
    "run_statuses",
]


class SetRate(Event):
    """Every process of `publisher` is to publish at this rate from now on, until it ends."""

    publisher: str
    """As its PublisherRate says: "data", "jobs", "images", "training"."""
    rate: float | None = Field(ge=0, le=1e6)
    """Events (training: rounds) a second and process; 0 holds it until the next rate; None: as fast as it goes."""


class PublisherRate(Event):
    """At what rate a process publishes: announced when it starts, when that changes, and every half minute."""

    publisher: str
    worker: str
    """As in its WorkerSample, which tells whether it lives."""
    rate: float | None
    """As in SetRate."""
    initial: float | None
    """What it was started with."""


class StartRun(Event):
    """A launcher is to start a training run of the demonstration's model, and to see it through."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")
    """Its metrics come as `<run>.1`."""
    mode: Mode = "sync"
    compress: str = "none"
    """See pipeline.catalog.compression."""
    workers: int = Field(default=2, ge=1, le=64)
    rounds: int = Field(default=600, ge=1, le=1_000_000)
    learning_rate: float = Field(default=6e-3, gt=0, le=10)
    batch: int = Field(default=64, ge=1, le=65536)
    """Samples a worker and round."""
    rate: float | None = Field(default=8.0, gt=0, le=1e6)
    """At most so many rounds a second; None: as many as can be."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("compress")
    @classmethod
    def _is_a_codec(cls, name: str, info: ValidationInfo) -> str:
        return check_codec(name, info.data.get("mode", "sync"))


class RunStatus(Event):
    """What became of a StartRun."""

    run: str
    request: str
    """Id of the StartRun event."""
    state: Literal["started", "finished", "failed", "stopped"]
    """stopped: its launcher ended; the next one takes the run up again."""
    reason: str = ""
    launcher: str


class Action(Event):
    """One action of a person through the dashboard, whatever came of it."""

    who: str
    """"token": they had the token; "local": none is set, and they sat at the machine."""
    address: str
    """Where they came from, as the dashboard saw it."""
    action: Literal["replay", "drop", "pause", "resume", "set-rate", "load-model", "roll-back", "start-run", "publish"]
    subject: str
    """What it was done to: a channel, `channel/group`, a publisher, a model, a run."""
    parameters: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    outcome: Literal["done", "refused", "failed"]
    """refused: it could not be done as asked; failed: Redis was not there for it."""
    detail: str = ""
    """What was done (how many letters, which id), or why it was not."""


rate_settings: Channel[SetRate] = Channel("control.rates", SetRate, keep=3600.0)


publisher_rates: Channel[PublisherRate] = Channel("control.publishers", PublisherRate, keep=300.0)


run_starts: Channel[StartRun] = Channel("control.runs", StartRun, frame=1, keep=7 * 86400.0)


run_statuses: Channel[RunStatus] = Channel("control.run-status", RunStatus, keep=7 * 86400.0)


audit: Channel[Action] = Channel("pipeline.audit", Action, keep=7 * 86400.0)

"""`join`: take part in a training run from any loop.

with join("digits-1", model, mode="sync", compress="bf16", workers=2) as run:
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        run.step(optimizer, loss=loss, samples=len(x))
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pipeline import catalog
from pipeline.catalog import Round, RunPlan
from pipeline.catalog.compression import check_codec
from pipeline.channel import check_name
from pipeline.errors import ConfigurationError
from pipeline.settings import settings

from .exchange import Exchange
from .metrics import Metrics
from .modes import MODES, Mode, Sync
from .parameters import Parameters, parameters_of
from .recording import Recorder
from .shared import host

__all__ = ["Options", "Run", "join"]

logger = logging.getLogger("publishers.training")

Vector = npt.NDArray[np.float32]

LOGGED_EVERY = 0.1
"""Seconds between two reports of a mode without rounds."""


def join(
    name: str,
    model: Any,
    *,
    mode: catalog.Mode = "sync",
    compress: str = "none",
    workers: int = 1,
    rank: int | None = None,
    quorum: int = 1,
    deadline: float | Literal["adaptive"] | None = None,
    lease: float = 1.0,
    late: Literal["drop", "scale"] = "drop",
    clip: float | None = None,
    shards: int = 1,
    steps: int = 16,
    outer: tuple[float, float] = (1.0, 0.0),
    server_optimizer: str = "adagrad",
    rate: float = 0.01,
    push_every: int = 1,
    fetch_every: int = 1,
    in_flight: int = 1,
    checkpoint: int = 0,
    record: str | Path | None = None,
    plane: Literal["auto", "redis", "shm", "torch"] = "auto",
    metrics: bool = True,
    timeout: float | None = None,
    url: str | None = None,
) -> Run:
    """A context manager: on entry this worker joins the run, and begins with the weights that all others have.

    name         of the run; an aggregator opens it for its first worker (`pipeline serve subscribers.aggregation:app`)
    model        a torch module; a dictionary of numpy float arrays, or one array; a scikit-learn linear model. In mode
                 hogwild the dictionary holds arrays in shared memory meanwhile, and the caller's own again at the end
    mode         sync, async, hogwild, dogwild or local: see `publishers.training.modes`
    compress     what travels: none, bf16, fp16, int8, topk:SHARE, powersgd:RANK, with error feedback
    workers      the first round waits for so many
    rank         this worker's, where it matters which; else the lowest that is free
    quorum       a round needs so many contributions; with fewer members it waits
    deadline     seconds, or "adaptive", after which a round goes on with the quorum; None: it waits for every member
    lease        seconds without a sign of life after which a worker is given up
    late         what becomes of a contribution after its round: "drop" it, or "scale" it down and add it to the next
    clip         largest norm of the mean gradient
    shards       slices of the parameters, which several aggregators share
    steps, outer (local) steps between rounds; the outer optimizer's rate and Nesterov momentum
    server_optimizer, rate (async, dogwild) sgd, momentum, adagrad or adam, and its learning rate
    push_every, fetch_every (async, dogwild) steps between pushes, and fetches
    in_flight    (async) pushes at most that the server has not applied yet
    checkpoint   rounds between checkpoints, which the aggregator keeps and a run of that name goes on from; 0: none.
                 Mode hogwild has none, and takes no clip
    record       (sync, local; one shard) a folder for every round's gradients; see `replay`
    plane        how vectors travel. redis: through the aggregator, in shared memory on one host, as blobs across hosts.
                 shm: workers of one host sum in shared memory. torch: by torch.distributed (gloo; NCCL where each has a
                 GPU of its own). With both, events carry members and rounds only. auto: shm where all begin on one host
                 and no other option needs the aggregator to see the vectors
    timeout      seconds to wait for the run to begin; then JoinTimeout
    metrics      publish loss, gradient norm, staleness, samples/s, … as training events

    Raises ConfigurationError for options that do not go together, and when the run is of another mode or model.
    """
    check_name("run", name)
    check_codec(compress, mode)
    options = Options(
        compress=compress, shards=shards, steps=steps, outer=outer, push_every=push_every, fetch_every=fetch_every,
        in_flight=in_flight, record=None if record is None else Path(record), metrics=metrics, timeout=timeout,
    )  # fmt: skip
    needs_aggregator = (deadline, late, clip) != (None, "drop", None)
    if clip is not None and shards > 1:
        raise ConfigurationError("clip takes shards=1: each aggregator would clip its own slice")
    has_rounds = clip is not None or checkpoint > 0
    plane = _check(mode, plane, options, needs_aggregator=needs_aggregator, has_rounds=has_rounds)
    parameters = parameters_of(model)
    plan = RunPlan(
        mode=mode, size=parameters.size, workers=workers, quorum=quorum, deadline=deadline, lease=lease, late=late,
        clip=clip, optimizer=server_optimizer, rate=rate, checkpoint=checkpoint, plane=plane,
    )  # fmt: skip
    return Run(name, parameters, plan, options, rank=rank, url=url)


Plane = Literal["auto", "redis", "shm", "torch"]


@dataclass(frozen=True, slots=True)
class Options:
    """What each worker decides for itself; see `join`. What all must agree on is in the RunPlan."""

    compress: str = "none"
    shards: int = 1
    steps: int = 16
    outer: tuple[float, float] = (1.0, 0.0)
    push_every: int = 1
    fetch_every: int = 1
    in_flight: int = 1
    record: Path | None = None
    metrics: bool = True
    timeout: float | None = None


def _check(mode: str, plane: Plane, options: Options, *, needs_aggregator: bool, has_rounds: bool) -> Plane:
    """The plane that the options leave. Raises ConfigurationError for those that do not go together."""
    if mode not in MODES:
        raise ConfigurationError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if min(options.steps, options.push_every, options.fetch_every, options.shards) < 1 or options.in_flight < 0:
        raise ConfigurationError("steps, push_every, fetch_every and shards are at least 1, in_flight at least 0")
    in_rounds = mode in ("sync", "local")
    if mode == "hogwild" and has_rounds:
        raise ConfigurationError("mode hogwild has no rounds: clip and checkpoint do nothing there; leave them out")
    if options.shards > 1 and (options.compress.startswith("powersgd") or mode == "hogwild"):
        raise ConfigurationError("powersgd and mode hogwild take shards=1")
    if options.record is not None and (not in_rounds or options.shards > 1):
        raise ConfigurationError("record= is for modes sync and local with one shard; servers keep checkpoints")
    beside = in_rounds and options.shards == 1 and options.compress == "none" and options.record is None
    if plane in ("shm", "torch") and (needs_aggregator or not beside):
        raise ConfigurationError(
            f'plane="{plane}" is for modes sync and local with one shard, without compress, deadline, late, clip and '
            "record: those need the aggregator"
        )
    return "redis" if plane == "auto" and (needs_aggregator or not beside) else plane


class Run:
    """One worker's part in a run. For one thread; made by `join`."""

    def __init__(
        self, name: str, parameters: Parameters, plan: RunPlan, options: Options, *, rank: int | None, url: str | None
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.plan = plan
        self.options = options
        self.url = url
        base, more = divmod(parameters.size, options.shards)
        self.sizes = [base + (shard < more) for shard in range(options.shards)]
        self.recorder = Recorder(options.record) if options.record is not None else None
        self.round = 0
        """The open one; with a server, the version of this worker's weights."""
        self.optimizer: Any = None
        self.pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        """A state whose optimizer has not been seen yet."""
        self.last: Round | None = None
        """The last round that was applied here."""
        self.mean: Vector | None = None
        """Of the last round; with a server, what was last pushed."""
        self.sent = 0
        """Bytes of the last contribution, as it travelled."""
        self.encoding = self.decoding = 0.0
        """Seconds that it took to compress the last contribution, and to read the last mean."""
        self.waited = 0.0
        """Seconds that the last round was waited for."""
        self.plane: str = plan.plane
        """How vectors travel, once it is known."""
        shares = plan.plane in ("auto", "shm")
        self.exchange = Exchange(
            name, [plan.model_copy(update={"size": size}) for size in self.sizes],
            url=url, rank=rank, host=host(settings().shm_dir) if shares else "",
        )  # fmt: skip
        self._metrics = Metrics(name, url=url) if options.metrics else None
        self._mode: Mode | None = None
        self._samples = 0
        self._since = time.perf_counter()
        self._reported = -1

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def members(self) -> list[int]:
        """Ranks of the workers that take part."""
        return self.exchange.members

    @property
    def is_reporter(self) -> bool:
        """The lowest rank of the members: the one that speaks for the run."""
        return self.rank == min(self.members, default=self.rank)

    def __enter__(self) -> Self:
        self.exchange.open()
        try:
            self._mode = self._make_mode()
            self._mode.begin()
            if self.recorder is not None:
                tensors, note = self._mode.state()
                about = {
                    "mode": self.plan.mode, "outer": list(self.options.outer), "clip": self.plan.clip,
                    "round": self.round,
                }  # fmt: skip
                self.recorder.initial(self.rank, tensors, note, about)
        except BaseException:
            self._close()
            raise
        self._since = time.perf_counter()
        return self

    def _make_mode(self) -> Mode:
        if self.plan.plane != "torch":
            return MODES[self.plan.mode](self)
        from .collective import Collective, LocalCollective  # torch.distributed, for those who ask for it

        return (LocalCollective if self.plan.mode == "local" else Collective)(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._mode is not None:
                self._mode.end()
        finally:
            self._close()

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.close()
        self.exchange.close()
        if self._metrics is not None:
            self._metrics.close()

    def step(
        self, optimizer: Any = None, *, loss: Any = None, samples: int = 1, gradients: Any = None, **values: Any
    ) -> None:
        """After backward(): exchange, apply, zero.

        optimizer  any torch optimizer; for arrays a callable (parameters, gradients); None with a server
        loss, **values  numbers or one-element tensors, published as metrics
        samples    how many the gradient is a mean of, at least 1; contributions are weighted by it
        gradients  for a dictionary of arrays: a dictionary of their gradients
        """
        if self._mode is None:
            raise ConfigurationError("step() is for inside of `with join(...) as run:`")
        samples = _count(samples)
        if optimizer is not None and optimizer is not self.optimizer:
            self.optimizer = optimizer
            if self.pending is not None:
                self.parameters.load_optimizer(optimizer, *self.pending)
                self.pending = None
        given = {name: _number(value) for name, value in {"loss": loss, **values}.items() if value is not None}
        self._mode.step(gradients, optimizer, samples, given)
        self._samples += samples
        if self._metrics is not None and self.is_reporter:
            self._report(self._metrics, given)

    def all_reduce(self, vector: Vector) -> Vector:
        """The mean of all workers' vectors, float32 [parameters]: a round of its own. Read-only, in mode sync.

        What is returned is valid until the next round. Raises ConfigurationError for a vector of another shape, or
        with values beyond float32; NothingReduced when nobody's was finite.
        """
        if not isinstance(self._mode, Sync) or self.plan.mode != "sync":
            raise ConfigurationError("all_reduce is for mode sync")
        return self._mode.reduce(_float32(vector, self.parameters.size))

    def _report(self, metrics: Metrics, given: Mapping[str, float]) -> None:
        """Once a round, or in mode hogwild now and then. The round's values are means over all workers."""
        now = time.perf_counter()
        last = self.last
        if last is None:  # hogwild has no rounds; a server's first one is not here yet
            if self.plan.mode != "hogwild" or now - self._since < LOGGED_EVERY:
                return
            step, numbers = self.round, dict(given)
        elif last.round == self._reported:
            return
        else:
            step = self._reported = last.round
            numbers = {**given, **last.values, **self._numbers_of(last)}
        workers = len(self.members) or 1
        numbers |= {"members": workers, "samples_per_second": self._samples * workers / (now - self._since)}
        self._since, self._samples = now, 0
        metrics.log(step=step, **numbers)

    def _numbers_of(self, last: Round) -> dict[str, float]:
        numbers = {
            "staleness": last.staleness + last.late,
            "round_seconds": last.seconds,
            "refused": len(last.refused),
            "bytes_sent": self.sent,
            "bytes_raw": 4 * self.parameters.size,
        }
        if self.options.compress != "none":
            numbers |= {
                "bytes_saved": 4 * self.parameters.size - self.sent, "encode_seconds": self.encoding,
                "decode_seconds": self.decoding,
            }  # fmt: skip
        if self.mean is not None:
            numbers["gradient_norm"] = float(np.linalg.norm(self.mean))
        return numbers


def _float32(vector: Any, size: int) -> Vector:
    """Numbers [size], as they are or rounded. Raises ConfigurationError."""
    given = np.asarray(vector)
    if given.shape != (size,) or given.dtype.kind not in "fiu":
        raise ConfigurationError(f"all_reduce takes float32 [{size}], not {given.dtype} {list(given.shape)}")
    with np.errstate(over="ignore"):
        rounded = given.astype(np.float32, copy=False)
    if rounded is not given and np.isinf(rounded).sum() > np.isinf(given).sum():
        raise ConfigurationError("all_reduce takes float32: some of these values are beyond its range")
    return rounded


def _count(samples: Any) -> int:
    """A whole number above 0, of whatever type. Raises ConfigurationError."""
    try:
        count = int(samples)
    except (TypeError, ValueError, OverflowError):
        count = 0
    if not 1 <= count < 1 << 53 or count != samples:
        raise ConfigurationError(f"samples= is a whole number of at least 1, not {samples!r:.80}")
    return count


def _number(value: Any) -> float:
    return float(value.detach() if hasattr(value, "detach") else value)

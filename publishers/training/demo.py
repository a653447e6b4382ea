"""The demonstration: workers that train the digit model together, run after run, and offer weights for inference."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipeline import Pipeline, Tensor, catalog
from pipeline.blocking import BlockingPipeline, BlockingWatch
from pipeline.catalog import DIGIT_MODEL, DIGIT_PARAMETERS, INTENSITY, Round, Weights
from pipeline.errors import ConfigurationError

from ..command import opened_blocking
from ..datasets import Part, digits
from ..pace import Pace
from .exchange import JoinTimeout
from .run import Run, join

__all__ = ["Champion", "Diverged", "Plan", "digit_module", "state_of", "work"]

logger = logging.getLogger("publishers.training")

T = TypeVar("T")

QUIET = 0.3
"""Seconds without a further event after which history is taken as read."""
PAST = 60.0
"""Seconds of rounds that are looked at to find out which run is under way."""
MEETING = 3.0
"""Seconds after which a worker that waits for others looks again which run is under way."""
LEASE = 3.0
"""Seconds: a demonstration shares its cores with everything else."""
LOCAL_STEPS = 8


class Diverged(ConfigurationError):
    """Raised when the loss is not finite."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is told. All workers of a run get the same, except `rank`."""

    run: str
    """Runs are named `run`.1, `run`.2, …; each has its own seed."""
    rank: int = 0
    workers: int = 1
    mode: catalog.Mode = "sync"
    compress: str = "none"
    runs: int = 0
    """How many runs; 0: for ever."""
    rounds: int = 600
    """Of each run; in modes other than sync, steps of each worker."""
    batch: int = 64
    """Samples a worker and round."""
    learning_rate: float = 6e-3
    seed: int = 0
    rate: float = 0.0
    """At most so many rounds a second; 0: as many as can be."""
    quorum: int = 1
    deadline: float = 2.0
    """Seconds a round waits for all."""
    publish_every: int = 10
    """Rounds between two offers of weights for inference."""

    def name(self, number: int) -> str:
        return f"{self.run}.{number}"


class Champion:
    """Decides which weights are good enough for inference: no worse on validation data than the last published."""

    def __init__(self, validation: Part) -> None:
        self._images, self._labels = _tensors(validation)
        self.weights: Weights | None = None
        """The last published, whoever trained them."""
        self._score = 0.0
        self._published = 0.0

    def published(self, weights: Weights) -> None:
        if weights.model != DIGIT_MODEL:
            return
        parameters = {name: torch.as_tensor(tensor) for name, tensor in weights.parameters.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items() if tensor.dtype == torch.float32}
        if shapes == DIGIT_PARAMETERS and len(parameters) == len(shapes):
            module = digit_module(0)
            module.load_state_dict({name: tensor.clone() for name, tensor in parameters.items()})
            self.weights, self._score, self._published = weights, self.score(module), time.monotonic()

    def score(self, module: nn.Module) -> float:
        with torch.no_grad():
            return _accuracy(module(self._images), self._labels)

    def offer(self, module: nn.Module, run: str, round_: int) -> Weights | None:
        """The module's weights when good enough; else the last published ones, before the channel forgets them."""
        score = self.score(module)
        if self.weights is not None and score < self._score:
            fading = time.monotonic() - self._published > catalog.weights.keep / 2
            return self.weights if fading else None
        return Weights(
            model=DIGIT_MODEL,
            version=self.weights.version + 1 if self.weights else 1,
            parameters={name: Tensor(value.detach().clone()) for name, value in module.state_dict().items()},
            run=run,
            round=round_,
            score=score,
        )


def digit_module(seed: int) -> nn.Module:
    """The digit model of the catalog: float32 [n, 8, 8] in 0…1 → logits [n, 10]."""
    hidden, inputs = DIGIT_PARAMETERS["hidden.weight"]
    classes, _ = DIGIT_PARAMETERS["output.weight"]
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
    random = torch.Generator().manual_seed(seed)  # one of its own: another thread may draw from torch's
    with torch.no_grad():
        for layer in (first, second):
            bound = 1 / math.sqrt(layer.in_features)  # as torch's Linear begins
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=random)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), hidden=first, relu=nn.ReLU(), output=second))


def work(plan: Plan, url: str | None = None, report: Callable[[str, str], None] = lambda run, state: None) -> None:
    """Take part in the plan's runs, from the one that is under way. `report` gets each run's name and final state.

    Raises Diverged.
    """
    torch.set_num_threads(1)
    app = Pipeline("trainer", url)
    with (
        opened_blocking(app) as pipe,
        pipe.watch(catalog.rounds, since=PAST) as rounds,
        pipe.watch(catalog.weights, since=catalog.weights.keep) as weights,
    ):
        pace = Pace("training", plan.rate or None).follow_in_thread(app, pipe)
        worker = _Worker(plan, pipe, weights, url, pace)
        number = 0
        while True:
            number = max(number, _under_way(plan, _history(rounds)))
            if plan.runs and number > plan.runs:
                return
            try:
                state = worker.train(number)
            except JoinTimeout:
                logger.info("%s: the others are not here", plan.name(number))
                continue
            report(plan.name(number), state)
            number += 1


class _Worker:
    """One worker through its runs."""

    def __init__(
        self, plan: Plan, pipe: BlockingPipeline, weights: BlockingWatch[Weights], url: str | None, pace: Pace
    ) -> None:
        self._plan = plan
        self._pace = pace
        self._pipe = pipe
        self._weights = weights
        self._url = url
        self._images, self._labels = _tensors(digits().train.shard(plan.rank, plan.workers))
        self._champion = Champion(digits().validation)
        for published in _history(weights):
            self._champion.published(published)

    def train(self, number: int) -> str:
        """One run to its last round; returns the final state. Raises JoinTimeout, Diverged."""
        plan, seed = self._plan, self._plan.seed + number
        module = digit_module(seed)
        served = plan.mode in ("async", "dogwild")
        optimizer = None if served else torch.optim.Adam(module.parameters(), plan.learning_rate)
        with join(
            plan.name(number), module, mode=plan.mode, compress=plan.compress, workers=plan.workers, rank=plan.rank,
            quorum=plan.quorum, deadline=plan.deadline if plan.mode in ("sync", "local") else None, lease=LEASE,
            server_optimizer="adam", rate=plan.learning_rate, steps=LOCAL_STEPS, url=self._url, timeout=MEETING,
        ) as run:  # fmt: skip
            for step in itertools.count():
                at = run.round if plan.mode == "sync" else step
                if at >= plan.rounds:
                    break
                began = time.monotonic()
                self._step(run, module, optimizer, np.random.default_rng((seed, plan.rank, at)))
                if run.is_reporter and at and at % plan.publish_every == 0:
                    self._offer(run, module)
                self._pace.turn_in_thread(began)
        return state_of(module, optimizer)

    def _step(
        self, run: Run, module: nn.Module, optimizer: torch.optim.Optimizer | None, random: np.random.Generator
    ) -> None:
        batch = min(self._plan.batch, len(self._labels))
        chosen = random.choice(len(self._labels), batch, replace=False)
        logits = module(self._images[chosen])
        loss: torch.Tensor = functional.cross_entropy(logits, self._labels[chosen])
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss of round {run.round} is {loss.item()}; use a smaller --learning-rate")
        loss.backward()  # type: ignore[no-untyped-call]
        run.step(optimizer, loss=loss, accuracy=_accuracy(logits, self._labels[chosen]), samples=batch)

    def _offer(self, run: Run, module: nn.Module) -> None:
        while (message := self._weights.next(0)) is not None:
            self._champion.published(message.event)
        offered = self._champion.offer(module, run.name, run.round)
        if offered is not None:
            self._pipe.publish(catalog.weights, offered)
            self._champion.published(offered)


def _history(stream: BlockingWatch[T]) -> Iterator[T]:
    """What is on the channel up to now."""
    started = datetime.now(UTC)
    while (message := stream.next(QUIET)) is not None:
        yield message.event
        if message.time >= started:
            return


def _under_way(plan: Plan, heard: Iterator[Round]) -> int:
    """The number of the run that others are in; 1 when there is none."""
    latest = (1, -1)
    for closed in heard:
        number = closed.run.removeprefix(f"{plan.run}.")
        if closed.run.startswith(f"{plan.run}.") and number.isdecimal():
            latest = max(latest, (int(number), closed.round))
    return latest[0] + (plan.mode == "sync" and latest[1] >= plan.rounds - 1)


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    """SHA-256 of all parameters and the optimizer's state: equal for all workers after the same round."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().numpy().tobytes())
        for value in optimizer.state[parameter].values() if optimizer is not None else ():
            digest.update(torch.as_tensor(value).numpy().tobytes())
    return digest.hexdigest()


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(part.images) / INTENSITY, torch.from_numpy(part.labels)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()

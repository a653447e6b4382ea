"""Hyperparameter search by successive halving, one trial an event.

    best, *others = await successive_halving(app, "trials", candidates, budget=2000)

A trial is asked of a worker (`subscribers.mapreduce.worker`) as {"parameters": …, "resource": r}; it trains with so
much of the resource (iterations, trees, samples) and returns a score, higher is better.

Jamieson & Talwalkar 2016, Non-stochastic best arm identification and hyperparameter optimization; with their factor 2
replaced by `eta`, as in Li et al. 2018 (Hyperband).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import Pipeline
from pipeline.errors import ConfigurationError

from .mapreduce import scatter

__all__ = ["Trial", "successive_halving"]


@dataclass(frozen=True, slots=True)
class Trial:
    parameters: Mapping[str, Any]
    resource: int
    """What it was given in the last round that it took part in."""
    score: float


async def successive_halving(
    app: Pipeline, name: str, candidates: Sequence[Mapping[str, Any]], *, budget: int, eta: int = 2, **options: Any
) -> list[Trial]:
    """The last trial of each candidate: those that came furthest first, and of these the best.

    budget   of the resource, for all trials together: each round gets an equal share, divided among who is left
    eta      a round keeps the best of every `eta` candidates
    options  as `publishers.mapreduce.scatter` takes them

    Of equal scores the earlier candidate's is better, and NaN is worst. Raises ConfigurationError when the budget does
    not suffice for one unit a trial, and what `scatter` raises.
    """
    if eta < 2 or not candidates:
        raise ConfigurationError(f"eta={eta} and {len(candidates)} candidates: expected at least 2, and at least 1")
    rounds = _rounds(len(candidates), eta)
    if budget < rounds * len(candidates):
        raise ConfigurationError(
            f"budget={budget}: {len(candidates)} candidates in {rounds} rounds need at least {rounds * len(candidates)}"
        )
    left = list(range(len(candidates)))
    last: dict[int, Trial] = {}
    reached: dict[int, int] = {}
    for number in range(rounds):
        resource = budget // (rounds * len(left))
        asked = [{"parameters": dict(candidates[at]), "resource": resource} for at in left]
        scores = await scatter(app, name, asked, **options)
        for at, score in zip(left, scores, strict=True):
            last[at], reached[at] = Trial(candidates[at], resource, float(score)), number
        left.sort(key=lambda at: (_badness(last[at].score), at))
        left = left[: math.ceil(len(left) / eta)]
    order = sorted(last, key=lambda at: (-reached[at], _badness(last[at].score), at))
    return [last[at] for at in order]


def _rounds(candidates: int, eta: int) -> int:
    """Until one is left."""
    rounds = 1
    while candidates > eta:
        candidates = math.ceil(candidates / eta)
        rounds += 1
    return rounds


def _badness(score: float) -> float:
    return math.inf if math.isnan(score) else -score

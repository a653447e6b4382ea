"""Gradient rounds: one mean a round, whoever is late, twice, wrong or killed."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from pipeline import Pipeline, Tensor, catalog
from pipeline.catalog import Gradient, Round, Weights
from subscribers import aggregation

from .apps import idle, until
from .processes import line_with
from .programs import app_program, collect, events, program, served


def gradient(rank: int, values: list[float] | Any, **more: Any) -> Gradient:
    fields = {"run": "r", "round": 0, "workers": 2, "quorum": 2, "deadline": 30.0, "samples": 1, "loss": 1.0}
    tensor = values if isinstance(values, Tensor) else Tensor(np.array(values, np.float32))
    return Gradient(**{**fields, "accuracy": 0.5, "rank": rank, "gradient": tensor, **more})


@pytest.fixture
async def app(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pipeline]:
    """The aggregator is served; what is yielded publishes to it."""
    monkeypatch.setattr(aggregation, "rounds", aggregation.Rounds())
    async with served(aggregation.app, valkey_url), Pipeline("t", valkey_url) as app:
        yield app


async def reasons(app: Pipeline) -> list[str]:
    return [letter.event.reason for letter in await app.dead_letters("training.gradients")]


async def test_a_round_is_the_mean_weighted_by_samples(app: Pipeline) -> None:
    await app.publish(catalog.gradients, gradient(0, [1, 2], samples=1, loss=4.0, accuracy=0.0))
    await app.publish(catalog.gradients, gradient(1, [5, 10], samples=3, loss=8.0, accuracy=1.0))
    [closed] = events(await collect(app, catalog.rounds, 1))
    assert closed.gradient == Tensor(np.array([4, 8], np.float32))
    assert (closed.run, closed.round, closed.ranks, closed.loss, closed.accuracy) == ("r", 0, [0, 1], 7.0, 0.75)


async def test_the_order_of_arrival_does_not_change_a_bit(app: Pipeline) -> None:
    values = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32) * [[1e-8], [1], [1e8]]
    for number, order in enumerate(itertools.permutations(range(3))):
        for rank in order:
            await app.publish(
                catalog.gradients, gradient(rank, values[rank], round=number, workers=3, samples=rank + 1)
            )
    closed = events(await collect(app, catalog.rounds, 6))
    assert [one.ranks for one in closed] == [[0, 1, 2]] * 6
    assert len({one.gradient.buffer().tobytes() for one in closed}) == 1


async def test_nothing_is_acknowledged_before_its_round_is_closed(app: Pipeline) -> None:
    await app.publish(catalog.gradients, gradient(0, [1]))
    await asyncio.sleep(0.2)
    assert (await app.stats()).channels["training.gradients"].groups["aggregation"].pending == 1
    await app.publish(catalog.gradients, gradient(1, [1]))
    ledger = await idle(app, "training.gradients")
    assert ledger.groups["aggregation"].handled == 2


async def test_after_the_deadline_a_quorum_is_enough(app: Pipeline) -> None:
    started = time.monotonic()
    for rank in (2, 0):
        await app.publish(catalog.gradients, gradient(rank, [rank], workers=3, deadline=0.3))
    [closed] = events(await collect(app, catalog.rounds, 1))
    assert closed.ranks == [0, 2]
    assert 0.25 < time.monotonic() - started < 2
    assert 0.25 < closed.seconds < 2


async def test_below_the_quorum_a_round_waits_past_its_deadline(app: Pipeline) -> None:
    await app.publish(catalog.gradients, gradient(0, [1], deadline=0.1))
    await asyncio.sleep(0.4)
    assert await collect_now(app, catalog.rounds) == []
    await app.publish(catalog.gradients, gradient(1, [3], deadline=0.1))
    assert events(await collect(app, catalog.rounds, 1))[0].ranks == [0, 1]


async def test_a_round_that_never_reaches_its_quorum_is_set_aside(
    app: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "ABANDONED", 0.1)
    for rank in range(2):
        await app.publish(catalog.gradients, gradient(rank, [1], workers=4, quorum=3, deadline=0.1))
    ledger = await idle(app, "training.gradients")
    assert ledger.groups["aggregation"].dead == 2
    assert {*await reasons(app)} == {"run 'r', round 0: 2 of 4 workers, below the quorum of 3, after 0.1 s"}


async def test_a_gradient_that_comes_twice_counts_once(app: Pipeline) -> None:
    for _ in range(3):
        await app.publish(catalog.gradients, gradient(0, [2]))
    await app.publish(catalog.gradients, gradient(1, [4]))
    for rank in range(2):
        await app.publish(catalog.gradients, gradient(rank, [100]))
    ledger = await idle(app, "training.gradients")
    assert (ledger.groups["aggregation"].handled, ledger.groups["aggregation"].dead) == (6, 0)
    [closed] = await collect_now(app, catalog.rounds)
    assert closed.gradient == Tensor(np.array([3], np.float32))


async def test_a_late_gradient_is_acknowledged_without_effect_by_an_aggregator_that_began_after_its_round(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "rounds", aggregation.Rounds())
    async with Pipeline("t", valkey_url) as app:
        past = Round(run="r", round=7, ranks=[0], gradient=Tensor([0.0]), loss=0, accuracy=0, seconds=0)
        await app.publish(catalog.rounds, past)
        await app.publish(catalog.gradients, gradient(0, [1], round=7))
        async with served(aggregation.app, valkey_url):
            ledger = await idle(app, "training.gradients")
        assert ledger.groups["aggregation"].handled == 1
        assert await collect_now(app, catalog.rounds) == [past]


async def test_runs_do_not_mix(app: Pipeline) -> None:
    for rank in range(2):
        for run in ("a", "b"):
            await app.publish(catalog.gradients, gradient(rank, [1 if run == "a" else 5], run=run))
    closed = {one.run: one.gradient.tolist() for one in events(await collect(app, catalog.rounds, 2))}
    assert closed == {"a": [1.0], "b": [5.0]}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (gradient(1, [1, np.nan, np.inf]), "run 'r', round 0, rank 1: 2 of 3 values are NaN or infinite"),
        (
            gradient(1, [1, 2, 3], loss=float("nan")),
            "run 'r', round 0, rank 1: loss nan, accuracy 0.5, expected finite",
        ),
        (gradient(1, [1, 2]), "sent Tensor(float32, shape=[2]); expected Tensor(float32, shape=[3])"),
        (gradient(1, Tensor(np.ones((3, 1)))), "Tensor(float64, shape=[3, 1]), expected float32 of one dimension"),
        (gradient(2, [1, 2, 3]), "rank 2: ranks of 2 workers are 0…1"),
    ],
    ids=["nan", "loss", "shape", "dtype", "rank"],
)
async def test_a_gradient_that_does_not_fit_is_refused_with_the_reason_and_the_round_goes_on(
    bad: Gradient, said: str, app: Pipeline
) -> None:
    await app.publish(catalog.gradients, [gradient(0, [1, 1, 1]), bad, gradient(1, [3, 3, 3])])
    [closed] = events(await collect(app, catalog.rounds, 1))
    assert closed.gradient == Tensor(np.array([2, 2, 2], np.float32))
    ledger = await idle(app, "training.gradients")
    assert ledger.groups["aggregation"].dead == 1
    [reason] = await reasons(app)
    assert said in reason


async def test_weights_come_out_together_with_their_round(app: Pipeline) -> None:
    offers = [
        Weights(model="m", version=rank + 1, parameters={"w": Tensor([float(rank)])}, run="r", round=0)
        for rank in range(2)
    ]
    for rank in (1, 0):
        await app.publish(catalog.gradients, gradient(rank, [1], weights=offers[rank]))
    assert events(await collect(app, catalog.weights, 1)) == offers[:1]
    assert len(await collect(app, catalog.rounds, 1)) == 1


async def test_a_killed_aggregators_gradients_go_to_the_next_one(valkey_url: str) -> None:
    async with Pipeline("t", valkey_url) as app:
        with program(*app_program("subscribers.aggregation"), url=valkey_url) as first:
            await asyncio.to_thread(line_with, "ready", first)
            await app.publish(catalog.gradients, gradient(0, [1], round=3))
            await until_pending(app, 1)
            first.kill()
        with program(*app_program("subscribers.aggregation"), url=valkey_url) as second:
            await asyncio.to_thread(line_with, "ready", second)
            await app.publish(catalog.gradients, gradient(1, [3], round=3))
            [closed] = events(await collect(app, catalog.rounds, 1))
        assert (closed.round, closed.ranks, closed.gradient.tolist()) == (3, [0, 1], [2.0])


async def test_a_stopping_aggregator_hands_its_open_rounds_back_at_once(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Pipeline("t", valkey_url) as app:
        monkeypatch.setattr(aggregation, "rounds", aggregation.Rounds())
        async with served(aggregation.app, valkey_url):
            for rank in (0, 2):
                await app.publish(catalog.gradients, gradient(rank, [rank], workers=3))
            await until_pending(app, 2)
            started = time.monotonic()
        assert time.monotonic() - started < 1
        monkeypatch.setattr(aggregation, "rounds", aggregation.Rounds())
        async with served(aggregation.app, valkey_url):
            await app.publish(catalog.gradients, gradient(1, [1], workers=3))
            assert events(await collect(app, catalog.rounds, 1, seconds=2.0))[0].ranks == [0, 1, 2]


async def test_another_aggregators_round_releases_what_is_held_for_it(app: Pipeline) -> None:
    for rank in range(2):
        await app.publish(catalog.gradients, gradient(rank, [1], workers=3))
    await until_pending(app, 2)
    await app.publish(
        catalog.rounds, Round(run="r", round=0, ranks=[2], gradient=Tensor([0.0]), loss=0, accuracy=0, seconds=0)
    )
    ledger = await idle(app, "training.gradients", 2.0)
    assert ledger.groups["aggregation"].handled == 2
    assert len(await collect_now(app, catalog.rounds)) == 1


async def test_many_runs_side_by_side(app: Pipeline) -> None:
    runs = [f"run-{number}" for number in range(40)]
    for rank, number, run in itertools.product(range(2), range(3), runs):
        await app.publish(catalog.gradients, gradient(rank, [rank], run=run, round=number))
    closed = events(await collect(app, catalog.rounds, 120))
    assert len({(one.run, one.round) for one in closed}) == 120
    await until(lambda: not aggregation.rounds._open)


async def collect_now(app: Pipeline, channel: Any) -> list[Any]:
    """What the channel holds."""
    return events(await collect(app, channel, (await app.stats()).channels[channel.name].published))


async def until_pending(app: Pipeline, count: int) -> None:
    async with asyncio.timeout(10):
        while True:
            groups = (await app.stats()).channels["training.gradients"].groups
            if "aggregation" in groups and groups["aggregation"].pending == count and not groups["aggregation"].lag:
                return
            await asyncio.sleep(0.02)

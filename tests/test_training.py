"""Training: workers that stay identical whatever is killed, weights that only get better, metrics that never hurt."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline import Pipeline, Tensor, catalog
from pipeline.catalog import Round, TrainingMetrics
from pipeline.server import Server
from publishers.datasets import digits
from publishers.training import Metrics
from publishers.training.worker import Champion, Diverged, LogIncomplete, Plan, Trainer, work
from subscribers import aggregation
from subscribers.models import DigitClassifier, digit_module

from .apps import until
from .processes import ended, line_with
from .programs import app_program, collect, events, program, served


@pytest.fixture
async def aggregator(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The URL at which one is served."""
    monkeypatch.setattr(aggregation, "rounds", aggregation.Rounds())
    async with served(aggregation.app, valkey_url):
        yield valkey_url


async def states(url: str, *plans: Plan) -> list[list[tuple[str, str]]]:
    """What each worker reports: its runs' names and final states."""
    reported: list[list[tuple[str, str]]] = [[] for _ in plans]
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(
                work(plan, url, lambda run, state, mine=mine: mine.append((run, state)))  # type: ignore[misc]
                for plan, mine in zip(plans, reported, strict=True)
            )
        )
    return reported


def team(workers: int, **more: Any) -> list[Plan]:
    return [Plan("t", rank=rank, workers=workers, runs=1, quorum=workers, **more) for rank in range(workers)]


# -- rounds --------------------------------------------------------------------------------------------------------


async def test_all_workers_end_identical_to_the_bit_and_the_next_time_too(aggregator: str) -> None:
    first, second, third = await states(aggregator, *team(3, rounds=20))
    assert first == second == third
    assert [run for run, _ in first] == ["t.1"]
    async with Pipeline("t", aggregator) as app:
        rounds = events(await collect(app, catalog.rounds, 20))
    assert [(one.round, one.ranks) for one in rounds] == [(number, [0, 1, 2]) for number in range(20)]
    [again] = await states(aggregator, Plan("t", rank=2, workers=3, runs=1, rounds=20))
    assert again == first, "a worker that only replays the rounds ends where the others did"


async def test_each_run_has_its_own_seed(aggregator: str) -> None:
    [reported] = await states(aggregator, Plan("t", runs=3, rounds=3))
    assert [run for run, _ in reported] == ["t.1", "t.2", "t.3"]
    assert len({state for _, state in reported}) == 3


async def test_a_worker_that_joins_late_becomes_identical(aggregator: str) -> None:
    early, late = (Plan("t", rank=rank, workers=2, runs=1, rounds=40, rate=50, deadline=0.05) for rank in range(2))

    async def join_later() -> list[list[tuple[str, str]]]:
        async with Pipeline("t", aggregator) as app:
            await collect(app, catalog.rounds, 8)
        return await states(aggregator, late)

    [first], [second] = await asyncio.gather(states(aggregator, early), join_later())
    assert first == second
    async with Pipeline("t", aggregator) as app:
        ranks = [one.ranks for one in events(await collect(app, catalog.rounds, 40))]
    assert ranks[0] == [0]
    assert [0, 1] in ranks


async def test_a_run_whose_beginning_is_gone_cannot_be_joined_and_says_so(valkey_url: str) -> None:
    async with Pipeline("t", valkey_url) as app:
        orphan = Round(
            run="t.4", round=9, ranks=[0], gradient=Tensor(np.zeros(2410, np.float32)), loss=0, accuracy=0, seconds=0
        )
        await app.publish(catalog.rounds, orphan)
    with pytest.raises(LogIncomplete, match=r"run t\.4 cannot be joined: round 0 is not on channel 'training\.rounds'"):
        await states(valkey_url, Plan("t"))


async def test_only_the_first_of_two_rounds_with_one_number_is_applied(aggregator: str) -> None:
    [reported] = await states(aggregator, Plan("t", runs=1, rounds=5))
    async with Pipeline("t", aggregator) as app:
        other = Round(
            run="t.1", round=2, ranks=[0], gradient=Tensor(np.ones(2410, np.float32)), loss=0, accuracy=0, seconds=0
        )
        await app.publish(catalog.rounds, other)
    assert await states(aggregator, Plan("t", runs=1, rounds=5)) == [reported]


async def test_a_round_of_another_shape_is_left_out(aggregator: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Pipeline("t", aggregator) as app:
        odd = Round(run="t.1", round=0, ranks=[0], gradient=Tensor([1.0, 2.0]), loss=0, accuracy=0, seconds=0)
        await app.publish(catalog.rounds, odd)
    aggregation.rounds = aggregation.Rounds()  # one that has not seen it
    [[(run, _)]] = await states(aggregator, Plan("t", runs=1, rounds=1, patience=0.2))
    assert run == "t.1"
    assert "is left out; expected float32 [2410]" in caplog.text


async def test_training_outlives_a_killed_aggregator(valkey_url: str) -> None:
    plans = team(2, rounds=120, rate=60, patience=0.5)
    async with Pipeline("t", valkey_url) as app:
        training = asyncio.create_task(states(valkey_url, *plans))
        with program(*app_program("subscribers.aggregation"), url=valkey_url) as first:
            await collect(app, catalog.rounds, 30)
            first.kill()
        with program(*app_program("subscribers.aggregation"), url=valkey_url):
            one, two = await training
        assert one == two
        rounds = events(await collect(app, catalog.rounds, 120))
        assert [closed.round for closed in rounds] == list(range(120))
        assert [closed.ranks for closed in rounds] == [[0, 1]] * 120
        assert one[0][1] == unbroken(plans), "the kill left no trace in the result"


def unbroken(plans: list[Plan]) -> str:
    """The state after the same run without Redis: means in rank order, as the aggregator computes them."""
    trainers = [Trainer(plan, 1, digits().train) for plan in plans]
    for _ in range(plans[0].rounds):
        total = np.zeros(2410)
        for trainer in trainers:
            total += trainer.gradient()[0].numpy().astype(np.float64) * trainer.batch
        mean = Tensor((total / sum(trainer.batch for trainer in trainers)).astype(np.float32))
        for trainer in trainers:
            trainer.apply(mean)
    [state] = {trainer.state() for trainer in trainers}
    return state


# -- processes -----------------------------------------------------------------------------------------------------


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


async def test_a_killed_worker_is_started_again_and_ends_identical(aggregator: str) -> None:
    command = ("-m", "publishers.training", "--run", "p", "--runs", "1", "--rounds", "150", "--rate", "40")
    with program(*command, "--deadline", "0.3", url=aggregator) as launcher:
        async with Pipeline("t", aggregator) as app:
            await collect(app, catalog.rounds, 20)
        workers_of(launcher)[1].kill()
        output = await asyncio.to_thread(launcher.communicate, timeout=60)
    assert launcher.returncode == 0
    assert "worker 1 died (SIGKILL) and is started again" in output[0]
    found = re.findall(r"^run p\.1 rank (\d) state (\w{64})$", output[0], re.MULTILINE)
    assert sorted(rank for rank, _ in found) == ["0", "1"]
    assert len({state for _, state in found}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_no_worker_outlives_its_launcher(number: signal.Signals, valkey_url: str) -> None:
    with program("-m", "publishers.training", url=valkey_url) as launcher:
        await asyncio.to_thread(line_with, "has no mean yet; is an aggregator running?", launcher)
        workers = workers_of(launcher)
        assert len(workers) == 2
        launcher.send_signal(number)
        assert await asyncio.to_thread(ended, *workers)
        assert await asyncio.to_thread(launcher.wait, 5) == (0 if number == signal.SIGTERM else -9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "0"], "0 is not above 0"),
        (["--workers", "2", "--rank", "2"], "--rank is from 0 to 1"),
        (["--workers", "2", "--quorum", "3"], "--quorum 3 of 2 workers cannot be reached"),
    ],
)
def test_impossible_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from publishers.training.command_line import main

    with contextlib.suppress(SystemExit):
        assert main(arguments) == 2
    assert said in capsys.readouterr().err


# -- the model -----------------------------------------------------------------------------------------------------


def test_the_trainers_model_is_the_one_that_inference_serves() -> None:
    champion = Champion(digits().validation)
    trainer = Trainer(Plan("t"), 1, digits().train)
    offered = champion.offer(trainer, "t.1")
    assert offered is not None
    served_ = DigitClassifier.of(offered)
    part = digits().validation
    labels = np.argmax(served_.predict(part.images), axis=1)
    assert (labels == part.labels).mean() == pytest.approx(offered.score)
    assert list(digit_module().state_dict()) == list(trainer.parameters), "gradients are flattened in state_dict order"


def test_the_gradient_is_that_of_the_loss_over_the_shards_samples() -> None:
    trainer = Trainer(Plan("t", batch=10_000), 1, digits().train)
    flat, loss, accuracy = trainer.gradient()
    module = digit_module().requires_grad_()
    module.load_state_dict(trainer.parameters)
    part = digits().train
    logits = module(torch.from_numpy(part.images) / 16)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels))
    expected.backward()
    gradients = torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters()])  # type: ignore[union-attr]
    assert torch.allclose(flat, gradients, atol=1e-6)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= accuracy < 0.4


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    trainer = Trainer(Plan("t"), 1, digits().train)
    trainer.apply(Tensor(np.full(2410, np.nan, np.float32)))
    with pytest.raises(Diverged, match="the gradient of round 1 is not finite; use a smaller --learning-rate"):
        trainer.gradient()


async def test_the_first_run_carries_held_out_accuracy_above_95_percent(aggregator: str) -> None:
    """In the demo's 8 rounds a second and two workers this is 20 s."""
    await states(aggregator, *team(2, rounds=161))
    part = digits().held_out
    async with Pipeline("t", aggregator) as app:
        published = (await app.stats()).channels["weights"].published
        messages = await collect(app, catalog.weights, published)
    best = DigitClassifier.of(messages[-1].event)
    assert (np.argmax(best.predict(part.images), axis=1) == part.labels).mean() > 0.95


async def test_weights_that_are_worse_than_the_last_are_not_published(aggregator: str) -> None:
    await states(aggregator, *team(2, rounds=161))
    await states(aggregator, Plan("bad", runs=1, rounds=161, learning_rate=1e-6, publish_every=1))
    async with Pipeline("t", aggregator) as app:
        published = (await app.stats()).channels["weights"].published
        messages = events(await collect(app, catalog.weights, published))
    assert {one.run for one in messages} == {"t.1"}
    scores = [one.score for one in messages]
    assert scores == sorted(scores)
    assert [one.version for one in messages] == list(range(1, len(messages) + 1))


def test_the_last_weights_are_published_again_before_the_channel_forgets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    champion = Champion(digits().validation)
    trainer = Trainer(Plan("t"), 1, digits().train)
    good = champion.offer(trainer, "t.1")
    assert good is not None
    champion.published(good)
    champion._score = 1.0
    assert champion.offer(trainer, "t.2") is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + catalog.weights.keep * 0.6)
    assert champion.offer(trainer, "t.2") is good


# -- metrics -------------------------------------------------------------------------------------------------------


async def test_metrics_of_any_loop_reach_the_channel(url: str) -> None:
    def loop() -> int:
        with Metrics("mine", url=url) as metrics:
            for step in range(300):
                metrics.log(step=step, loss=torch.tensor(1 / (step + 1)), accuracy=np.float64(0.5), lr=1)
        return metrics.dropped

    assert await asyncio.to_thread(loop) == 0
    async with Pipeline("t", url) as app:
        logged = events(await collect(app, catalog.training_metrics, 300))
    assert [one.step for one in logged] == list(range(300))
    assert logged[3] == TrainingMetrics(run="mine", step=3, values={"loss": 0.25, "accuracy": 0.5, "lr": 1.0})


async def test_what_is_no_number_is_left_out_and_counted_and_the_loop_goes_on(valkey_url: str) -> None:
    def loop() -> int:
        with Metrics("mine", url=valkey_url) as metrics:
            metrics.log(step=1, loss=float("nan"), note="good", many=np.zeros(3))
            metrics.log(step="two", loss=1.0)  # type: ignore[arg-type]
            metrics.log(step=3, loss=float("inf"))
        metrics.log(step=4, loss=1.0)
        return metrics.dropped

    assert await asyncio.to_thread(loop) == 4
    async with Pipeline("t", valkey_url) as app:
        first, third = events(await collect(app, catalog.training_metrics, 2))
    assert np.isnan(first.values["loss"])
    assert [*first.values] == ["loss"]
    assert third.values == {"loss": float("inf")}


def test_without_redis_logging_neither_blocks_nor_raises_and_what_is_dropped_is_counted() -> None:
    metrics = Metrics("mine", url="redis://127.0.0.1:1", capacity=100)
    started = time.monotonic()
    for step in range(1000):
        metrics.log(step=step, loss=0.0)
    assert time.monotonic() - started < 0.5
    assert metrics.dropped == 900
    metrics.close(0.1)
    assert metrics.dropped == 1000


async def test_metrics_wait_for_a_redis_that_comes_later() -> None:
    with Server() as server:
        port, url = int(server.url.rsplit(":", 1)[1].removesuffix("/0")), server.url
    metrics = Metrics("mine", url=url)
    metrics.log(step=1, loss=0.5)
    await asyncio.sleep(0.3)
    with Server(port=port):
        metrics.log(step=2, loss=0.4)
        async with Pipeline("t", url) as app:
            assert [one.step for one in events(await collect(app, catalog.training_metrics, 2))] == [1, 2]
        await asyncio.to_thread(metrics.close)
    assert metrics.dropped == 0


async def test_the_trainer_logs_its_own_figures(aggregator: str) -> None:
    await states(aggregator, Plan("t", runs=1, rounds=5))
    async with Pipeline("t", aggregator) as app:
        logged = events(await collect(app, catalog.training_metrics, 5))
        rounds = events(await collect(app, catalog.rounds, 5))
    await until(lambda: True)
    for one, closed in zip(logged, rounds, strict=True):
        assert (one.run, one.step, one.values["loss"]) == ("t.1", closed.round, closed.loss)
        assert {*one.values} == {"loss", "accuracy", "gradient_norm", "samples_per_second", "round_seconds"}

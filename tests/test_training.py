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

from pipeline import Pipeline, catalog
from pipeline.catalog import Round, SetRate, TrainingMetrics
from pipeline.server import Server
from pipeline.watching import Watch
from publishers.datasets import digits
from publishers.training import Metrics
from publishers.training.demo import Champion, Diverged, Plan, digit_module, state_of, work
from subscribers import aggregation, models
from subscribers.models import DigitClassifier

from .processes import ended, line_with
from .programs import collect, events, program, served


@pytest.fixture
async def aggregator(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The URL at which one is served."""
    monkeypatch.setattr(aggregation, "runs", aggregation.Runs())
    async with served(aggregation.app, valkey_url):
        yield valkey_url


async def states(url: str, *plans: Plan) -> list[list[tuple[str, str]]]:
    """What each worker reports: its runs' names and final states."""
    reported: list[list[tuple[str, str]]] = [[] for _ in plans]
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(
                asyncio.to_thread(work, plan, url, lambda run, state, mine=mine: mine.append((run, state)))
                for plan, mine in zip(plans, reported, strict=True)
            )
        )
    return reported


def team(workers: int, **more: Any) -> list[Plan]:
    return [Plan("t", rank=rank, workers=workers, runs=1, quorum=workers, **more) for rank in range(workers)]


async def rounds_of(url: str, run: str, count: int) -> list[Round]:
    async with Pipeline("t", url) as app:
        closed: list[Round] = events(await collect(app, catalog.rounds, count))
    assert {one.run for one in closed} == {run}
    return closed


# -- the demonstration -----------------------------------------------------------------------------------------------


async def test_all_workers_end_identical_to_the_bit_and_the_next_time_too(aggregator: str) -> None:
    first, second, third = await states(aggregator, *team(3, rounds=20))
    assert first == second == third
    assert [run for run, _ in first] == ["t.1"]
    rounds = await rounds_of(aggregator, "t.1", 20)
    assert [(one.round, one.ranks) for one in rounds] == [(number, [0, 1, 2]) for number in range(20)]
    plans = [Plan("u", rank=rank, workers=3, runs=1, quorum=3, rounds=20) for rank in range(3)]
    again = await states(aggregator, *plans)
    assert {state for reports in again for _, state in reports} == {first[0][1]}, "the same seed, the same state"


async def test_each_run_has_its_own_seed(aggregator: str) -> None:
    [reported] = await states(aggregator, Plan("t", runs=3, rounds=3))
    assert [run for run, _ in reported] == ["t.1", "t.2", "t.3"]
    assert len({state for _, state in reported}) == 3


async def test_the_result_is_that_of_the_same_steps_without_redis(aggregator: str) -> None:
    plans = team(2, rounds=30)
    first, second = await states(aggregator, *plans)
    assert first == second == [("t.1", unbroken(plans))]


def unbroken(plans: list[Plan]) -> str:
    """The state after the same run in one process: means in rank order, as the aggregator computes them."""
    torch.set_num_threads(1)  # as the workers do: the number of threads decides how sums are split, and rounded
    module = digit_module(plans[0].seed + 1)
    optimizer = torch.optim.Adam(module.parameters(), plans[0].learning_rate)
    shards = [digits().train.shard(plan.rank, plan.workers) for plan in plans]
    for number in range(plans[0].rounds):
        gradients = []
        for plan, part in zip(plans, shards, strict=True):
            random = np.random.default_rng((plan.seed + 1, plan.rank, number))
            chosen = random.choice(len(part), plan.batch, replace=False)
            logits = module(torch.from_numpy(part.images)[chosen] / 16)
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(part.labels)[chosen])
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        for parameter, parts in zip(module.parameters(), zip(*gradients, strict=True), strict=True):
            parameter.grad = sum(parts[1:], parts[0]) * (1 / len(parts))
        optimizer.step()
    return state_of(module, optimizer)


async def test_the_trainer_logs_its_own_figures(aggregator: str) -> None:
    await states(aggregator, Plan("t", runs=1, rounds=5), Plan("c", runs=1, rounds=5, compress="bf16"))
    async with Pipeline("t", aggregator) as app:
        rounds = events(await collect(app, catalog.rounds, 10))
        logged = events(await collect(app, catalog.training_metrics, 10))
    losses = {(one.run, one.round): one.values["loss"] for one in rounds}
    assert {(one.run, one.step): one.values["loss"] for one in logged} == losses
    usual = {
        "loss", "accuracy", "gradient_norm", "staleness", "samples_per_second", "round_seconds", "members",
        "bytes_sent", "bytes_raw", "refused",
    }  # fmt: skip
    for one in logged:
        values = one.values
        assert values["bytes_raw"] == 4 * 2410
        if one.run == "t.1":
            assert {*values} == usual
            assert values["bytes_sent"] == values["bytes_raw"]
        else:
            assert {*values} == usual | {"bytes_saved", "encode_seconds", "decode_seconds"}
            assert values["bytes_sent"] == values["bytes_saved"] == 2 * 2410
            assert 0 < values["encode_seconds"] + values["decode_seconds"] < 0.1


@pytest.mark.parametrize("mode", ["local", "async", "dogwild", "hogwild"])
async def test_every_mode_learns_the_digits(mode: Any, aggregator: str) -> None:
    plans = [Plan("t", rank=rank, workers=2, runs=1, mode=mode, rounds=300, rate=100) for rank in range(2)]
    await states(aggregator, *plans)
    async with Pipeline("t", aggregator) as app:
        published = (await app.stats()).channels["weights"].published
        best = DigitClassifier.of((await collect(app, catalog.weights, published))[-1].event)
    part = digits().held_out
    assert (np.argmax(best.predict(part.images), axis=1) == part.labels).mean() > 0.9


# -- processes -----------------------------------------------------------------------------------------------------


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


async def test_a_killed_worker_is_started_again_and_ends_identical(aggregator: str) -> None:
    command = ("-m", "publishers.training", "--run", "p", "--runs", "1", "--rounds", "400", "--rate", "8")
    with program(*command, "--deadline", "0.3", url=aggregator) as launcher:
        async with Pipeline("t", aggregator) as app, asyncio.timeout(90), app.watch(catalog.rounds, since=60) as rounds:
            await closed_by([0, 1], rounds)
            workers_of(launcher)[1].kill()
            await closed_by([0], rounds)
            await closed_by([0, 1], rounds)
            await app.publish(catalog.rate_settings, SetRate(publisher="training", rate=None))
        output, _ = await asyncio.to_thread(launcher.communicate, timeout=60)
    assert launcher.returncode == 0, output
    assert "worker 1 died (SIGKILL) and is started again" in output
    found = re.findall(r"^run p\.1 rank (\d) state (\w{64})$", output, re.MULTILINE)
    assert sorted(rank for rank, _ in found) == ["0", "1"], output
    assert len({state for _, state in found}) == 1


async def closed_by(ranks: list[int], rounds: Watch[Round]) -> None:
    """Wait for the next round that these workers closed."""
    async for message in rounds:
        if message.event.ranks == ranks:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_no_worker_outlives_its_launcher(number: signal.Signals, valkey_url: str) -> None:
    with program("-m", "publishers.training", url=valkey_url) as launcher:
        await asyncio.to_thread(line_with, "no aggregator answers; start one", launcher)
        workers = workers_of(launcher)
        assert len(workers) == 2
        launcher.send_signal(number)
        assert await asyncio.to_thread(ended, *workers)
        assert await asyncio.to_thread(launcher.wait, 5) == (0 if number == signal.SIGTERM else -9)


async def test_a_worker_that_is_stopped_ends_at_little_cost(aggregator: str) -> None:
    """Where others want the cores, a second of computing is several: `pipeline up` would kill it."""
    with program("-m", "publishers.training", "--workers", "1", "--rate", "20", url=aggregator) as launcher:
        async with Pipeline("t", aggregator) as app:
            await collect(app, catalog.rounds, 5, 60)
        [worker] = workers_of(launcher)
        before = now = worker.cpu_times()
        launcher.send_signal(signal.SIGTERM)
        with contextlib.suppress(psutil.NoSuchProcess):
            while worker.status() != psutil.STATUS_ZOMBIE:
                now = worker.cpu_times()
                await asyncio.sleep(0.005)
        assert await asyncio.to_thread(launcher.wait, 10) == 0
    assert now.user + now.system - before.user - before.system < 0.25


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
    module = digit_module(1)
    offered = champion.offer(module, "t.1", 0)
    assert offered is not None
    served_ = DigitClassifier.of(offered)
    part = digits().validation
    labels = np.argmax(served_.predict(part.images), axis=1)
    assert (labels == part.labels).mean() == pytest.approx(offered.score)
    assert list(models.digit_module().state_dict()) == list(module.state_dict())


async def test_a_loss_that_is_not_finite_ends_the_run(aggregator: str) -> None:
    with pytest.raises(Diverged, match=r"the loss of round \d+ is nan; use a smaller --learning-rate"):
        await states(aggregator, Plan("t", runs=1, rounds=40, learning_rate=1e30))


async def test_the_first_run_carries_held_out_accuracy_above_95_percent(aggregator: str) -> None:
    """In the demo's 8 rounds a second, two workers and bf16 this is 20 s."""
    await states(aggregator, *team(2, rounds=161, compress="bf16"))
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
    module = digit_module(1)
    good = champion.offer(module, "t.1", 0)
    assert good is not None
    champion.published(good)
    champion._score = 1.0
    assert champion.offer(module, "t.2", 0) is None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + catalog.weights.keep * 0.6)
    assert champion.offer(module, "t.2", 0) is good


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

"""Publishers whose rate is set by event, and training runs that are started by one."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from pipeline import Pipeline, catalog
from pipeline.catalog import PublisherRate, RunStatus, SetRate, StartRun
from publishers.command import paced
from publishers.training import launcher

from .apps import idle, serving, until
from .processes import ended
from .programs import app_program, collect, events, program

# -- rates ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def heard(app: Pipeline) -> AsyncIterator[list[PublisherRate]]:
    """What publishers announce meanwhile."""
    rates: list[PublisherRate] = []

    async def listen() -> None:
        async with app.watch(catalog.publisher_rates, since=60) as stream:
            async for message in stream:
                rates.append(message.event)  # noqa: PERF401  # it never ends

    task = asyncio.create_task(listen())
    yield rates
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_pace_is_announced_and_changes_by_event(url: str) -> None:
    """4/s → as fast as it goes → held → 50/s."""
    sent = 0
    async with Pipeline("data", url) as app, heard(app) as rates:

        async def publish() -> None:
            nonlocal sent
            async for due in paced(4, app=app):
                sent += due
                await asyncio.sleep(0)

        publishing = asyncio.create_task(publish())
        await until(lambda: rates)
        assert rates == [PublisherRate(publisher="data", worker=app.consumer, rate=4, initial=4)]
        await app.publish(catalog.rate_settings, SetRate(publisher="jobs", rate=1))
        await app.publish(catalog.rate_settings, SetRate(publisher="data", rate=None))
        await until(lambda: sent > 1000)
        await app.publish(catalog.rate_settings, SetRate(publisher="data", rate=0))
        await until(lambda: len(rates) == 3)
        before = sent
        await asyncio.sleep(0.3)
        assert sent == before, "it is held"
        began = time.monotonic()
        await app.publish(catalog.rate_settings, SetRate(publisher="data", rate=50))
        await until(lambda: sent >= before + 25)
        assert time.monotonic() - began > 0.35
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    assert [rate.rate for rate in rates] == [4, None, 0, 50]


async def test_a_count_is_kept_across_rates(valkey_url: str) -> None:
    async with Pipeline("data", valkey_url) as app, heard(app) as rates:

        async def publish() -> int:
            return sum([due async for due in paced(1, 40, app)])

        publishing = asyncio.create_task(publish())
        await until(lambda: rates)
        await app.publish(catalog.rate_settings, SetRate(publisher="data", rate=400))
        async with asyncio.timeout(10):
            assert await publishing == 40


@pytest.mark.parametrize("rate", [-1, 1e9, "fast"])
def test_an_impossible_rate_is_no_event(rate: object) -> None:
    with pytest.raises(ValidationError):
        SetRate.model_validate({"publisher": "data", "rate": rate})


async def test_every_program_that_publishes_at_a_rate_takes_another(valkey_url: str) -> None:
    """Real processes: held from the outside, each publishes nothing more, and goes on."""
    programs = {
        "data": (("-m", "publishers.data", "--rate", "20"), catalog.digits.name),
        "jobs": (("-m", "publishers.jobs", "--rate", "20", "--sizes", "4"), catalog.matmul_jobs.name),
        "images": (("-m", "publishers.images", "--rate", "20"), catalog.requests_of("imagenet").name),
    }
    async with Pipeline("t", valkey_url) as app, heard(app) as rates:
        for name, (command, channel) in programs.items():
            with program(*command, url=valkey_url):
                await published(app, channel, 1)
                await app.publish(catalog.rate_settings, SetRate(publisher=name, rate=0))
                await until(lambda: any((one.publisher, one.rate) == (name, 0) for one in rates), 20)  # noqa: B023
                await asyncio.sleep(0.1)
                before = await count(app, channel)
                await asyncio.sleep(0.4)
                assert await count(app, channel) == before
                await app.publish(catalog.rate_settings, SetRate(publisher=name, rate=100))
                await published(app, channel, before + 5)
    assert {one.publisher: one.initial for one in rates} == {"data": 20, "jobs": 20, "images": 20}


async def count(app: Pipeline, channel: str) -> int:
    ledger = (await app.stats()).channels.get(channel)
    return ledger.published if ledger else 0


async def published(app: Pipeline, channel: str, events: int) -> None:
    async with asyncio.timeout(40):
        while await count(app, channel) < events:
            await asyncio.sleep(0.05)


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"run": "--rank=0"}, {"run": "a b"}, {"workers": 0}, {"mode": "magic"}, {"learning_rate": 0}, {"rounds": -1},
     {"rate": 0}, {"seed": 1.5}, {"command": "rm"}, {"compress": "zip"}, {"mode": "hogwild", "compress": "bf16"}],
)  # fmt: skip
def test_an_impossible_run_is_no_event(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StartRun.model_validate({"run": "r", **wrong})


def test_a_run_is_the_trainers_command_line() -> None:
    plan = StartRun(
        run="r", mode="local", compress="topk:0.1", workers=3, rounds=7, learning_rate=0.5, batch=8, rate=None, seed=2
    )  # fmt: skip
    assert launcher.command(plan)[1:] == [
        "-m", "publishers.training", "--run=r", "--runs=1", "--workers=3", "--rounds=7", "--batch=8",
        "--learning-rate=0.5", "--rate=0", "--seed=2", "--mode=local", "--compress=topk:0.1",
    ]  # fmt: skip


async def test_a_trainer_that_goes_on_for_ever_starts_the_run_that_is_asked_for(valkey_url: str) -> None:
    """All of it: the demonstration's trainer, the aggregator, a StartRun; its metrics come, and its rate can be set."""
    command = ("-m", "publishers.training", "--workers=1", "--run=demo", "--rounds=100000", "--rate=5")
    async with Pipeline("t", valkey_url) as app, heard(app) as rates:
        with (
            program(*app_program("subscribers.aggregation"), url=valkey_url),
            program(*command, url=valkey_url) as trainer,
        ):
            await collect(app, catalog.training_metrics, 2, 60)
            receipt = await app.publish(
                catalog.run_starts, StartRun(run="mine", compress="int8", workers=2, rounds=12, rate=None)
            )
            started, finished = events(await collect(app, catalog.run_statuses, 2, 60))
            assert (started.run, started.state, finished.state) == ("mine", "started", "finished")
            assert started.request == finished.request == receipt.id
            logged = [one for one in await metrics(app) if one.run == "mine.1"]
            assert sorted(one.step for one in logged) == list(range(12))
            assert all(one.values["bytes_saved"] > 0 for one in logged)
            await app.publish(catalog.rate_settings, SetRate(publisher="training", rate=0))
            await until(lambda: rates[-1].rate == 0, 20)
            await asyncio.sleep(0.5)
            before = len(await metrics(app))
            await asyncio.sleep(0.6)
            assert len(await metrics(app)) == before, "the trainer's own run is held"
            await app.publish(catalog.rate_settings, SetRate(publisher="training", rate=None))
            async with asyncio.timeout(20):
                while len(await metrics(app)) <= before + 3:
                    await asyncio.sleep(0.1)
            trainer.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(trainer.wait, 15) == 0
        await idle(app, catalog.run_starts)


async def metrics(app: Pipeline) -> list[catalog.TrainingMetrics]:
    """What is on the channel now."""
    number = await count(app, catalog.training_metrics.name)
    return events(await collect(app, catalog.training_metrics, number))


# Programs that stand in for a trainer, so that these tests need not import torch: real processes all the same.
WAITS = "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)"
FAILS = "import sys; print('first'); sys.exit('use a smaller --learning-rate')"


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str, *arguments: str) -> None:
    monkeypatch.setattr(launcher, "command", lambda plan: [sys.executable, "-c", code, *arguments])


async def test_a_run_that_fails_says_why_and_becomes_a_dead_letter(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, FAILS)
    app = launcher.make(valkey_url)
    async with app, serving(app):
        await app.publish(catalog.run_starts, StartRun(run="r"))
        _, failed = events(await collect(app, catalog.run_statuses, 2))
        assert (failed.state, failed.reason) == ("failed", "use a smaller --learning-rate")
        ledger = await idle(app, catalog.run_starts)
        [letter] = await app.dead_letters(catalog.run_starts.name)
    assert ledger.groups["launcher"].dead == 1
    assert letter.event.reason == "run 'r': use a smaller --learning-rate"


async def test_a_launcher_that_stops_ends_its_run_and_the_next_one_takes_it_up(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, WAITS, str(tmp_path / "done"))
    async with Pipeline("t", valkey_url) as app:
        receipt = await app.publish(catalog.run_starts, StartRun(run="r"))
        with launcher.listening(url=valkey_url):
            await collect(app, catalog.run_statuses, 1)
            [child] = [one for one in psutil.Process().children() if WAITS in one.cmdline()]
        assert ended(child)
        with launcher.listening(url=valkey_url):
            await collect(app, catalog.run_statuses, 3)
            (tmp_path / "done").touch()
            statuses: list[RunStatus] = events(await collect(app, catalog.run_statuses, 4))
        assert [one.state for one in statuses] == ["started", "stopped", "started", "finished"]
        assert {one.request for one in statuses} == {receipt.id}
        ledger = await idle(app, catalog.run_starts)
        assert ledger.groups["launcher"].handled == 1


async def test_a_killed_launcher_takes_its_run_along_and_another_takes_it_up(valkey_url: str, tmp_path: Path) -> None:
    code = (
        "import sys; from publishers.training import launcher\n"
        f"launcher.command = lambda plan: [sys.executable, '-c', {WAITS!r}, {str(tmp_path / 'done')!r}]\n"
        "launcher.LEASE = 1.0; launcher.make().run()"
    )
    async with Pipeline("t", valkey_url) as app:
        await app.publish(catalog.run_starts, StartRun(run="r"))
        with program("-c", code, url=valkey_url) as doomed:
            await collect(app, catalog.run_statuses, 1)
            runs = [one for one in psutil.Process(doomed.pid).children() if WAITS in one.cmdline()]
            assert runs
            doomed.kill()
            assert ended(*runs, within=10)
        with program("-c", code, url=valkey_url):
            await collect(app, catalog.run_statuses, 2)
            (tmp_path / "done").touch()
            statuses = events(await collect(app, catalog.run_statuses, 3))
    assert [one.state for one in statuses] == ["started", "started", "finished"]


async def test_a_launcher_that_finds_no_redis_can_be_stopped() -> None:
    began = time.monotonic()
    with launcher.listening(url="redis://127.0.0.1:1/0"):
        await asyncio.sleep(0.2)
    assert time.monotonic() - began < 3

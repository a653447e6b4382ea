"""Training runs of real processes: whatever is killed, paused, late or wrong, those that live agree on every round."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import Pipeline, Tensor, catalog
from pipeline.catalog import Round, RunPlan, State
from pipeline.errors import ConfigurationError, PublishUncertain
from pipeline.server import Server
from pipeline.settings import settings
from publishers.training import join, replay
from publishers.training.exchange import Exchange, JoinTimeout, NothingReduced, Refused
from publishers.training.parameters import parameters_of

from . import trainer
from .processes import line_with
from .programs import app_program, program

LEASE = 1.0


class Worker:
    """What a worker of `tests.trainer` said."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def trouble(self) -> str:
        """Why it has ended before its time; empty while it goes on."""
        raise NotImplementedError

    def until(self, closed: int, seconds: float = 30.0) -> None:
        """Wait until it has seen a round closed."""
        self.sees(lambda line: line["closed"] >= closed, seconds)

    def sees(self, what: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> None:
        """Wait until it has seen a round like that."""
        deadline = time.monotonic() + seconds
        while not any("closed" in line and what(line) for line in list(self.said)):
            assert time.monotonic() < deadline, f"no such round: {self.said[-30:]}"
            assert not self.trouble(), self.trouble()
            time.sleep(0.01)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in self.said if "closed" in line]


class Process(Worker):
    """One that can be killed and paused."""

    def __init__(self, url: str, run: str, **options: Any) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        command = ("-m", "tests.trainer", run, json.dumps({"lease": LEASE, **options}))
        self.process = self._stack.enter_context(program(*command, url=url))
        self.output: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.output.append(line)
                if line.startswith("{"):
                    self.said.append(json.loads(line))

    def trouble(self) -> str:
        return "".join(self.output) if self.process.poll() is not None else ""

    def final(self, seconds: float = 40.0) -> str:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{''.join(self.output[-30:])}", pytrace=False)
        self._thread.join(5)
        assert self.process.returncode == 0, "".join(self.output)
        state: str = self.said[-1]["final"]
        return state

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self._stack.close()


class Thread(Worker):
    """One that starts sooner."""

    def __init__(self, url: str, run: str, **options: Any) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._ending = False
        work = {"lease": LEASE, "url": url, **options}
        self._thread = threading.Thread(target=self._work, args=(run, work), name=f"worker of {run}", daemon=True)
        self._thread.start()

    def _work(self, run: str, options: dict[str, object]) -> None:
        try:
            trainer.main(run, options, self._say)
        except BaseException as error:
            self.error = error

    def _say(self, line: dict[str, Any]) -> None:
        self.said.append(line)
        if self._ending:
            raise KeyboardInterrupt

    def trouble(self) -> str:
        return "" if self._thread.is_alive() else repr(self.error or "it has ended")

    def final(self, seconds: float = 40.0) -> str:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"it does not end: {self.said[-30:]}"
        if self.error is not None:
            raise self.error
        state: str = self.said[-1]["final"]
        return state

    def close(self) -> None:
        self._ending = True
        self._thread.join(2)


@pytest.fixture
def aggregator(valkey_url: str, tmp_path: Path) -> Iterator[str]:
    with aggregating(valkey_url, tmp_path):
        yield valkey_url


@contextlib.contextmanager
def aggregating(url: str, data: Path) -> Iterator[subprocess.Popen[str]]:
    with program(*app_program("subscribers.aggregation"), url=url, PIPELINE_DATA_DIR=str(data)) as process:
        line_with("ready", process)
        yield process


@pytest.fixture
def team() -> Iterator[Any]:
    """`team(url, run, 3, …)` starts workers, which end with the test."""
    with _starting(Thread) as start:
        yield start


@pytest.fixture
def processes() -> Iterator[Any]:
    """The same for workers that the test kills or pauses."""
    with _starting(Process) as start:
        yield start


@contextlib.contextmanager
def _starting(kind: type[Thread] | type[Process]) -> Iterator[Callable[..., list[Any]]]:
    with contextlib.ExitStack() as stack:

        def start(url: str, run: str, count: int, **options: Any) -> list[Any]:
            workers = [kind(url, run, **options) for _ in range(count)]
            for worker in workers:
                stack.callback(worker.close)
            return workers

        yield start


def check(*workers: Worker) -> None:
    """Every round's mean is that of the ranks in it, and all workers saw the same rounds."""
    seen: dict[int, tuple[list[int], float]] = {}
    for worker in workers:
        for line in worker.rounds:
            ranks, mean = line["ranks"], line["mean"]
            if not ranks:
                continue
            assert mean == pytest.approx(sum(rank + 1 for rank in ranks) / len(ranks), abs=1e-6)
            assert seen.setdefault(line["closed"], (ranks, mean)) == (ranks, mean)


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


planes = pytest.mark.parametrize("plane", ["shm", "redis", "torch"])


@planes
def test_after_a_sigkill_the_others_go_on_with_the_mean_of_those_that_live(
    plane: str, aggregator: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    """The first round without the dead is there within the lease and 0.2 s, or later by what this machine was late,
    twice, as two processes act one after the other. Plane torch connects its own anew: it has half a second more."""
    until = tmp_path / "until"
    options: dict[str, Any] = {"plane": plane, "workers": 3, "until": str(until)}
    [victim], survivors = processes(aggregator, "r", 1, **options), team(aggregator, "r", 2, **options)
    for worker in (victim, *survivors):
        worker.until(8)
    with lateness() as late:
        killed = time.time()
        victim.send(signal.SIGKILL)
        for worker in survivors:
            worker.sees(lambda line: len(line["ranks"]) == 2)
    without = [line["time"] for line in survivors[0].rounds if len(line["ranks"]) == 2]
    assert without[0] - killed < LEASE + 0.2 + 2 * sum(late) + (0.5 if plane == "torch" else 0.0)
    until.touch()
    assert len({worker.final() for worker in survivors}) == 1
    check(*survivors)
    assert len(survivors[0].rounds[-1]["members"]) == 2
    closed = [line["closed"] for line in survivors[0].rounds]
    assert closed == sorted({*closed})
    assert closed[-1] - len(closed) == (0 if plane == "torch" else -1), "the number of the sum that failed is used up"


@contextlib.contextmanager
def lateness() -> Iterator[list[float]]:
    """By how much sleeps of 10 ms last longer meanwhile, each above 5 ms: what this machine is late."""
    found: list[float] = []
    done = threading.Event()

    def sleep() -> None:
        while not done.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            if (late := time.monotonic() - began - 0.01) > 0.005:
                found.append(late)

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@planes
def test_a_worker_that_raises_is_not_waited_for(plane: str, aggregator: str, team: Any) -> None:
    [good] = team(aggregator, "r", 1, plane=plane, workers=2, steps=40, lease=20.0)
    [bad] = team(aggregator, "r", 1, plane=plane, workers=2, steps=40, lease=20.0, raises_at=10)
    good.final()
    with pytest.raises(RuntimeError, match="as it happens"):
        bad.final()
    check(good, bad)
    assert len(good.rounds[-1]["members"]) == 1


@planes
def test_a_paused_worker_is_given_up_and_is_one_of_them_again_when_it_wakes(
    plane: str, aggregator: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    adam = plane == "torch"  # where torch is loaded anyway; what a State does to an optimizer is the same on all planes
    options: dict[str, Any] = {"plane": plane, "workers": 3, "until": str(until), "adam": adam}
    [sleeper] = processes(aggregator, "r", 1, rank=0, **options)
    awake = [worker for rank in (1, 2) for worker in team(aggregator, "r", 1, rank=rank, **options)]
    for worker in (sleeper, *awake):
        worker.until(5)
    sleeper.send(signal.SIGSTOP)
    reached = awake[0].rounds[-1]["closed"]
    awake[0].sees(lambda line: line["closed"] > reached + 20 and len(line["ranks"]) == 2)
    sleeper.send(signal.SIGCONT)
    reached = awake[0].rounds[-1]["closed"]
    awake[0].sees(lambda line: line["closed"] > reached and len(line["ranks"]) == 3)
    until.touch()
    assert len({worker.final() for worker in (sleeper, *awake)}) == 1
    check(sleeper, *awake)


@planes
def test_a_paused_worker_whose_rank_was_given_away_takes_part_under_another(
    plane: str, aggregator: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    options: dict[str, Any] = {"plane": plane, "workers": 2, "until": str(until)}
    [sleeper], [awake] = processes(aggregator, "r", 1, rank=0, **options), team(aggregator, "r", 1, rank=1, **options)
    sleeper.until(5)
    sleeper.send(signal.SIGSTOP)
    awake.sees(lambda line: line["ranks"] == [1])
    [other] = team(aggregator, "r", 1, rank=0, **options)
    other.sees(lambda line: line["rank"] == 0 and line["ranks"] == [0, 1])
    sleeper.send(signal.SIGCONT)
    sleeper.sees(lambda line: line["rank"] == 2 and line["ranks"] == [0, 1, 2])
    until.touch()
    assert len({worker.final() for worker in (sleeper, awake, other)}) == 1
    assert awake.rounds[-1]["ranks"] == [0, 1, 2]


@planes
def test_who_slept_while_all_others_died_and_new_ones_began_joins_them(
    plane: str, aggregator: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    """It is rounds ahead of them, in a life of the run that is over."""
    until = tmp_path / "until"
    options: dict[str, Any] = {"plane": plane, "workers": 1, "until": str(until)}
    [sleeper] = processes(aggregator, "r", 1, **options)
    sleeper.until(100)
    sleeper.send(signal.SIGSTOP)
    time.sleep(LEASE + 0.2)
    [new] = team(aggregator, "r", 1, **options, pause=0.05)
    new.until(2)
    sleeper.send(signal.SIGCONT)
    new.sees(lambda line: len(line["ranks"]) == 2)
    until.touch()
    assert sleeper.final() == new.final()
    assert new.rounds[0]["closed"] == 0


@planes
def test_who_joins_midway_begins_with_what_the_others_have(
    plane: str, aggregator: str, team: Any, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    first = team(aggregator, "r", 2, plane=plane, workers=2, until=str(until))
    for worker in first:
        worker.until(10)
    late = team(aggregator, "r", 1, plane=plane, workers=2, until=str(until))
    late[0].sees(lambda line: line["ranks"] == [0, 1, 2])
    until.touch()
    assert len({worker.final() for worker in [*first, *late]}) == 1
    check(*first, *late)
    assert late[0].rounds[0]["closed"] >= 10
    assert late[0].rounds[-1]["ranks"] == [0, 1, 2]


def test_who_joins_a_hogwild_run_midway_shares_its_parameters(aggregator: str, team: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": "hogwild", "workers": 1}
    [first] = team(aggregator, "r", 1, steps=300, **options)
    wait_for(lambda: len(first.said) > 50)
    [late] = team(aggregator, "r", 1, steps=300, **options)
    first.final()
    late.final()
    assert late.said[0]["round"] > 50
    assert late.said[-1]["value"] == pytest.approx(first.said[-1]["value"], abs=0.1)
    assert late.said[-1]["value"] < -0.3


@pytest.mark.parametrize("plane", ["shm", "redis"])
def test_a_worker_in_a_long_step_finds_the_others_though_several_have_joined_meanwhile(
    plane: str, aggregator: str, team: Any, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    options: dict[str, Any] = {"plane": plane, "workers": 2, "until": str(until), "lease": 5.0}
    [quick] = team(aggregator, "r", 1, **options, rank=0)
    [slow] = team(aggregator, "r", 1, **options, rank=1, slow_at=5, slow_for=2.0)
    slow.until(4)
    first = team(aggregator, "r", 1, **options)
    time.sleep(0.3)
    second = team(aggregator, "r", 1, **options)
    slow.sees(lambda line: line["ranks"] == [0, 1, 2, 3])
    until.touch()
    assert len({worker.final() for worker in [quick, slow, *first, *second]}) == 1
    check(quick, slow, *first, *second)
    assert [line["closed"] for line in slow.rounds] == list(range(len(slow.rounds))), "it missed none"


@planes
def test_a_killed_aggregator_loses_no_round(plane: str, valkey_url: str, team: Any, tmp_path: Path) -> None:
    with aggregating(valkey_url, tmp_path) as first:
        workers = team(valkey_url, "r", 2, plane=plane, workers=2, steps=80)
        for worker in workers:
            worker.until(10)
        first.kill()
    time.sleep(0.3)
    with aggregating(valkey_url, tmp_path):
        assert len({worker.final() for worker in workers}) == 1
    check(*workers)
    assert [line["closed"] for line in workers[0].rounds] == list(range(80))
    assert {tuple(line["ranks"]) for line in workers[0].rounds} == {(0, 1)}


@planes
def test_all_die_and_come_back_where_the_checkpoint_was(
    plane: str, valkey_url: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 2, "checkpoint": 10, "plane": plane}
    with aggregating(valkey_url, tmp_path) as first:
        workers = processes(valkey_url, "r", 2, steps=500, **options)
        for worker in workers:
            worker.until(25)
        for worker in workers:
            worker.send(signal.SIGKILL)
        first.kill()
    with aggregating(valkey_url, tmp_path):
        again = team(valkey_url, "r", 2, steps=60, **options)
        assert len({worker.final() for worker in again}) == 1
    begun = again[0].rounds[0]["closed"]
    assert begun >= 20
    assert begun % 10 == 0
    assert [line["closed"] for line in again[0].rounds] == list(range(begun, 60))
    assert {len(line["ranks"]) for line in again[0].rounds} == {2}
    # A last message of the dead may hold one of their ranks for a lease; what a worker contributes depends on its own.
    since = sum(line["mean"] for line in again[0].rounds)
    assert again[0].said[-1]["value"] == pytest.approx(-0.001 * (1.5 * begun + since), rel=1e-4)


def test_a_round_of_the_dead_that_only_some_hear_is_nobodys(aggregator: str, team: Any) -> None:
    options: dict[str, Any] = {"plane": "redis", "workers": 2, "steps": 20}
    with Pipeline("t", aggregator).blocking() as pipe:
        with pipe.watch(catalog.admissions) as admissions:
            first = team(aggregator, "r", 1, **options)
            assert admissions.next(10) is not None  # now it listens
        stray = Round(run="r", round=7, life=1, ranks=[8], members=[8], parts={"values": Tensor(np.ones(1000, "f4"))})
        pipe.publish(catalog.rounds, stray)
    workers = [*first, *team(aggregator, "r", 1, **options)]
    assert len({worker.final() for worker in workers}) == 1
    assert {tuple(line["ranks"]) for worker in workers for line in worker.rounds} == {(0, 1)}


def test_of_states_of_one_round_the_last_one_is_begun_with() -> None:
    """On planes shm and torch it says where the group meets; the group of the one before may be gone."""
    exchange = Exchange("r", [RunPlan(size=1)], url=None, rank=None, host="")
    for note in ("first", "last"):
        exchange._hear_state(State(run="r", round=20, rank=0, note=note))
    found = exchange.take_state(0.0)
    assert found is not None
    assert found.note == "last"


@planes
def test_below_the_quorum_a_round_waits_for_somebody_to_come(
    plane: str, aggregator: str, team: Any, processes: Any
) -> None:
    options: dict[str, Any] = {"plane": plane, "workers": 2, "quorum": 2, "steps": 60}
    [victim], [left] = processes(aggregator, "r", 1, **options), team(aggregator, "r", 1, **options)
    for worker in (victim, left):
        worker.until(5)
    victim.send(signal.SIGKILL)
    time.sleep(LEASE + 0.6)
    reached = len(left.rounds)
    time.sleep(0.4)
    assert len(left.rounds) == reached, "one of two is no quorum"
    [new] = team(aggregator, "r", 1, **options)
    assert left.final() == new.final()
    check(left, new)
    assert {len(line["ranks"]) for line in left.rounds if line["ranks"]} == {2}


@planes
def test_the_same_run_ends_in_the_same_state(plane: str, aggregator: str, team: Any) -> None:
    states = set()
    for number in range(2):
        workers = team(aggregator, f"r{number}", 2, plane=plane, workers=2, steps=20, pause=0.0)
        states |= {worker.final() for worker in workers}
    assert len(states) == 1


@planes
def test_a_gradient_that_is_not_finite_counts_for_nothing_and_is_reported(
    plane: str, aggregator: str, team: Any
) -> None:
    [good] = team(aggregator, "r", 1, plane=plane, workers=2, steps=20)
    [bad] = team(aggregator, "r", 1, plane=plane, workers=2, steps=20, poisons_at=7)
    assert good.final() == bad.final()
    check(good, bad)
    [poisoned] = [line for line in good.rounds if line["refused"]]
    assert poisoned["refused"] == [bad.said[0]["rank"]]
    assert poisoned["ranks"] == [good.said[0]["rank"]]


def test_after_the_deadline_a_round_goes_on_without_the_slow_one(aggregator: str, team: Any) -> None:
    [quick] = team(aggregator, "r", 1, workers=2, steps=40, deadline=0.2, pause=0.05)
    [slow] = team(aggregator, "r", 1, workers=2, steps=40, deadline=0.2, pause=0.05, slow_at=10)
    assert quick.final() == slow.final()
    check(quick, slow)
    alone = [line["closed"] for line in quick.rounds if len(line["ranks"]) == 1]
    assert alone
    assert len(alone) < 10


def test_a_late_gradient_is_scaled_into_the_next_round_where_that_is_asked_for(aggregator: str, team: Any) -> None:
    options: dict[str, Any] = {"workers": 2, "steps": 30, "deadline": 0.2, "pause": 0.05, "late": "scale"}
    [quick] = team(aggregator, "r", 1, **options)
    [slow] = team(aggregator, "r", 1, slow_at=10, **options)
    assert quick.final() == slow.final()
    assert [line["late"] for line in quick.rounds if line["late"]] == [1]


def replayed(folder: Path) -> tuple[int, str]:
    """Rounds, and the state they end in."""
    model = {"w": np.ones(1000, np.float32)}

    def descend(parameters: dict[str, Any], gradients: dict[str, Any]) -> None:
        parameters["w"] -= 0.001 * gradients["w"]

    rounds = replay(folder, model, descend)
    return rounds, hashlib.sha256(model["w"].tobytes()).hexdigest()


def test_a_recorded_run_replays_bit_for_bit_though_its_aggregator_was_killed(
    valkey_url: str, team: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "record"
    with aggregating(valkey_url, tmp_path) as first:
        workers = team(valkey_url, "r", 2, workers=2, steps=40, record=str(folder))
        for worker in workers:
            worker.until(10)
        first.kill()
    with aggregating(valkey_url, tmp_path):
        [state] = {worker.final() for worker in workers}
    assert replayed(folder) == (40, state)


def test_a_recorded_run_replays_though_its_lowest_rank_was_killed_in_a_round_that_it_counts_in(
    aggregator: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 2, "steps": 20, "clip": 0.5, "record": str(tmp_path / "record")}
    [lowest] = processes(aggregator, "r", 1, rank=0, **options)
    [slow] = team(aggregator, "r", 1, rank=1, slow_at=10, **options)
    slow.until(9)
    time.sleep(0.2)
    lowest.send(signal.SIGKILL)
    state = slow.final()
    assert [line["ranks"] for line in slow.rounds if line["closed"] == 10] == [[0, 1]]
    assert replayed(tmp_path / "record") == (20, state)
    (tmp_path / "record" / "round-000007.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"round-000007\.safetensors is not there, though later rounds are"):
        replayed(tmp_path / "record")


def test_a_record_is_of_one_run_which_may_go_on_from_a_checkpoint(
    valkey_url: str, team: Any, processes: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 2, "record": str(tmp_path / "record")}
    with aggregating(valkey_url, tmp_path) as first:
        workers = processes(valkey_url, "r", 2, steps=500, checkpoint=20, **options)
        for worker in workers:
            worker.until(25)
        for worker in workers:
            worker.send(signal.SIGKILL)
        first.kill()
    recorded = replayed(tmp_path / "record")[0]
    with aggregating(valkey_url, tmp_path):
        for steps in (recorded - 1, recorded + 10):
            again = team(valkey_url, "r", 2, steps=steps, checkpoint=20, **options)
            [state] = {worker.final() for worker in again}
            assert replayed(tmp_path / "record") == (steps, state)
        [other] = team(valkey_url, "other", 1, steps=5, **{**options, "workers": 1})
        with pytest.raises(ConfigurationError, match="holds the record of another run; give record= an empty folder"):
            other.final()


@pytest.mark.parametrize("mode", ["async", "dogwild"])
def test_a_server_applies_what_comes(mode: str, aggregator: str, team: Any) -> None:
    workers = team(aggregator, "r", 2, mode=mode, workers=2, steps=60, server_optimizer="sgd", rate=0.001, pause=0.005)
    for worker in workers:
        worker.final()
    values = [worker.said[-1]["value"] for worker in workers]
    expected = -0.001 * 60 * 3
    if mode == "async":
        assert min(values) == pytest.approx(expected, rel=1e-3)
    else:
        assert expected * 1.01 <= min(values) < expected * 0.5


def test_a_server_gets_the_last_steps_too_though_they_are_fewer_than_a_push(aggregator: str, team: Any) -> None:
    [worker] = team(aggregator, "r", 1, mode="async", steps=10, push_every=4, server_optimizer="sgd", rate=0.001)
    worker.final()
    assert worker.said[-1]["value"] == pytest.approx(-0.001 * 3)


def test_a_server_that_is_killed_goes_on_from_its_checkpoint(valkey_url: str, team: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mode": "async", "workers": 2, "steps": 120, "server_optimizer": "sgd", "rate": 0.001}
    with aggregating(valkey_url, tmp_path) as first:
        workers = team(valkey_url, "r", 2, checkpoint=1, **options)
        for worker in workers:
            worker.until(20)
        first.kill()
    with aggregating(valkey_url, tmp_path):
        for worker in workers:
            worker.final()
    assert min(worker.said[-1]["value"] for worker in workers) == pytest.approx(-0.001 * 120 * 3, rel=0.02)


def test_several_aggregators_share_a_big_model(valkey_url: str, team: Any, tmp_path: Path) -> None:
    with aggregating(valkey_url, tmp_path), aggregating(valkey_url, tmp_path):
        time.sleep(1.0)
        workers = team(valkey_url, "r", 2, workers=2, steps=20, shards=4, size=100_003, compress="bf16")
        assert len({worker.final() for worker in workers}) == 1
        check(*workers)


@pytest.mark.parametrize("mode", ["async", "dogwild"])
def test_several_servers_share_the_weights(mode: str, aggregator: str, team: Any) -> None:
    """An odd number of them, of which the slices are not of one size."""
    options: dict[str, Any] = {"mode": mode, "size": 1001, "shards": 3, "server_optimizer": "sgd", "rate": 0.001}
    workers = team(aggregator, "r", 2, workers=2, steps=20, **options)
    for worker in workers:
        worker.final()
    lasts = [(worker.said[-1]["value"], worker.said[-1]["last"]) for worker in workers]
    if mode == "async":
        assert min(lasts) == pytest.approx((-0.001 * 20 * 3, -0.001 * 20 * 3), rel=1e-3)
    else:
        assert -0.0601 <= min(lasts)[0] < -0.03


@planes
def test_metrics_are_means_over_the_workers(plane: str, aggregator: str, team: Any) -> None:
    workers = team(aggregator, "r", 2, plane=plane, workers=2, steps=3, values=31)
    for worker in workers:
        worker.final()
        assert worker.rounds[-1]["values"] == {f"value{index}": index + 0.5 for index in range(31)}


@planes
def test_a_value_is_averaged_over_those_who_gave_it(plane: str, aggregator: str, team: Any) -> None:
    workers = team(aggregator, "r", 2, plane=plane, workers=2, steps=4, values=1, alone=True)
    for worker in workers:
        worker.final()
        assert [line["values"] for line in worker.rounds] == 2 * [{"value0": 0.5}, {"alone": 7.0, "value0": 0.5}]


def test_a_local_round_averages_a_value_over_the_steps_that_gave_it(aggregator: str) -> None:
    model = {"w": np.zeros(3, np.float32)}
    with join("r", model, mode="local", steps=4, metrics=False, url=aggregator) as run:
        for number in range(4):
            run.step(loss=float(number), samples=number + 1, **({"accuracy": 0.5} if number == 2 else {}))
        assert run.last is not None
        assert run.last.values == {"loss": 2.0, "accuracy": 0.5}


def test_more_metrics_than_shared_memory_holds_are_refused(aggregator: str, team: Any) -> None:
    [worker] = team(aggregator, "r", 1, plane="shm", steps=3, values=32)
    with pytest.raises(ConfigurationError, match=r'plane="shm" averages at most 32 values a step, .*, not 33'):
        worker.final()
    with (
        join("s", {"w": np.zeros(3, np.float32)}, plane="shm", metrics=False, url=aggregator) as run,
        pytest.raises(ConfigurationError, match=r"names of 4,096 bytes, not 1 with 5,004: pass fewer"),
    ):
        run.step(gradients={"w": np.zeros(3)}, **{5000 * "x": 1.0})


def test_no_shard_uses_its_slice_of_a_gradient_that_is_not_finite_elsewhere(aggregator: str, team: Any) -> None:
    options: dict[str, Any] = {"workers": 2, "steps": 20, "shards": 2}
    [good] = team(aggregator, "r", 1, **options)
    [bad] = team(aggregator, "r", 1, poisons_at=7, **options)
    assert good.final() == bad.final()
    [poisoned] = [line for line in good.rounds if line["refused"]]
    assert (poisoned["ranks"], poisoned["refused"]) == ([good.said[0]["rank"]], [bad.said[0]["rank"]])
    others = sum(line["mean"] for line in good.rounds if line["ranks"])
    assert good.said[-1]["last"] == good.said[-1]["value"] == pytest.approx(-0.001 * others, rel=1e-5)


def test_nothing_is_left_in_shared_memory(
    aggregator: str, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_SHM_DIR", str(tmp_path))
    for mode in ("sync", "hogwild"):
        workers = processes(aggregator, f"r-{mode}", 2, mode=mode, workers=2, steps=20)
        for worker in workers:
            worker.final()
    left = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in left if "group" in name or "hogwild" in name]


def test_what_does_not_fit_a_run_is_refused_with_the_reason(aggregator: str, team: Any) -> None:
    [first] = team(aggregator, "r", 1, steps=100_000, size=10)
    first.until(3)
    [other] = team(aggregator, "r", 1, steps=100, size=11)
    with pytest.raises(Refused, match="run 'r' has size 10"):
        other.final()
    [third] = team(aggregator, "r", 1, steps=100, size=10, mode="local")
    with pytest.raises(Refused, match="has mode 'sync'"):
        third.final()


def test_who_gets_nothing_to_begin_with_gives_up_in_time(
    aggregator: str, team: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = team(aggregator, "r", 1, steps=100_000, plane="redis")
    first.until(1)
    monkeypatch.setattr(Exchange, "take_state", lambda *_, **__: None)
    monkeypatch.setattr(Exchange, "checkpoint", lambda *_, **__: None)
    for name, mode in (("r", "sync"), ("served", "async")):
        worker = join(name, {"w": np.zeros(1000, np.float32)}, mode=mode, timeout=0.3, metrics=False, url=aggregator)  # type: ignore[arg-type]
        with pytest.raises(JoinTimeout, match=f"run {name} has not begun within 0.3 s"), worker:
            pass


@planes
def test_an_all_reduce_of_nothing_finite_says_so_and_the_next_one_is_whole(plane: Any, aggregator: str) -> None:
    ones = np.ones(3, np.float32)
    with join("r", {"w": np.zeros(3, np.float32)}, plane=plane, metrics=False, url=aggregator) as run:
        with pytest.raises(NothingReduced, match="run r, round 0: nobody's vector was finite"):
            run.all_reduce(ones * np.inf)
        assert run.all_reduce(ones).tolist() == [1, 1, 1]
        assert run.all_reduce(np.arange(3)).tolist() == [0, 1, 2]  # type: ignore[arg-type]
        for wrong, said in [
            (ones[:1], r"takes float32 \[3\], not float32 \[1\]"),
            (ones.reshape(1, 3), r"not float32 \[1, 3\]"),
            (ones * 1j, r"not complex64 \[3\]"),
            (np.full(3, 1e300), "beyond its range"),
        ]:
            with pytest.raises(ConfigurationError, match=said):
                run.all_reduce(wrong)  # type: ignore[arg-type]


def test_redis_may_go_and_come_back(team: Any, tmp_path: Path) -> None:
    with Server(tmp_path / "redis", appendonly=True) as server, aggregating(server.url, tmp_path):
        workers = team(server.url, "r", 2, workers=2, steps=60, plane="redis", lease=3.0)
        for worker in workers:
            worker.until(10)
        server.kill()
        time.sleep(0.3)
        server.start()
        assert len({worker.final() for worker in workers}) == 1
        check(*workers)


def test_options_that_do_not_go_together_are_refused() -> None:
    model = np.zeros(4, np.float32)
    for options, said in [
        ({"mode": "fast"}, "mode 'fast' is unknown; use one of sync, local, async, dogwild, hogwild"),
        ({"compress": "zip"}, "compression 'zip' is unknown"),
        ({"mode": "hogwild", "compress": "bf16"}, "mode hogwild sends nothing that bf16 could compress"),
        ({"plane": "shm", "compress": "bf16"}, 'plane="shm" is for modes sync and local'),
        ({"plane": "torch", "compress": "int8"}, 'plane="torch" is for modes sync and local'),
        ({"mode": "async", "record": "x"}, "record= is for modes sync and local"),
        ({"shards": 2, "compress": "powersgd"}, "take shards=1"),
        ({"shards": 2, "clip": 1.0}, "clip takes shards=1"),
        ({"steps": 0}, "at least 1"),
        ({"mode": "hogwild", "checkpoint": 5}, "mode hogwild has no rounds: clip and checkpoint do nothing there"),
        ({"mode": "hogwild", "clip": 1.0}, "mode hogwild has no rounds"),
    ]:
        with pytest.raises(ValueError, match=said):
            join("r", model, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a list cannot be trained"):
        join("r", [1.0])


# -- models --------------------------------------------------------------------------------------------------------


def linear(**options: Any) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.Linear(3, 2, **options)


def test_vectors_are_float32_whatever_torchs_default_is(tmp_path: Path) -> None:
    import torch

    model = linear(dtype=torch.float32)
    (tmp_path / "shared").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    torch.set_default_dtype(torch.float64)
    try:
        parameters = parameters_of(model)
        assert (parameters.read().dtype, parameters.gradient(None).dtype) == (np.float32, np.float32)
        parameters.share(tmp_path / "shared")
        assert parameters.read().tolist() == list(range(8))
    finally:
        torch.set_default_dtype(torch.float32)


def test_hogwild_gives_a_dictionary_its_own_arrays_back_with_what_was_reached(aggregator: str) -> None:
    def descend(parameters: dict[str, Any], gradients: dict[str, Any]) -> None:
        parameters["w"] -= gradients["w"]

    mine = np.zeros(3)
    model = {"w": mine}
    with join("r", model, mode="hogwild", metrics=False, url=aggregator) as run:
        run.step(descend, gradients={"w": np.arange(3)})
        assert model["w"].tolist() == [0, -1, -2]
    assert model["w"] is mine
    assert mine.tolist() == [0, -1, -2]


def test_hogwild_refuses_what_it_cannot_share(aggregator: str) -> None:
    before = {*settings().shm_dir.glob("pipeline-hogwild-*")}
    array, estimator = np.zeros(3, np.float32), fitted("SGDClassifier")
    for model, said in ((array, "pass a dictionary, and read its array anew"), (estimator, "use mode local")):
        with (
            pytest.raises(ConfigurationError, match=said),
            join("r", model, mode="hogwild", metrics=False, url=aggregator),
        ):
            pass
    assert {*settings().shm_dir.glob("pipeline-hogwild-*")} <= before


def fitted(name: str, **options: Any) -> Any:
    """A scikit-learn linear model that has seen `partial_fit` once."""
    from sklearn import linear_model

    model, random = getattr(linear_model, name)(random_state=0, **options), np.random.default_rng(0)
    x = random.standard_normal((50, 3))
    return model.partial_fit(x, (x[:, 0] > 0).astype(int), **({"classes": [0, 1]} if "Classifier" in name else {}))


@pytest.mark.parametrize("name", ["SGDClassifier", "SGDRegressor"])
def test_scikit_learns_models_go_on_from_what_they_are_given(name: str) -> None:
    model = fitted(name, alpha=1e-12, eta0=1e-12, learning_rate="constant")
    parameters = parameters_of(model)
    parameters.write(np.arange(4, dtype=np.float32))
    model.partial_fit(np.eye(3), [0, 1, 1])
    assert parameters.read() == pytest.approx([0, 1, 2, 3], abs=1e-6)


def test_scikit_learns_models_that_would_not_train_together_are_refused() -> None:
    from sklearn.linear_model import SGDClassifier, SGDOneClassSVM
    from sklearn.neural_network import MLPClassifier

    x, y = np.eye(3), [0, 1, 1]
    for model, said in [
        (SGDClassifier(), "call partial_fit of the SGDClassifier once before join"),
        (SGDClassifier(average=True).partial_fit(x, y, classes=[0, 1]), "the SGDClassifier has average=True: .* use"),
        (SGDOneClassSVM().partial_fit(x), "the SGDOneClassSVM has no coef_ and intercept_: .* the linear ones"),
        (MLPClassifier(4).partial_fit(x, y, classes=[0, 1]), "the MLPClassifier has no coef_ and intercept_"),
    ]:
        with pytest.raises(ConfigurationError, match=said):
            parameters_of(model)


def test_who_joins_gets_a_learning_rate_that_is_a_tensor_and_every_other_option() -> None:
    import torch

    def trained(rate: Any, **options: Any) -> tuple[Any, Any]:
        model = linear()
        optimizer = torch.optim.Adam(model.parameters(), rate, **options)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return parameters_of(model), optimizer

    first, given = trained(torch.tensor(0.1), betas=(0.5, 0.9))
    tensors, note = first.state(given)
    for rate in (torch.tensor(0.3), 0.3):
        late, optimizer = trained(rate)
        late.load_optimizer(optimizer, tensors, json.loads(json.dumps(note)))
        [group] = optimizer.param_groups
        assert type(group["lr"]) is type(rate)
        assert (float(group["lr"]), group["betas"]) == (pytest.approx(0.1), (0.5, 0.9))
        optimizer.step()


def test_a_complex_parameter_is_exchanged_with_both_its_parts() -> None:
    import torch

    model = torch.nn.ParameterDict({"a": torch.ones(1), "z": torch.tensor([1 + 2j, 3 - 4j])})
    parameters = parameters_of(model)
    assert (parameters.size, parameters.read().tolist()) == (5, [1, 1, 2, 3, -4])
    parameters.write(np.arange(5, dtype=np.float32))
    assert model["z"].tolist() == [1 + 2j, 3 + 4j]
    (model["z"] * (1 - 1j)).real.sum().backward()
    gradient = parameters.gradient(None)
    assert gradient.tolist() == [0, 1, 1, 1, 1]
    parameters.apply(gradient, torch.optim.SGD(model.parameters(), 1.0))
    assert model["z"].tolist() == [0 + 1j, 2 + 3j]


def test_a_sparse_gradient_is_exchanged_as_a_whole() -> None:
    import torch

    model = torch.nn.Embedding(3, 2, sparse=True)
    parameters = parameters_of(model)
    model(torch.tensor([1, 1])).sum().backward()
    assert parameters.gradient(None).tolist() == [0, 0, 2, 2, 0, 0]


def test_a_models_extra_state_goes_along_where_it_can() -> None:
    import torch

    class Counting(torch.nn.Linear):
        seen: Any = None

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    first, late = Counting(3, 2), Counting(3, 2)
    first.seen = {"batches": 3}
    tensors, note = parameters_of(first).state(None)
    parameters_of(late).load(tensors, json.loads(json.dumps(note)))
    assert (late.seen, late.weight.tolist()) == ({"batches": 3}, first.weight.tolist())
    first.seen = {1: object()}
    with pytest.raises(ConfigurationError, match="the model's _extra_state cannot travel"):
        parameters_of(first).state(None)


@pytest.mark.parametrize("plane", ["shm", "redis"])
def test_samples_are_a_count(plane: Any, aggregator: str) -> None:
    model = {"w": np.zeros(3, np.float32)}
    with join("r", model, plane=plane, metrics=False, url=aggregator) as run:
        for count in (np.int64(5), 5.0, np.array(5)):
            run.step(lambda *_: None, gradients=model, samples=count)  # type: ignore[arg-type]
            assert run.last is not None
            assert (run.last.samples, run.last.ranks) == (5, [0])
        for wrong in (0, -3, 0.5, float("nan"), "many", None, np.ones(2)):
            with pytest.raises(ConfigurationError, match="samples= is a whole number of at least 1, not"):
                run.step(lambda *_: None, gradients=model, samples=wrong)  # type: ignore[arg-type]


def test_plane_torch_sums_where_the_model_is_if_each_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from publishers.training.collective import each_has_its_own, gpu_of

    assert parameters_of(linear(device="meta")).device == "meta"
    assert {parameters_of(linear()).device, parameters_of({"w": np.zeros(3)}).device} == {"cpu"}
    assert (gpu_of("cpu"), gpu_of("meta")) == ("none", "none")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU of {device}"))
    first, second = gpu_of("cuda:0"), gpu_of("cuda:1")
    assert [each_has_its_own(gpus) for gpus in ([first], [first, second])] == [True, True]
    assert [each_has_its_own(gpus) for gpus in ([first, first], [first, "none"], ["none"])] == [False] * 3


# -- signs of life -------------------------------------------------------------------------------------------------


def test_signs_of_life_end_before_the_leave(aggregator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes after it makes a ghost, which the next run of that name waits for."""
    alive: list[bool] = []
    publish = Pipeline.publish

    async def looks(app: Pipeline, channel: Any, event: Any, **more: Any) -> Any:
        if getattr(event, "action", "") == "leave":
            alive.append("signs of life" in {task.get_name() for task in asyncio.all_tasks()})
        return await publish(app, channel, event, **more)

    monkeypatch.setattr(Pipeline, "publish", looks)
    with join("r", {"w": np.zeros(3, np.float32)}, metrics=False, url=aggregator):
        pass
    assert alive == [False]


def test_signs_of_life_go_on_when_redis_may_not_have_one(aggregator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    request = Pipeline.request

    async def fails_once(app: Pipeline, channel: Any, event: Any, **more: Any) -> Any:
        if event.action == "beat" and not failed.is_set():
            failed.set()
            raise PublishUncertain("as it happens")
        return await request(app, channel, event, **more)

    monkeypatch.setattr(Pipeline, "request", fails_once)
    model = {"w": np.zeros(3, np.float32)}
    with join("r", model, mode="hogwild", lease=0.3, metrics=False, url=aggregator) as run:
        assert failed.wait(5)
        assert run.exchange.wait(lambda: run.exchange.awaited, 5)

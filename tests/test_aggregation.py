"""The aggregator: one mean a round, whoever is late, twice, wrong or gone; and what a server does with gradients.

Most of it by the clock of the test, on the runs themselves; at the end through Redis.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import Pipeline, Reject, RequestFailed, ServerUnavailable, Tensor, catalog
from pipeline.catalog import Admission, Contribution, Round, RunPlan
from pipeline.catalog.compression import Encoder, decode
from pipeline.settings import settings
from subscribers import aggregation
from subscribers.aggregation import checkpoints
from subscribers.aggregation.checkpoints import Checkpoint, folder_of, latest, save
from subscribers.aggregation.optimizers import Optimizer
from subscribers.aggregation.runs import Run, Server

from .apps import idle, until
from .programs import collect, events, served

LEASE = 1.0


class Team:
    """A run and its workers, by the clock of the test."""

    def __init__(self, kind: type[Run] = Run, size: int = 3, **plan: Any) -> None:
        self.plan = RunPlan(**{"size": size, "workers": 2, "lease": LEASE, **plan})
        self.now = 100.0
        self.run = kind("r", 0, self.plan, self.now)
        self.closed: list[Round] = []

    def send(self, rank: int, action: Any, **more: Any) -> list[Any]:
        """What comes of a message of the worker of this rank."""
        sent = Contribution(run="r", worker=f"w{rank}", rank=rank, plan=self.plan, action=action, **more)
        answer = self.run.take(sent, self.now)
        if answer.close:
            self.close()
        return answer.outputs

    def join(self, *ranks: int, **more: Any) -> Admission:
        admission: Admission
        for rank in ranks:
            [admission] = self.send(rank, "join", **more)
        return admission

    def push(self, rank: int, vector: Any, round_: int | None = None, **more: Any) -> list[Any]:
        number = self.run.round if round_ is None else round_
        return self.send(rank, "push", round=number, parts={"values": Tensor(np.array(vector, np.float32))}, **more)

    def close(self) -> None:
        closed, summands = self.run.close(self.now)
        done = self.run.mean(closed, summands)
        self.run.closed(done, self.now)
        self.closed.append(done)

    def wait(self, seconds: float, *alive: int) -> None:
        """Time passes, in which these give signs of life."""
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            for rank in alive:
                self.send(rank, "beat", round=self.run.round)
            if self.run.due(self.now):
                self.close()

    def mean(self, index: int = -1) -> list[float]:
        closed = self.closed[index]
        found: list[float] = decode(closed.codec, closed.parts, self.plan.size).tolist()
        return found


def test_a_run_begins_when_enough_workers_are_here() -> None:
    team = Team(workers=3)
    assert not team.join(0, 1).ready
    admission = team.join(2)
    assert (admission.ready, admission.members, admission.source) == (True, [0, 1, 2], 0)


def test_ranks_are_the_lowest_free_ones_or_what_was_asked_for() -> None:
    run = Run("r", 0, RunPlan(size=1, workers=9), 0.0)
    wanted = [("a", -1), ("b", 5), ("c", -1), ("d", 5), ("e", -1)]
    ranks = [
        run.take(Contribution(run="r", worker=name, rank=rank, plan=run.plan, action="join"), 0.0).outputs[0].rank  # type: ignore[union-attr]
        for name, rank in wanted
    ]
    assert ranks == [0, 5, 1, 2, 3]


def test_a_round_is_the_mean_weighted_by_samples() -> None:
    team = Team(size=2)
    team.join(0, 1)
    team.push(0, [1, 2], samples=1, values={"loss": 4.0})
    assert team.closed == []
    team.push(1, [5, 10], samples=3, values={"loss": 8.0})
    [closed] = team.closed
    assert team.mean() == [4, 8]
    assert (closed.round, closed.ranks, closed.members, closed.samples) == (0, [0, 1], [0, 1], 4)
    assert closed.values == {"loss": 7.0}


def test_a_value_is_averaged_over_those_who_gave_it() -> None:
    team = Team(size=1)
    team.join(0, 1)
    team.push(0, [1], samples=1, values={"loss": 4.0, "accuracy": 0.5})
    team.push(1, [1], samples=3, values={"loss": 8.0})
    assert team.closed[0].values == {"accuracy": 0.5, "loss": 7.0}


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    values = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32) * [[1e-8], [1], [1e8]]
    found = set()
    for order in itertools.permutations(range(3)):
        team = Team(size=1000, workers=3)
        team.join(0, 1, 2)
        for rank in order:
            team.push(rank, values[rank], samples=rank + 1)
        found.add(team.closed[0].parts["values"].buffer().tobytes())
    assert len(found) == 1


def test_a_contribution_that_comes_twice_counts_once_and_one_to_a_closed_round_not_at_all() -> None:
    team = Team()
    team.join(0, 1)
    for _ in range(3):
        team.push(0, [2, 2, 2])
    team.push(1, [4, 4, 4])
    team.push(0, [100, 100, 100], round_=0)
    assert [one.ranks for one in team.closed] == [[0, 1]]
    assert team.mean() == [3, 3, 3]
    assert team.run.late == 1
    team.push(0, [1, 1, 1])
    team.push(1, [1, 1, 1])
    assert team.mean() == [1, 1, 1]


def test_a_late_contribution_is_scaled_by_its_age_where_that_is_asked_for() -> None:
    team = Team(late="scale", deadline=0.2)
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.wait(0.3, 0, 1)
    assert [one.ranks for one in team.closed] == [[0]]
    team.push(1, [4, 4, 4], round_=0)
    team.push(0, [1, 1, 1])
    team.push(1, [1, 1, 1])
    assert team.closed[1].late == 1
    assert team.mean() == pytest.approx([(1 + 1 + 0.5 * 4) / 2.5] * 3)


def test_what_comes_twice_is_no_late_contribution() -> None:
    team = Team(late="scale", deadline=0.2)
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.wait(0.3, 0, 1)
    team.push(0, [1, 1, 1], round_=0)
    for _ in range(2):
        team.push(1, [4, 4, 4], round_=0)
    for rank in range(2):
        team.push(rank, [1, 1, 1])
    assert team.closed[1].late == 1
    assert team.mean() == pytest.approx([(1 + 1 + 0.5 * 4) / 2.5] * 3)


def test_a_member_is_waited_for_as_long_as_its_lease_lasts_and_no_longer() -> None:
    team = Team()
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.wait(0.8, 0)
    assert team.closed == []
    team.wait(0.3, 0)
    assert [(one.ranks, one.members) for one in team.closed] == [([0], [0])]


def test_after_the_deadline_a_quorum_is_enough_and_below_it_the_round_waits() -> None:
    team = Team(workers=3, quorum=2, deadline=0.3)
    team.join(0, 1, 2)
    team.push(0, [1, 1, 1])
    team.wait(2.0, 0, 1, 2)
    assert team.closed == []
    team.push(1, [3, 3, 3])
    team.wait(0.1, 0, 1, 2)
    assert [one.ranks for one in team.closed] == [[0, 1]]
    assert team.mean() == [2, 2, 2]
    assert team.closed[0].seconds == pytest.approx(2.05, abs=0.1)


def test_an_adaptive_deadline_is_a_multiple_of_what_rounds_usually_take() -> None:
    team = Team(quorum=1, deadline="adaptive")
    team.join(0, 1)
    for _ in range(100):
        team.push(0, [1, 1, 1])
        team.wait(0.1, 0, 1)
        team.push(1, [1, 1, 1])
    team.push(0, [1, 1, 1])
    team.wait(0.3, 0, 1)
    assert len(team.closed) == 100, "four times the usual 0.1 s is not over"
    team.wait(0.3, 0, 1)
    assert [one.ranks for one in team.closed[100:]] == [[0]]


def test_who_joins_midway_is_not_waited_for_before_it_has_the_runs_state() -> None:
    team = Team()
    team.join(0, 1)
    for rank in range(2):
        team.push(rank, [1, 1, 1])
    admission = team.join(2)
    assert (admission.ready, admission.source) == (True, 0)
    for rank in range(2):
        team.push(rank, [1, 1, 1])
    assert [(one.ranks, one.state_from) for one in team.closed] == [([0, 1], None), ([0, 1], 0)]
    team.send(2, "beat", round=2)
    for rank in range(2):
        team.push(rank, [1, 1, 1])
    assert len(team.closed) == 2
    team.push(2, [7, 7, 7])
    assert team.mean() == [3, 3, 3]
    assert team.closed[2].state_from is None


def test_who_leaves_is_not_waited_for() -> None:
    team = Team(lease=60.0)
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.send(1, "leave")
    assert [(one.ranks, one.members) for one in team.closed] == [([0], [0])]


def test_a_gradient_that_is_not_finite_counts_for_nothing_and_is_reported() -> None:
    team = Team(workers=3)
    team.join(0, 1, 2)
    team.push(0, [1, 1, 1])
    team.push(1, [1, np.nan, np.inf])
    team.push(2, [3, 3, 3])
    [closed] = team.closed
    assert (closed.ranks, closed.refused) == ([0, 2], [1])
    assert team.mean() == [2, 2, 2]


def test_the_mean_is_clipped() -> None:
    team = Team(size=2, clip=1.0)
    team.join(0, 1)
    team.push(0, [6, 0])
    team.push(1, [0, 8])
    assert team.mean() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"parts": {"values": Tensor(np.ones(2, np.float32))}}, "expected values of float32"),
        ({"parts": {"values": Tensor(np.ones(3))}}, "expected values of float32"),
        ({"codec": "int8", "parts": {"values": Tensor(np.ones(3, np.int8))}}, "expected parts scales"),
        ({"codec": "zip", "parts": {"values": Tensor(np.ones(3))}}, "compression 'zip' is unknown"),
    ],
    ids=["shape", "dtype", "scales", "codec"],
)
def test_what_does_not_fit_is_left_out_with_the_reason_and_the_round_goes_on(
    bad: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    team = Team(workers=3)
    team.join(0, 1, 2)
    team.push(0, [1, 1, 1])
    team.send(1, "push", round=0, **bad)
    team.push(2, [3, 3, 3])
    assert team.mean() == [2, 2, 2]
    assert (team.closed[0].ranks, team.closed[0].refused) == ([0, 2], [1])
    assert f"run r, round 0: what rank 1 sent is left out: {said}" in caplog.text


def test_a_round_whose_mean_fails_for_all_is_closed_with_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("as it happens")

    team = Team(size=1)
    team.join(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_merge", fails)
        team.push(0, [1])
        team.push(1, [3])
    [closed] = team.closed
    assert (closed.ranks, closed.refused, closed.parts) == ([], [0, 1], {})
    assert "run r, round 0: what was sent cannot be summed" in caplog.text
    team.push(0, [1])
    team.push(1, [3])
    assert team.mean() == [2]


@pytest.mark.parametrize("plan", [{"mode": "local"}, {"size": 4}, {"plane": "shm"}])
def test_a_worker_of_another_plan_is_refused(plan: dict[str, Any]) -> None:
    team = Team()
    team.join(0)
    team.plan = team.plan.model_copy(update=plan)
    with pytest.raises(
        Reject, match=r"run 'r' has (mode|size|plane) .*; worker w1 came with .*Give the run another name"
    ):
        team.join(1)


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "topk:0.5", "powersgd:1"])
def test_compressed_contributions_are_averaged(codec: str) -> None:
    size = 64 * 32
    values = np.random.default_rng(1).standard_normal((2, size)).astype(np.float32)
    team = Team(size=size)
    team.join(0, 1)
    for rank in range(2):
        parts = Encoder(codec, size, {0: (64, 32)}).encode(values[rank])
        team.send(rank, "push", round=0, codec=codec, parts=parts)
    exact = values.mean(0)
    off = np.linalg.norm(np.array(team.mean()) - exact) / np.linalg.norm(exact)
    assert off < {"bf16": 0.01, "fp16": 0.01, "int8": 0.02, "topk:0.5": 0.7, "powersgd:1": 1.2}[codec]


# -- taking over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["redis", "torch"])
def test_who_takes_over_asks_for_what_it_does_not_have_and_closes_no_round_too_early(plane: str) -> None:
    team = Team(plane=plane)
    team.run.heard = team.now
    sent = {"round": 7, "peers": 2}
    [first] = team.send(0, "beat", **sent)
    assert (first.round, first.push_wanted, first.settled) == (7, True, False)
    team.push(0, [1, 1, 1], round_=7, peers=2)
    team.wait(0.3, 0)
    assert team.closed == [], "rank 1 may be about to speak"
    [second] = team.send(1, "beat", **sent)
    assert (second.push_wanted, second.settled) == (True, True)
    team.push(1, [3, 3, 3], round_=7, peers=2)
    assert [(one.round, one.ranks) for one in team.closed] == [(7, [0, 1])]


def test_a_worker_that_missed_a_round_is_sent_it_again() -> None:
    team = Team()
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.push(1, [3, 3, 3])
    team.now += 0.5
    outputs = team.send(1, "beat", round=0)
    assert [one.round for one in outputs if isinstance(one, Round)] == [0]


def test_a_worker_whose_rank_was_given_away_gets_another_and_both_count() -> None:
    team = Team(size=1)

    def send(worker: str, rank: int, action: Any, **more: Any) -> list[Any]:
        sent = Contribution(run="r", worker=worker, rank=rank, plan=team.plan, action=action, **more)
        answer = team.run.take(sent, team.now)
        if answer.close:
            team.close()
        return answer.outputs

    def push(worker: str, rank: int, value: float) -> None:
        send(worker, rank, "push", round=team.run.round, parts={"values": Tensor(np.array([value], np.float32))})

    team.join(0, 1)
    team.wait(1.2, 1)
    assert send("new", -1, "join")[0].rank == 0
    assert send("w0", 0, "beat", round=0)[0].rank == 2
    for worker, rank, value in [("w1", 1, 1.0), ("new", 0, 2.0), ("w0", 0, 6.0)]:
        push(worker, rank, value)
    assert (team.closed[-1].ranks, team.mean()) == ([0, 1, 2], [3])
    for worker, rank in [("new", 0), ("w0", 2), ("w1", 1)]:
        assert send(worker, rank, "beat", round=1)[0].members == [0, 1, 2]


# -- servers -------------------------------------------------------------------------------------------------------


def served_team(**plan: Any) -> Team:
    team = Team(Server, **{"mode": "async", "optimizer": "sgd", "rate": 0.5, **plan})
    team.join(0, 1)
    team.send(0, "state", parts={"values": Tensor(np.zeros(3, np.float32))})
    return team


def test_a_server_applies_every_push_when_it_comes_and_says_how_stale_it_was() -> None:
    team = served_team()
    [first] = team.push(0, [1, 1, 1], 0, base=0)
    [second] = team.push(1, [2, 2, 2], 0, base=0)
    [third] = team.push(0, [1, 1, 1], 1, base=2)
    assert [one.parts["values"].tolist() for one in (first, second, third)] == [[-0.5] * 3, [-1.5] * 3, [-2.0] * 3]
    assert [(one.round, one.staleness, one.worker) for one in (first, second, third)] == [
        (1, 0, "w0"), (2, 1, "w1"), (3, 0, "w0"),
    ]  # fmt: skip


def test_a_push_that_comes_twice_is_applied_once() -> None:
    team = served_team()
    team.push(0, [1, 1, 1], 0)
    assert team.push(0, [1, 1, 1], 0) == []
    assert team.run.round == 1


def test_a_stale_push_moves_less_where_that_is_asked_for() -> None:
    team = served_team(late="scale")
    for number in range(3):
        team.push(0, [1, 1, 1], number, base=number)
    [late] = team.push(1, [1, 1, 1], 0, base=0)
    assert late.parts["values"].tolist() == pytest.approx([-1.5 - 0.5 / 4] * 3)


def test_a_push_that_is_not_finite_changes_nothing_and_is_reported() -> None:
    team = served_team()
    [applied] = team.push(0, [np.inf, 1, 1], 0)
    assert (applied.refused, applied.ranks, applied.parts["values"].tolist()) == ([0], [], [0.0] * 3)


def test_a_server_goes_on_from_its_weights_when_all_come_back_after_an_outage() -> None:
    team = served_team()
    for number in range(3):
        team.push(0, [1, 1, 1], number, base=number)
    team.wait(2.0)
    assert team.run.members == {}
    [admission] = team.send(1, "beat", round=-1, base=3)
    assert (admission.ready, admission.round) == (True, 3)
    [applied] = team.push(1, [1, 1, 1], 0, base=3)
    assert (applied.round, applied.staleness, applied.parts["values"].tolist()) == (4, 0, [-2.0] * 3)


def test_a_server_whose_run_was_meanwhile_another_aggregators_asks_for_the_weights() -> None:
    team = served_team()
    team.push(0, [1, 1, 1], 0)
    team.wait(2.0)
    [admission] = team.send(0, "beat", round=-1, base=7)
    assert (admission.ready, admission.state_wanted) == (False, True)
    team.send(0, "state", round=7, parts={"values": Tensor(np.full(3, 5, np.float32))})
    [applied] = team.push(0, [2, 2, 2], 9, base=7)
    assert (applied.round, applied.parts["values"].tolist()) == (8, [4.0] * 3)


def test_the_next_run_of_a_name_does_not_begin_with_the_weights_of_the_former() -> None:
    team = served_team()
    team.push(0, [1, 1, 1], 0)
    for rank in range(2):
        team.send(rank, "leave")
    assert not team.join(2, 3).ready
    team.send(2, "state", parts={"values": Tensor(np.full(3, 5, np.float32))})
    [applied] = team.push(2, [2, 2, 2], 0)
    assert (applied.round, applied.parts["values"].tolist()) == (1, [4.0] * 3)


def test_live_pushes_are_those_of_members_and_renew_no_lease() -> None:
    team = served_team(mode="dogwild")

    def push(worker: str, number: int) -> list[Any]:
        parts = {"values": Tensor(np.ones(3, np.float32))}
        sent = Contribution(run="r", worker=worker, rank=0, plan=team.plan, action="push", round=number, parts=parts)
        assert isinstance(team.run, Server)
        return team.run.take_live(sent, team.now).outputs

    assert push("another aggregator's", 0) == []
    for number in range(3):
        assert len(push("w0", number)) == 1
        team.wait(0.4, 1)
    assert [member.rank for member in team.run.members.values()] == [1]
    assert push("w0", 3) == []
    assert team.run.round == 3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad", "adam"])
def test_the_servers_optimizers_are_torchs(name: str) -> None:
    import torch

    parameter = torch.nn.Parameter(torch.ones(50))
    reference: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD([parameter], 0.1),
        "momentum": lambda: torch.optim.SGD([parameter], 0.1, momentum=0.9),
        "adagrad": lambda: torch.optim.Adagrad([parameter], 0.1),
        "adam": lambda: torch.optim.Adam([parameter], 0.1),
    }[name]()
    weights, random = np.ones(50, np.float32), np.random.default_rng(0)
    ours = Optimizer(name, 0.1, 50)
    for _ in range(20):
        gradient = random.standard_normal(50).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        ours.apply(weights, gradient)
    assert np.allclose(weights, parameter.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad", "adam"])
def test_what_is_worth_a_part_of_a_step_is_not_made_up_for_in_the_steps_after_it(name: str) -> None:
    def moved(*parts: float) -> float:
        weights, optimizer = np.zeros(1, np.float32), Optimizer(name, 0.1, 1)
        for _ in range(100):
            optimizer.apply(weights, np.float32([0.01]))
        before = float(weights[0])
        for part in parts:
            optimizer.apply(weights, np.float32([-1.0]), part)
        for _ in range(10):
            optimizer.apply(weights, np.float32([0.0]))
        return float(weights[0]) - before

    assert abs(moved(0.02) - moved()) < abs(moved(1.0) - moved()) / 3


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(Reject, match="'lion' is unknown; use one of sgd, momentum, adagrad, adam"):
        Team(Server, mode="async", optimizer="lion")


# -- lives of a run ------------------------------------------------------------------------------------------------


def test_what_a_run_that_nobody_is_left_of_left_behind_counts_for_nothing() -> None:
    team = Team()
    first = team.join(0, 1).life
    team.push(0, [1, 1, 1])
    team.push(1, [1, 1, 1])
    team.wait(LEASE + 0.2)
    second = team.join(2, 3).life
    assert second > first
    assert team.push(0, [9, 9, 9], round_=37, life=first) == []
    assert team.send(0, "state", round=37, life=first) == []
    [told] = team.send(1, "beat", round=37, life=first)
    assert (told.ready, told.life, told.members) == (False, second, [2, 3])
    team.push(2, [1, 1, 1], life=second)
    team.push(3, [3, 3, 3], life=second)
    assert (team.closed[-1].round, team.closed[-1].life, team.mean()) == (0, second, [2.0] * 3)


def test_who_takes_over_by_a_message_from_the_dead_hears_it_from_the_living() -> None:
    team = Team()
    team.push(0, [9, 9, 9], round_=37, life=5, peers=2)
    team.push(2, [1, 1, 1], round_=12, life=9, peers=2)
    team.push(0, [9, 9, 9], round_=37, life=5, peers=2)
    team.push(3, [3, 3, 3], round_=12, life=9, peers=2)
    assert [(one.round, one.life, one.ranks) for one in team.closed] == [(12, 9, [2, 3])]


def test_who_takes_over_with_a_contribution_that_came_twice_goes_to_the_open_round() -> None:
    team = Team()
    team.push(0, [9, 9, 9], round_=37, peers=2)
    for rank, value in ((1, 1), (0, 3)):
        team.push(rank, [value] * 3, round_=38, peers=2)
    assert [(one.round, one.ranks) for one in team.closed] == [(38, [0, 1])]


def test_a_run_goes_on_with_a_newcomer_that_has_its_state_when_all_others_die() -> None:
    team = Team()
    team.join(0, 1)
    team.push(0, [1, 1, 1])
    team.push(1, [1, 1, 1])
    team.join(2)
    for _ in range(12):
        team.now += 0.1
        team.send(2, "beat", round=-1)
        team.run.due(team.now)
    assert not team.run.begun
    team.push(2, [5, 5, 5], round_=1)
    assert (team.closed[-1].round, team.closed[-1].ranks) == (1, [2])


def test_who_waited_in_vain_for_the_dead_joins_again_before_the_run_begins_anew() -> None:
    """Else the first one would begin with the others, and see each of them come as another newcomer."""
    team = Team()
    team.push(0, [1, 1, 1], round_=37, life=5, peers=2)
    team.join(2, 3, base=1)
    for _ in range(12):
        team.now += 0.1
        for rank in (2, 3):
            team.send(rank, "beat", round=-1, life=5)
        team.run.due(team.now)
    assert not team.join(2, base=2, round=-1).ready
    admission = team.join(3, base=2, round=-1)
    assert (admission.ready, admission.members, admission.newcomers) == (True, [2, 3], {})


def test_a_run_does_not_go_on_from_nothing_because_somebody_waits_to_begin_with_its_checkpoint(data: Path) -> None:
    save("r", 0, Checkpoint(20, {"model.w": np.zeros(3, np.float32)}))
    team = Team(checkpoint=10)
    team.send(1, "beat", round=-1)
    assert not team.run.begun
    admission = [one for rank in (0, 1) for one in team.send(rank, "join") if isinstance(one, Admission)][-1]
    assert (admission.ready, admission.round, admission.source) == (True, 20, -1)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def test_a_server_goes_on_bit_for_bit_from_its_checkpoint(data: Path) -> None:
    def pushes(team: Team, numbers: range) -> None:
        for number in numbers:
            gradient = np.random.default_rng(number).standard_normal(3)
            team.push(0, gradient, number, base=team.run.round)

    unbroken = served_team(optimizer="adam")
    pushes(unbroken, range(30))
    broken = served_team(optimizer="adam", checkpoint=5)
    pushes(broken, range(17))
    resumed = Team(Server, mode="async", optimizer="adam", rate=0.5, checkpoint=5)
    [admission] = resumed.send(0, "beat", round=16)
    assert (resumed.run.round, admission.push_wanted) == (15, True)
    pushes(resumed, range(15, 30))
    assert resumed.run.weights.tobytes() == unbroken.run.weights.tobytes()  # type: ignore[attr-defined]


def test_versions_go_on_from_where_the_workers_are_and_not_from_the_checkpoint(data: Path) -> None:
    first = served_team(checkpoint=5)
    for number in range(7):
        first.push(0, [1, 1, 1], number, base=number)
    second = Team(Server, mode="async", optimizer="sgd", rate=0.5, checkpoint=5)
    second.send(0, "beat", round=7, base=7)
    assert second.run.round == 5
    [applied] = second.push(0, [1, 1, 1], 7, base=7)
    assert (applied.round, applied.staleness, applied.parts["values"].tolist()) == (8, 0, [-3.0] * 3)


def test_the_two_newest_checkpoints_are_kept_and_a_torn_one_is_left_out(data: Path) -> None:
    for number in (10, 20, 30):
        save("a/b", 0, Checkpoint(number, {"w": np.full(3, number, np.float32)}, {"note": str(number)}))
    files = sorted(folder_of("a/b", 0).iterdir())
    assert [file.name for file in files] == ["round-000000020.safetensors", "round-000000030.safetensors"]
    files[1].write_bytes(files[1].read_bytes()[:50])
    found = latest("a/b", 0)
    assert found is not None
    assert (found.round, found.tensors["w"].tolist(), found.note) == (20, [20.0] * 3, {"note": "20"})


def test_a_run_goes_on_while_its_checkpoint_is_written_which_is_found_at_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may take longer than a lease. What came meanwhile follows, the newest of it."""
    written, save_file = threading.Event(), checkpoints.save_file

    def slowly(*given: Any) -> None:
        assert written.wait(10)
        save_file(*given)

    monkeypatch.setattr(checkpoints, "save_file", slowly)
    team = Team(checkpoint=1)
    team.join(0, 1)
    for number in range(1, 4):
        for rank in range(2):
            team.push(rank, [number] * 3)
        team.send(0, "state", round=number, parts={"model.w": Tensor(np.full(3, number, np.float32))})
        found = latest("r", 0)
        assert found is not None
        assert (found.round, found.tensors["model.w"].tolist()) == (number, [number] * 3)
    last = checkpoints.keep("r", 0, found)
    assert [*data.rglob("*.safetensors")] == []
    written.set()
    last.result(10)
    names = sorted(file.name for file in folder_of("r", 0).iterdir())
    assert names in (["round-000000001.safetensors", "round-000000003.safetensors"], ["round-000000003.safetensors"])
    found = latest("r", 0)
    assert found is not None
    assert found.round == 3


def test_what_cannot_be_written_is_told_and_the_next_one_is(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "runs").write_text("no folder")
    one = Checkpoint(10, {"w": np.ones(3, np.float32)})
    checkpoints.keep("r", 0, one).result(10)
    assert "no checkpoint of round 10 in" in caplog.text
    assert latest("r", 0) is None
    (data / "runs").unlink()
    checkpoints.keep("r", 0, one).result(10)
    found = latest("r", 0)
    assert found is not None
    assert found is not one


def test_shards_and_runs_of_like_names_have_folders_of_their_own(data: Path) -> None:
    names = [("a", 0), ("a", 1), ("a.1", 0), ("a.1", 1), ("a/1", 0), ("a/1", 1)]
    assert len({folder_of(run, shard) for run, shard in names}) == len(names)
    assert folder_of("a.1", 0) == data / "runs" / "a.1", "where those of before are"


# -- through Redis -------------------------------------------------------------------------------------------------


@pytest.fixture
async def app(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pipeline]:
    """The aggregator is served; what is yielded publishes to it."""
    monkeypatch.setattr(aggregation, "runs", aggregation.Runs())
    async with served(aggregation.app, valkey_url), Pipeline("t", valkey_url) as app:
        yield app


def sent(run: str, rank: int, action: Any, **more: Any) -> Contribution:
    plan = more.pop("plan", RunPlan(size=1, workers=2, lease=60.0))
    return Contribution(run=run, worker=f"w{rank}", rank=rank, plan=plan, action=action, **more)


async def test_many_runs_side_by_side_do_not_mix(app: Pipeline) -> None:
    runs = [f"run-{number}" for number in range(20)]
    for run, rank in itertools.product(runs, range(2)):
        await app.request(catalog.contributions, sent(run, rank, "join"), key=run)
    for number, rank, (index, run) in itertools.product(range(3), range(2), enumerate(runs)):
        parts = {"values": Tensor(np.full(1, index + rank, np.float32))}
        await app.publish(catalog.contributions, sent(run, rank, "push", round=number, parts=parts), key=run)
    closed: list[Round] = events(await collect(app, catalog.rounds, 60))
    assert {(one.run, one.round) for one in closed} == set(itertools.product(runs, range(3)))
    assert all(one.parts["values"].tolist() == [int(one.run[4:]) + 0.5] for one in closed)


async def test_a_stranger_becomes_a_dead_letter_that_says_why(app: Pipeline) -> None:
    await app.publish(catalog.contributions, sent("r", -1, "push"), key="r")
    ledger = await idle(app, "training.contributions")
    assert ledger.groups["aggregation"].dead == 1
    [letter] = await app.dead_letters("training.contributions")
    assert "worker w-1 has not joined" in letter.event.reason


async def test_a_worker_of_another_model_is_told_so(app: Pipeline) -> None:
    await app.request(catalog.contributions, sent("r", 0, "join"), key="r")
    with pytest.raises(RequestFailed, match="run 'r' has size 1; worker w1 came with 2"):
        await app.request(catalog.contributions, sent("r", 1, "join", plan=RunPlan(size=2)), key="r")


async def test_a_run_that_nobody_speaks_of_is_let_go(app: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "FORGOTTEN", 0.1)
    await app.request(catalog.contributions, sent("r", 0, "join", plan=RunPlan(size=1, lease=0.2)), key="r")
    assert len(aggregation.runs._runs) == 1
    await until(lambda: not aggregation.runs._runs)


def served_plan(mode: str, **plan: Any) -> RunPlan:
    return RunPlan(**{"mode": mode, "size": 1, "optimizer": "sgd", "rate": 1.0, "lease": 60.0, **plan})


async def begin_served(app: Pipeline, plan: RunPlan) -> None:
    await app.request(catalog.contributions, sent("r", 0, "join", plan=plan), key="r")
    weights = {"values": Tensor(np.zeros(1, np.float32))}
    await app.publish(catalog.contributions, sent("r", 0, "state", plan=plan, parts=weights), key="r")
    await idle(app, "training.contributions")


async def test_every_live_push_is_answered_with_the_weights(app: Pipeline) -> None:
    plan = served_plan("dogwild")
    await begin_served(app, plan)
    gradient = {"values": Tensor(np.ones(1, np.float32))}
    answers: list[Round] = []
    async with app.watch(catalog.rounds_live) as stream, asyncio.timeout(10):
        for number in range(5):
            push = sent("r", 0, "push", plan=plan, round=number, parts=gradient)
            await app.publish(catalog.contributions_live, push)
        async for message in stream:
            answers.append(message.event)
            if len(answers) == 5:
                break
    assert [one.sequence for one in answers] == [0, 1, 2, 3, 4]
    assert [one.parts["values"].tolist() for one in answers] == [[-1.0], [-2.0], [-3.0], [-4.0], [-5.0]]


async def test_the_clock_goes_on_after_a_round_that_could_not_be_published(
    app: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, failed = aggregation.app.publish, []

    async def fails_once(channel: Any, event: Any, **more: Any) -> Any:
        if channel is catalog.rounds and not failed:
            failed.append(event.round)
            raise ServerUnavailable("as it happens")
        return await publish(channel, event, **more)

    monkeypatch.setattr(aggregation.app, "publish", fails_once)
    plan = RunPlan(size=1, workers=2, deadline=0.1, lease=60.0)
    for rank in range(2):
        await app.request(catalog.contributions, sent("r", rank, "join", plan=plan), key="r")
    for number in range(2):
        parts = {"values": Tensor(np.full(1, number, np.float32))}
        push = sent("r", 0, "push", plan=plan, round=number, parts=parts)
        await app.publish(catalog.contributions, push, key="r")
        closed: list[Round] = events(await collect(app, catalog.rounds, number + 1))
    assert failed == [0]
    assert [(one.round, one.parts["values"].tolist()) for one in closed] == [(0, [0.0]), (1, [1.0])]

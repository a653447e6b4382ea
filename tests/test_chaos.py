"""Exactly once, whatever is killed: no output lost, none doubled, the ledger exact all the way."""

from __future__ import annotations

import pytest

from . import chaos


@pytest.mark.timeout(180)
async def test_outputs_are_committed_exactly_once_while_workers_and_server_are_killed() -> None:
    report = await chaos.run(chaos.Plan(seconds=25, events=100_000, restarts=2, kill_every=1.0, pause_every=6.0))
    judge(report)
    assert report.kills >= 15


@pytest.mark.soak
async def test_ten_minutes_of_chaos() -> None:
    report = await chaos.run(chaos.Plan(seconds=600, events=1_000_000, kill_every=1.5))
    judge(report)
    assert report.kills >= 300


def judge(report: chaos.Report) -> None:
    print(report.summary())
    assert (report.lost, report.doubled) == (0, 0)
    assert report.unbalanced == []
    assert report.ledger_checks > 10
    assert report.retried > 0
    assert report.claims > 0

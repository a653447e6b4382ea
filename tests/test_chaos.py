"""Exactly once, whatever is killed: no output lost, none doubled, the ledger exact all the way."""

from __future__ import annotations

import pytest

from . import chaos


@pytest.mark.timeout(300)
async def test_two_minutes_of_chaos() -> None:
    """Workers killed and paused, the server killed and restarted, all the while."""
    report = await chaos.run(chaos.Plan(seconds=110, events=200_000, restarts=3, kill_every=1.2))
    judge(report)
    assert report.kills >= 50


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

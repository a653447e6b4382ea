"""Presence: who falls silent while others are heard is gone, and back when heard again; an outage is nobody's fault."""

from __future__ import annotations

import pytest

from pipeline.metrics import WorkerSample
from publishers.gateway import presence as module
from publishers.gateway.presence import FORGOTTEN, GONE, Presence


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_who_falls_silent_is_gone_and_an_outage_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    presence = Presence()

    def report(*workers: str) -> None:
        for worker in workers:
            presence.report(
                WorkerSample(
                    app="a", worker=worker, host="h", pid=1, version="1", started=0.0, interval=1.0, rss=1, cpu=0.0,
                    published={}, dropped={}, groups=[],
                )
            )  # fmt: skip

    def living() -> set[str]:
        return {worker for worker in ("steady", "dies", "begins") if presence.lives(worker)}

    presence.begin("begins")
    clock.now += 1.0
    report("steady", "dies")
    assert living() == {"steady", "dies", "begins"}
    clock.now += 10 * GONE
    report("steady")
    assert living() == {"steady", "dies", "begins"}
    for _ in range(int(GONE)):
        clock.now += 1.0
        report("steady")
    assert living() == {"steady"}
    report("dies")
    assert living() == {"steady", "dies"}
    for _ in range(int(FORGOTTEN / 10) + 10):
        clock.now += 10.0
        report("steady")
    assert sorted(presence.forget()) == ["begins", "dies"]
    assert presence.forget() == []

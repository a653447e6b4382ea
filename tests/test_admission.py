"""Admission: bounded by count, bytes and expected wait; a cold start or a stall is no overload."""

from __future__ import annotations

import pytest

from publishers.gateway import admission as module
from publishers.gateway.admission import Admission, Overloaded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run(admission: Admission, clock: Clock, count: int, seconds: float) -> None:
    """So many predictions one after the other."""
    for _ in range(count):
        admission.enter(1)
        clock.now += seconds
        admission.leave(1, answered=True)


def test_bounds_by_count_and_bytes(clock: Clock) -> None:
    admission = Admission(2, 100, 5.0)
    admission.enter(200)  # one may always be under way
    with pytest.raises(Overloaded, match="200 bytes"):
        admission.enter(1)
    admission.leave(200, answered=True)
    admission.enter(1)
    admission.enter(1)
    with pytest.raises(Overloaded, match="2 predictions"):
        admission.enter(1)
    assert admission.refused == 2


def test_what_turns_out_bigger_than_it_said_is_counted(clock: Clock) -> None:
    admission = Admission(10, 100, 5.0)
    admission.enter(0)
    admission.grow(150)  # one may always be under way
    admission.leave(150, answered=True)
    admission.enter(0)
    admission.enter(0)
    admission.grow(60)
    with pytest.raises(Overloaded, match="60 bytes"):
        admission.grow(60)
    assert admission.nbytes == 60


def test_a_wait_beyond_the_limit_is_refused_with_when_to_come_again(clock: Clock) -> None:
    admission = Admission(1000, 1000, 5.0)
    run(admission, clock, 60, 0.1)
    for _ in range(51):
        admission.enter(1)
    with pytest.raises(Overloaded, match="would wait 5") as refused:
        admission.enter(1)
    assert refused.value.after == 6
    for _ in range(51):
        clock.now += 0.1
        admission.leave(1, answered=True)
    admission.enter(1)


def test_a_slow_start_and_a_stall_refuse_nobody(clock: Clock) -> None:
    admission = Admission(1000, 1000, 5.0)
    run(admission, clock, 1, 3.0)  # a worker that is still loading
    for _ in range(64):
        admission.enter(1)
    clock.now += 1.5  # another one died with its batch
    for _ in range(64):
        admission.leave(1, answered=True)
    run(admission, clock, 50, 0.02)
    assert admission.drain_seconds == 0
    for _ in range(64):
        admission.enter(1)


def test_idle_time_does_not_count(clock: Clock) -> None:
    admission = Admission(1000, 1000, 5.0)
    for _ in range(40):
        run(admission, clock, 1, 0.05)
        clock.now += 60
    for _ in range(64):
        admission.enter(1)
    assert admission.drain_seconds == pytest.approx(64 * 0.05)

"""Admission: bounded by count, bytes and expected wait; crowds, a cold start or a stall are no overload, a flood is."""

from __future__ import annotations

import random
from collections import deque

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


def made(most: int = 1000, most_bytes: int = 1000, wait: float = 5.0, slowdown: float = 2.0) -> Admission:
    return Admission(most, most_bytes, wait, slowdown)


def run(admission: Admission, clock: Clock, count: int, seconds: float) -> None:
    """So many predictions one after the other."""
    for _ in range(count):
        ticket = admission.enter(1)
        clock.now += seconds
        admission.leave(ticket, 1, answered=True, computed=True)


class Worker:
    """Takes what is queued, and `seconds` an item; `ask` says whether one more was admitted, by the first gateway or
    another one."""

    def __init__(self, admission: Admission, clock: Clock, seconds: float) -> None:
        self.latencies: list[float] = []
        self._admission = admission
        self._clock = clock
        self._seconds = seconds
        self._queue: deque[tuple[Admission, int, float]] = deque()
        self._batch: list[tuple[Admission, int, float]] = []
        self._until = 0.0

    def ask(self, admission: Admission | None = None) -> bool:
        admission = admission or self._admission
        try:
            self._queue.append((admission, admission.enter(1), self._clock.now))
        except Overloaded:
            return False
        return True

    def go_on(self, seconds: float) -> int:
        """How many were answered meanwhile."""
        answered = 0
        until = self._clock.now + seconds
        while self._batch or self._queue:
            if not self._batch:
                self._batch = [self._queue.popleft() for _ in range(min(32, len(self._queue)))]
                self._until = self._clock.now + len(self._batch) * self._seconds
            if self._until > until:
                break
            self._clock.now = max(self._clock.now, self._until)
            for admission, ticket, entered in self._batch:
                self.latencies.append(self._clock.now - entered)
                admission.leave(ticket, 1, answered=True, computed=True)
            answered += len(self._batch)
            self._batch = []
        self._clock.now = until
        return answered


def test_bounds_by_count_and_bytes(clock: Clock) -> None:
    admission = made(2, 100)
    ticket = admission.enter(200)  # one may always be under way
    with pytest.raises(Overloaded, match="200 bytes"):
        admission.enter(1)
    admission.leave(ticket, 200, answered=True)
    admission.enter(1)
    admission.enter(1)
    with pytest.raises(Overloaded, match="2 predictions"):
        admission.enter(1)
    assert admission.refused == 2


def test_what_turns_out_bigger_than_it_said_is_counted(clock: Clock) -> None:
    admission = made(10, 100)
    ticket = admission.enter(0)
    admission.grow(150)  # one may always be under way
    admission.leave(ticket, 150, answered=True)
    admission.enter(0)
    admission.enter(0)
    admission.grow(60)
    with pytest.raises(Overloaded, match="60 bytes"):
        admission.grow(60)
    assert admission.nbytes == 60


def test_a_wait_beyond_the_limit_is_refused_with_when_to_come_again(clock: Clock) -> None:
    admission = made()
    run(admission, clock, 60, 0.1)
    tickets = [admission.enter(1) for _ in range(51)]
    with pytest.raises(Overloaded, match="would wait 5") as refused:
        admission.enter(1)
    assert refused.value.after == 6
    for ticket in tickets:
        clock.now += 0.1
        admission.leave(ticket, 1, answered=True, computed=True)
    admission.enter(1)


def test_a_slow_start_and_a_stall_refuse_nobody(clock: Clock) -> None:
    admission = made()
    run(admission, clock, 1, 3.0)  # a worker that is still loading
    tickets = [admission.enter(1) for _ in range(64)]
    clock.now += 1.5  # another one died with its batch
    for ticket in tickets:
        admission.leave(ticket, 1, answered=True, computed=True)
    run(admission, clock, 50, 0.02)
    assert admission.drain_seconds == 0
    for _ in range(64):
        admission.enter(1)


def test_idle_time_does_not_count(clock: Clock) -> None:
    admission = made()
    for _ in range(40):
        run(admission, clock, 1, 0.05)
        clock.now += 60
    for _ in range(64):
        admission.enter(1)
    assert admission.drain_seconds == pytest.approx(64 * 0.05)


@pytest.mark.parametrize("seconds", [0.002, 0.03, 0.2])
def test_a_flood_is_refused_before_predictions_take_far_longer_than_one_alone(clock: Clock, seconds: float) -> None:
    admission = made()
    run(admission, clock, 200, seconds)
    worker, accepted = Worker(admission, clock, seconds), 0
    count = int(30 / seconds)
    for _ in range(3 * count):  # three times what it can do, for 30 s
        accepted += worker.ask()
        worker.go_on(seconds / 3)
    worker.go_on(10.0)
    latencies = sorted(worker.latencies)
    assert accepted > 0.9 * count, "the worker is kept busy"
    late = sum(latency > 3 * seconds + 0.001 for latency in latencies)
    assert late <= 3 + 0.01 * accepted, "beside the few before it is seen"
    assert admission.inflight == 0
    clock.now += 2.0
    assert all(worker.ask() for _ in range(16)), "it is over"


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("seconds", [0.002, 0.03, 0.2])
def test_a_flood_through_two_gateways_is_no_slower_than_through_one(clock: Clock, seconds: float, even: bool) -> None:
    """Neither knows what the other admits. Uneven: chance deals, three to one."""
    admissions, deal = [made(), made()], random.Random(1)
    for admission in admissions:
        admission.gateways = 2
        run(admission, clock, 200, seconds)
    worker, accepted = Worker(admissions[0], clock, seconds), 0
    count = int(30 / seconds)
    for number in range(3 * count):
        if number == 90:
            early = accepted  # before it is seen
        accepted += worker.ask(admissions[number % 2 if even else deal.choices((0, 1), (3, 1))[0]])
        worker.go_on(seconds / 3)
    worker.go_on(10.0)
    assert accepted > 0.9 * count, "the worker is kept busy"
    latencies = sorted(worker.latencies[early:])
    assert latencies[int(0.99 * len(latencies))] < (3 if even else 4) * seconds + 0.001
    assert [admission.inflight for admission in admissions] == [0, 0]
    clock.now += 20 * seconds + 2.0
    assert all(worker.ask(admission) for admission in admissions for _ in range(8)), "it is over"


@pytest.mark.parametrize(
    ("clients", "seconds"), [(64, 0.0007), (64, 0.0015), (64, 0.004), (6, 0.03), (8, 0.02), (32, 0.03), (64, 0.02)]
)
def test_clients_that_wait_for_their_answers_are_not_refused(clock: Clock, clients: int, seconds: float) -> None:
    admission = made()
    run(admission, clock, 30, 0.004 + seconds)  # one alone takes longer: the way to the worker and back
    worker = Worker(admission, clock, seconds)
    assert all(worker.ask() for _ in range(clients))
    for _ in range(3000):
        assert all(worker.ask() for _ in range(worker.go_on(0.003)))


def test_clients_of_two_gateways_that_wait_for_their_answers_are_not_refused(clock: Clock) -> None:
    admissions = [made(), made()]
    for admission in admissions:
        admission.gateways = 2
        run(admission, clock, 30, 0.024)
    worker = Worker(admissions[0], clock, 0.02)
    assert all(worker.ask(admissions[client % 2]) for client in range(64))
    for _ in range(3000):
        worker.go_on(0.003)
        assert all(worker.ask(admission) for admission in admissions for _ in range(32 - admission.inflight))


def test_what_a_dead_worker_holds_is_not_ahead_of_others(clock: Clock) -> None:
    admission = made()
    run(admission, clock, 60, 0.03)
    held = [admission.enter(1) for _ in range(8)]
    worker = Worker(admission, clock, 0.03)
    admitted = [worker.ask() for _ in range(900) if worker.go_on(0.033) >= 0]  # what the other worker can do
    assert admitted.count(False) < 5, "until others have overtaken what it holds"
    for ticket in held:
        admission.leave(ticket, 1, answered=True, computed=True)


@pytest.mark.parametrize("outage", [0.5, 2.0, 6.0])
def test_while_no_worker_lives_and_when_one_is_back_nobody_is_refused(clock: Clock, outage: float) -> None:
    """20 a second, of the 60 that the workers can do."""
    admission = made()
    run(admission, clock, 120, 1 / 60)
    worker = Worker(admission, clock, 1 / 60)
    for _ in range(int(20 * outage)):
        assert worker.ask()
        clock.now += 0.05
    for _ in range(400):
        assert worker.ask()
        worker.go_on(0.05)
    assert admission.inflight <= 2


def test_predictions_may_wait_where_that_is_asked_for(clock: Clock) -> None:
    admission = made(slowdown=0.0)
    run(admission, clock, 60, 0.03)
    worker = Worker(admission, clock, 0.03)
    for _ in range(100):
        assert worker.ask()
        worker.go_on(0.01)

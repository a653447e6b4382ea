"""The delivery protocol as a small model, explored exhaustively: 2 workers, 3 events in 2 frames, up to 3 crashes.

A state is what Redis holds and what each worker believes. Every interleaving of reading, computing, committing
(whole or in part), crashing, stalling past a lease, and claiming is visited. In none is an output lost or doubled, and
the ledger balances in each. The same search finds the fault at once when commit's check is left out: it can fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

FRAMES = (2, 1)
"""Events in each frame."""
WORKERS = 2
CRASHES = 3

Held = tuple[tuple[int, frozenset[int]], ...]
"""What a worker has in hand: (frame, its events not yet committed, as the worker believes)."""


@dataclass(frozen=True)
class State:
    read: int = 0
    """Frames handed out for the first time."""
    pending: tuple[int | None, ...] = (None,) * len(FRAMES)
    """Frame → the worker it is pending for; None when unread or acknowledged."""
    done: tuple[frozenset[int], ...] = (frozenset(),) * len(FRAMES)
    """Frame → events committed (Redis's progress)."""
    outputs: tuple[tuple[int, int], ...] = ()
    """Outputs written, as (frame, event), in order."""
    handled: int = 0
    suppressed: int = 0
    workers: tuple[Held, ...] = ((),) * WORKERS
    crashes: int = 0

    @property
    def settled(self) -> bool:
        return self.read == len(FRAMES) and not any(owner is not None for owner in self.pending)


def steps(state: State, checked: bool) -> Iterator[State]:
    for worker in range(WORKERS):
        yield from read(state, worker)
        yield from claim(state, worker)
        for frame, events in state.workers[worker]:
            for low in sorted(events):
                for high in sorted(events):
                    if low <= high and set(range(low, high + 1)) <= events:
                        yield commit(state, worker, frame, frozenset(range(low, high + 1)), checked)
        if state.crashes < CRASHES and state.workers[worker]:
            yield replace(state, workers=put(state.workers, worker, ()), crashes=state.crashes + 1)


def read(state: State, worker: int) -> Iterator[State]:
    if state.read < len(FRAMES):
        frame = state.read
        held = (*state.workers[worker], (frame, frozenset(range(FRAMES[frame]))))
        yield replace(
            state,
            read=frame + 1,
            pending=put(state.pending, frame, worker),
            workers=put(state.workers, worker, held),
        )


def claim(state: State, worker: int) -> Iterator[State]:
    """A lease may end at any time (a crash, or a stall). What was committed is not handed out again."""
    for frame, owner in enumerate(state.pending):
        if owner is None or any(frame == other for other, _ in state.workers[worker]):
            continue
        left = frozenset(range(FRAMES[frame])) - state.done[frame]
        yield replace(
            state,
            pending=put(state.pending, frame, worker),
            workers=put(state.workers, worker, (*state.workers[worker], (frame, left))),
        )


def commit(state: State, worker: int, frame: int, events: frozenset[int], checked: bool) -> State:
    settled_before = events if state.pending[frame] is None else events & state.done[frame]
    if checked and settled_before:
        # Nothing is written; the worker learns what stands and drops the rest.
        known = frozenset(range(FRAMES[frame])) if state.pending[frame] is None else state.done[frame]
        workers = put(state.workers, worker, drop(state.workers[worker], frame, known))
        return replace(state, workers=workers, suppressed=min(1, state.suppressed + 1))
    done = state.done[frame] | events
    whole = len(done) == FRAMES[frame]
    return replace(
        state,
        done=put(state.done, frame, done),
        pending=put(state.pending, frame, None) if whole else state.pending,
        outputs=tuple(sorted((*state.outputs, *((frame, event) for event in events)))),
        handled=state.handled + len(events),
        workers=put(state.workers, worker, drop(state.workers[worker], frame, events)),
    )


def drop(held: Held, frame: int, events: frozenset[int]) -> Held:
    left = ((one, rest - events if one == frame else rest) for one, rest in held)
    return tuple((one, rest) for one, rest in left if rest)


def put(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:index], value, *values[index + 1 :])


def explore(checked: bool) -> int:
    """Visit every state; returns how many. Raises AssertionError at the first bad one."""
    start = State()
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        judge(state)
        following = set(steps(state, checked))
        assert following or state.settled, f"stuck with work left: {state}"
        for after in following - seen:
            seen.add(after)
            queue.append(after)
    return len(seen)


def judge(state: State) -> None:
    assert len(state.outputs) == len(set(state.outputs)), f"an output was doubled: {state}"
    published = sum(FRAMES)
    lag = sum(FRAMES[state.read :])
    pending = sum(
        FRAMES[frame] - len(state.done[frame]) for frame, owner in enumerate(state.pending) if owner is not None
    )
    assert published == state.handled + pending + lag, f"the ledger does not balance: {state}"
    if state.settled:
        assert len(state.outputs) == published, f"an output was lost: {state}"


def test_no_interleaving_loses_or_doubles_an_output() -> None:
    assert explore(checked=True) > 1000


def test_the_search_finds_the_fault_when_the_check_is_left_out() -> None:
    with pytest.raises(AssertionError, match=r"doubled|balance"):
        explore(checked=False)

"""Rounds in shared memory: workers of one host sum their vectors in place, each a slice of it. No message a round.

    slot 0 ─┐   every worker copies its vector into its slot and counts its `contributed` up;
    slot 1 ─┼─▶ when all have, worker i sums slice i of all slots, in rank order, into the result and counts `done` up;
    slot 2 ─┘   when all have, the result is the mean, which everybody reads where it lies.

A group of workers has one file, a *generation*; who joins or dies makes a new one. The lowest rank of a generation
closes its rounds: it counts `closed` up when every `done` is set. Whoever makes the next generation claims it first, by
creating its file, then writes its number into the old one, and only then reads which round is open; and whoever sees a
round closed looks afterwards whether there is a next generation, which then counts. So survivors never disagree on a
round, whatever is killed, stopped or resumed when. A member is known by its rank and the generation it came with: a
worker in a long step may find itself in a generation several later, but never in the place of one that has its rank.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigurationError

__all__ = ["Group", "host", "release", "sweep", "wait"]

Vector = npt.NDArray[np.float32]

MAGIC = 0x504C5F47524F5550
MOST = 256
"""Workers of a group."""
VALUES = 32
"""Most metrics of a round."""
NAMES = 4096
"""Most bytes of their names."""
CHUNK = 1 << 15
"""Values summed at a time: they stay in the cache."""
LINE = 8
"""Words of a cache line: what one worker writes and others read does not share one."""
SPIN = 2e-4
"""Seconds of looking without pause."""
LEFT = np.iinfo(np.int64).max
PREFIX = "pipeline-group-"

_HEAD = 8 + MOST
_BANK = 1 + VALUES // LINE
"""Lines of what is said of a vector: its samples, how often the names there have changed, their bytes; the values."""
_LINES = 2 + 2 * _BANK
"""Two banks, in turn: who is quick writes of the next round while others still read of this one."""


def host(folder: Path) -> str:
    """What processes that share this folder's memory have in common, and no others."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{folder.stat().st_dev}:{folder}"
    except OSError:
        return ""


def sweep(folder: Path) -> None:
    """Unlink files that no process has open any more: all of their workers were killed."""
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob("pipeline-hogwild-*")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60.0:  # else it may be about to be locked
                release(path, os.open(path, os.O_RDWR))


def release(path: Path, descriptor: int) -> None:
    """Close a file that is held by a shared lock; the last one to do so unlinks it."""
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Group:
    """One generation, as one of its workers sees it."""

    def __init__(self, path: Path, descriptor: int, rank: int, since: int | None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)
        self._words = np.frombuffer(self._map, np.int64, _HEAD + MOST * LINE * _LINES)
        head = self._words
        self.generation = int(head[1])
        self.begins = int(head[2])
        """Its first round."""
        self.size = int(head[5])
        count = int(head[4])
        self.members = [int(member) for member in head[8 : 8 + count]]
        lines = self._words[_HEAD:].reshape(MOST, _LINES, LINE)[:count]
        self.came: list[int] = lines[:, 0, 2].tolist()
        """The generation that each member came with."""
        self.me = self.members.index(rank) if rank in self.members else -1
        if since not in (None, self.came[self.me]):
            self.me = -1
        self.contributed = lines[:, 0, 0]
        self.done = lines[:, 1, 0]
        banks = lines[:, 2:].reshape(count, 2, _BANK * LINE)
        self._about = banks[:, :, :LINE]
        self._values = banks[:, :, LINE:].view(np.float64)
        stride = _stride(self.size)
        floats = np.frombuffer(self._map, np.float32, (count + 1) * stride, _offset()).reshape(count + 1, stride)
        texts = np.frombuffer(self._map, np.uint8, offset=_offset() + floats.nbytes)
        self._texts = texts.reshape(count, 2, NAMES)
        self._written: list[list[str]] = [[], []]
        """The names that this worker has written, by bank."""
        self._read: dict[tuple[int, int], tuple[int, list[str]]] = {}
        """Member and bank → how often the names have changed, and what they then were."""
        self._slots = floats[:count, : self.size]
        self.result = floats[count, : self.size]
        self._scratch = np.empty(CHUNK, np.float32)

    @classmethod
    def make(
        cls, folder: Path, token: str, rank: int, members: Sequence[int], size: int, begins: int, old: Group | None,
        joining: Sequence[int] = (),
    ) -> Group | None:  # fmt: skip
        """A new generation; None when another worker is making one. Raises ConfigurationError without memory for it.

        begins  its first round; where there is an `old` one, that says it
        token   names the group's files
        joining  members that are new, though the old one may have had members of these ranks
        """
        if len(members) > MOST:
            raise ConfigurationError(f'more than {MOST} workers on one host: use plane="redis"')
        generation = 1 if old is None else old.generation + 1
        while True:
            path = folder / f"{PREFIX}{token}-{generation}"
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
                break
            except FileExistsError:
                if time.time() - path.stat().st_mtime < 1.0:
                    return None
                generation += 1  # whoever began that one is dead
            except OSError as error:
                raise ConfigurationError(f'shared memory cannot be used ({error}): use plane="redis"') from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            floats, names = 4 * _stride(size) * (len(members) + 1), 2 * NAMES * len(members)
            os.posix_fallocate(descriptor, 0, _offset() + floats + names)
        except OSError as error:
            release(path, descriptor)
            raise ConfigurationError(
                f"{folder} has no room for {len(members)} workers' vectors of {4 * size:,} bytes ({error}): "
                'use plane="redis", or set PIPELINE_SHM_DIR'
            ) from None
        if old is not None:
            old._words[3] = generation
            begins = old.closed
        with mmap.mmap(descriptor, _offset()) as first:
            head = np.frombuffer(first, np.int64)
            head[1:7] = generation, begins, 0, len(members), size, begins
            head[8 : 8 + len(members)] = members
            stay = {} if old is None else dict(zip(old.members, old.came, strict=True))
            lines = head[_HEAD : _HEAD + MOST * LINE * _LINES].reshape(MOST, _LINES, LINE)
            lines[: len(members), 0, 2] = [generation if m in joining else stay.get(m, generation) for m in members]
            head[0] = MAGIC
            del head, lines
        if old is not None:
            old.path.unlink(missing_ok=True)
        return cls(path, descriptor, rank, None)

    @classmethod
    def open(cls, path: Path, rank: int, since: int | None = None) -> Group | None:
        """None when it is there no more, or not yet. `since` is for a worker that was in one before."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with mmap.mmap(descriptor, 4096) as first:
            whole = int.from_bytes(first[:8], "little") == MAGIC
        if not whole:
            os.close(descriptor)
            return None
        return cls(path, descriptor, rank, since)

    @property
    def passed(self) -> bool:
        """There is a next generation."""
        return bool(self._words[3])

    def later(self) -> list[Path]:
        """The generations that came after this one and are still there, newest first."""
        name, first = self.path.name.rpartition("-")[0], int(self._words[3])
        numbers = [int(path.name.rpartition("-")[2]) for path in self.path.parent.glob(f"{name}-*")]
        return [self.path.with_name(f"{name}-{number}") for number in sorted(numbers, reverse=True) if number >= first]

    @property
    def closed(self) -> int:
        """How many rounds are closed: the number of the open one."""
        return int(self._words[6])

    def close_round(self, round_: int) -> None:
        """By the lowest rank, when all are done."""
        self._words[6] = round_ + 1

    # -- one round -----------------------------------------------------------------------------------------------

    def contribute(self, round_: int, vector: Vector, samples: int, values: Mapping[str, float]) -> bool:
        """Copy the vector into this worker's slot. False when it is not finite: it then counts for nothing.

        Raises ConfigurationError for more values than there is room for.
        """
        self._write(round_ % 2, values)
        slot = self._slots[self.me]
        finite = True
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, self.size, CHUNK):
                part = vector[at : at + CHUNK]
                slot[at : at + CHUNK] = part
                finite = finite and bool(np.isfinite(np.add.reduce(part)))
        if not finite:
            finite = bool(np.isfinite(vector).all())
        self._about[self.me, round_ % 2, 0] = samples if finite else 0
        self.contributed[self.me] = round_ + 1
        return finite

    def _write(self, bank: int, values: Mapping[str, float]) -> None:
        names = list(values)
        if names != self._written[bank]:
            text = json.dumps(names).encode()
            if len(names) > VALUES or len(text) > NAMES:
                raise ConfigurationError(
                    f'plane="shm" averages at most {VALUES} values a step, with names of {NAMES:,} bytes, not '
                    f'{len(names)} with {len(text):,}: pass fewer to step(), or use plane="redis"'
                )
            self._texts[self.me, bank, : len(text)] = np.frombuffer(text, np.uint8)
            self._about[self.me, bank, 1:3] = self._about[self.me, bank, 1] + 1, len(text)
            self._written[bank] = names
        if names:
            self._values[self.me, bank, : len(names)] = list(values.values())

    def samples(self, round_: int) -> list[int]:
        """By member; 0 of who contributed nothing finite."""
        found: list[int] = self._about[:, round_ % 2, 0].tolist()
        return found

    def values(self, round_: int) -> list[dict[str, float]]:
        """By member, what it gave beside its vector. Of the last round that is closed, until the next one is."""
        bank = round_ % 2
        names = [self._names(member, bank, *said) for member, said in enumerate(self._about[:, bank, 1:3].tolist())]
        if not any(names):
            return [{} for _ in names]
        return [dict(zip(*given, strict=False)) for given in zip(names, self._values[:, bank].tolist(), strict=True)]

    def _names(self, member: int, bank: int, changes: int, length: int) -> list[str]:
        known = self._read.get((member, bank))
        if known is None or known[0] != changes:
            names = json.loads(self._texts[member, bank, :length].tobytes() or b"[]")
            known = self._read[member, bank] = changes, names
        return known[1]

    def all_contributed(self, round_: int) -> bool:
        return int(self.contributed.min()) > round_

    def all_done(self, round_: int) -> bool:
        return int(self.done.min()) > round_

    def left(self) -> bool:
        """Somebody of the group has left it."""
        return int(self.contributed.max()) == LEFT

    def leavers(self) -> list[int]:
        return [rank for rank, word in zip(self.members, self.contributed.tolist(), strict=True) if word == LEFT]

    def reduce(self, round_: int) -> None:
        """This worker's slice of the mean, weighted by samples."""
        count, samples = len(self.members), self.samples(round_)
        low, high = (self.size * part // count for part in (self.me, self.me + 1))
        sources = [(self._slots[index], number) for index, number in enumerate(samples) if number]
        total = sum(samples) or 1
        same = len({number for _, number in sources}) == 1
        for at in range(low, high, CHUNK):
            to = min(at + CHUNK, high)
            sum_ = self.result[at:to]
            for index, (slot, number) in enumerate(sources):
                part = slot[at:to]
                if not same:
                    part = np.multiply(part, np.float32(number / total), out=self._scratch[: to - at])
                if index:
                    np.add(sum_, part, out=sum_)
                else:
                    sum_[:] = part
            if same and len(sources) > 1:
                sum_ *= np.float32(1 / len(sources))
        self.done[self.me] = round_ + 1

    def leave(self) -> None:
        """Nobody waits for this worker any more."""
        if self.me >= 0:
            self.contributed[self.me] = LEFT

    def release(self) -> None:
        del self.contributed, self.done, self._about, self._values, self._texts, self._slots, self.result, self._words
        with contextlib.suppress(BufferError):  # the caller may still hold the last result
            self._map.close()
        release(self.path, self._descriptor)


def wait(until: Callable[[], bool], disturbed: Callable[[], bool]) -> bool:
    """Look until `until`, first without pause, then at growing intervals; False when `disturbed` says so before."""
    began = time.perf_counter()
    pause = 5e-5
    while not until():
        if time.perf_counter() - began < SPIN:
            os.sched_yield()
            continue
        if disturbed():
            return until()
        time.sleep(pause)
        pause = min(pause * 1.2, 1e-3)
    return True


def _stride(size: int) -> int:
    return -(-size // 1024) * 1024


def _offset() -> int:
    return -(-8 * (_HEAD + MOST * LINE * _LINES) // 4096) * 4096

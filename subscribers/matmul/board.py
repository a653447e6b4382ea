"""Which tiles of a job are done: a file of eight bytes a tile that the job's workers share.

A tile is computed under a lock on its byte. The kernel drops it when the worker dies, however it dies; so whoever finds
a tile that is not done and can lock it knows that nobody computes it, and a tile is begun again only after a death.
Nothing is taken back: a tile that is done stays done, and events that ask for it again change nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["Board", "fail", "failure"]

RECORD = np.dtype([("done", "u1"), ("begun", "u1"), ("unused", "u2"), ("seconds", "<f4")])
MOST_BEGUN = 4
"""How often a tile may be begun before it counts as one that kills its workers."""


class Board:
    """A job's tiles, and after them, where k is split, the sums of their partial products."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the job is over."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._records = np.memmap(path, RECORD, "r+")

    @staticmethod
    def make(path: Path, entries: int) -> None:
        """For a new job; what another worker has made before stays."""
        scratch = path.with_name(f".{os.getpid()}-{path.name}")
        scratch.write_bytes(bytes(RECORD.itemsize * entries))
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)  # whole, or not there
        scratch.unlink()

    @contextlib.contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Within the block nobody else computes this entry. False: somebody does."""
        if not self._lock(index, fcntl.F_WRLCK):
            yield False
            return
        try:
            yield True
        finally:
            self._lock(index, fcntl.F_UNLCK)

    def _lock(self, index: int, kind: int) -> bool:
        """An open file description's lock, as POSIX's own end when any descriptor of their file is closed."""
        wanted = struct.pack("hhqqi4x", kind, os.SEEK_SET, index * RECORD.itemsize, 1, 0)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def begin(self, index: int) -> None:
        self._records["begun"][index] += 1

    def finish(self, index: int, seconds: float) -> None:
        self._records["seconds"][index] = seconds
        self._records["done"][index] = 1  # last: from here on it counts

    def is_done(self, index: int) -> bool:
        return bool(self._records["done"][index])

    def done(self, entries: slice = slice(None)) -> int:
        """How many of these are done."""
        return int(np.count_nonzero(self._records["done"][entries]))

    def seconds(self) -> float:
        """What all entries took, in worker's seconds."""
        return float(self._records["seconds"].sum(dtype=np.float64))

    def recomputed(self) -> int:
        """How many times an entry was begun again."""
        return int(np.maximum(self._records["begun"].astype(np.int64) - 1, 0).sum())

    def deadly(self) -> int | None:
        """An entry whose workers died each time."""
        found = np.flatnonzero((self._records["done"] == 0) & (self._records["begun"] >= MOST_BEGUN))
        for index in found.tolist():
            with self.claim(index) as nobody_computes_it:
                if nobody_computes_it and not self.is_done(index):
                    return int(index)
        return None

    def close(self) -> None:
        os.close(self._descriptor)


def fail(where: Path, reason: str) -> None:
    """The job whose workers share this folder cannot be done; the first reason stands."""
    with contextlib.suppress(FileExistsError, FileNotFoundError), (where / "failure").open("x") as file:
        file.write(reason)


def failure(where: Path) -> str:
    """Why it cannot be done; "" while it can."""
    try:
        return (where / "failure").read_text() or "a tile failed"
    except FileNotFoundError:
        return ""

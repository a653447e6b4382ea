"""Shared-memory segments: one file each, reused by their owner once nobody needs or reads them any more.

A file is a page of header (magic, generation, what it is for, whether it was taken) and the bytes. Its name says whose:

    pipeline-<deployment>-<owner>-<number>        pipeline-<deployment>-<owner>.lock   held while the owner lives

Everything that must survive a SIGKILL is a lock that the kernel drops with its process: an owner is alive while its
lock file is locked, and a reader pins a segment with a shared lock for as long as any array over it exists. An owner
reuses a segment only under the exclusive lock, and counts its generation up, so a late reader sees that it is too late.
The one reader of an answer notes in the header that it was taken, which spares both a question to Redis.

A lock belongs to an open file, which a forked child shares with its parent: so the child lets go of what its parent
owns, and pins for itself what it sees. Each segment takes a file descriptor for its lock, of which a process has few:
segments are never more than a part of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import re
import resource
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Exhausted", "Gone", "Mappings", "Owner", "Segment", "host_token", "orphans", "sweep"]

PAGE = 4096
MAGIC = b"PLSEGM01"
SMALLEST = 64 << 10
MADV_POPULATE_WRITE = 23
"""Of Linux; Python 3.11 has no name for it."""
MOST = 16384
"""Segments of an owner, and of others' that are mapped: the kernel counts a process's maps, too."""
FORGOTTEN = 7 * 86400.0
"""Seconds after which a dead owner's files go without asking their deployment's Redis, which may be gone for good."""

_HEADER = struct.Struct("<8sQI")
_TAKEN = struct.Struct("<Q")
_TAKEN_AT = PAGE - _TAKEN.size
_NAME = re.compile(r"pipeline-(?P<deployment>[0-9a-f]{16})-(?P<owner>[0-9a-f]{16})(?:-(?P<number>\d+)|\.lock)")


class Gone(Exception):
    """Raised when a segment is not here, or serves something else by now."""


class Exhausted(Exception):
    """Raised when this process can open no file now; later it may."""


def _most() -> int:
    """Segments that may take a file descriptor each: the rest is for connections, and for whoever else opens files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, soft // 4)


def _exhausted(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def host_token(folder: Path) -> str:
    """What processes that share this folder, and no others, know: made by the first of them. "" without a folder."""
    path = folder / f"pipeline-host-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            scratch = folder / f".{path.name}-{secrets.token_hex(8)}"
            scratch.touch(mode=0o600)
            scratch.write_text(secrets.token_hex(16))
            try:
                os.link(scratch, path)  # whole, or not there
            finally:
                scratch.unlink()
        return path.read_text()
    except OSError:
        return ""


def _capacity(nbytes: int) -> int:
    """Four sizes an octave: similar tensors share segments, and little is wasted."""
    step = max(SMALLEST, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


_opened: weakref.WeakSet[Owner | _Mapping] = weakref.WeakSet()


def _forked() -> None:
    """In the child. Nothing here waits: another thread may have held any lock as it was forked."""
    for one in list(_opened):
        one.forked()


os.register_at_fork(after_in_child=_forked)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Pages:
    """A part of a file in memory, for as long as arrays over it live.

    By hand, because each of Python's maps takes a file descriptor.
    """

    def __init__(self, descriptor: int, low: int, size: int, protection: int, flags: int) -> None:
        address = _libc.mmap(None, size, protection, flags, descriptor, low)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        weakref.finalize(self, _libc.munmap, address, size).atexit = False
        self.address: int = address
        self.size = size
        self.read_only = not protection & mmap.PROT_WRITE


class _Part:
    """What is at the end of all bases of an array, for numpy leaves out arrays between."""

    def __init__(self, pages: _Pages, at: int, shape: tuple[int, ...], typestr: str = "|u1") -> None:
        self.pages = pages
        self.behind: Any = None
        """What is to live as long."""
        data = (pages.address + at, pages.read_only)
        self.__array_interface__ = {"version": 3, "data": data, "shape": shape, "typestr": typestr}


class _Seen(_Part):
    """A part of a segment, for all to read."""

    def __init__(self, mapping: _Mapping, nbytes: int) -> None:
        super().__init__(mapping.pages, PAGE, (nbytes,))
        self._mapping = mapping  # which is to hear of the array's end

    def apart(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array over this as somebody gets it who may write, but only to a copy of his own."""
        at = array.ctypes.data - self.pages.address
        low = at - at % PAGE
        size, protection = at - low + array.nbytes, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            pages = _Pages(self._mapping.descriptor, low, size, protection, mmap.MAP_PRIVATE)
        except OSError:  # the kernel has no more maps for us
            return array.copy()
        part = _Part(pages, at - low, array.shape, array.dtype.str)
        part.behind = array
        return np.asarray(part)


@dataclass(slots=True, eq=False)
class Segment:
    """An owner's segment. `reference` names it and its generation: "<owner> <number> <generation>"."""

    path: Path
    capacity: int
    pages: _Pages
    map: memoryview
    """[capacity] of its bytes."""
    descriptor: int
    generation: int = 0
    reference: str = ""
    array: weakref.ref[Any] | None = None
    """What `Owner.empty` gave out over it: while that lives, nothing else is written here."""

    @property
    def taken(self) -> bool:
        """Whether its only reader has it, and holds it by a lock as long as it likes."""
        return bool(_TAKEN.unpack_from(self.map, _TAKEN_AT)[0] == self.generation)

    def close(self, *, unlink: bool) -> None:
        os.close(self.descriptor)
        if unlink:
            self.path.unlink(missing_ok=True)


class Owner:
    """One process's segments, used in turn."""

    def __init__(self, deployment: str, quota: int, folder: Path) -> None:
        self.name = secrets.token_hex(8)
        self.nbytes = 0
        """Of all its segments, in use or free."""
        self._quota = quota
        self._count = 0
        self._most = _most()
        self._prefix = folder / f"pipeline-{deployment}-{self.name}"
        self._numbers = itertools.count(1)
        self._free: dict[int, list[tuple[float, Segment]]] = {}
        self._given: dict[int, tuple[int, Segment]] = {}
        """By address of what `empty` gave out: its size, and where it lies."""
        self._mutex = threading.RLock()
        self._lock_path = self._prefix.with_name(f"{self._prefix.name}.lock")
        scratch = folder / f".{self._lock_path.name}"
        self._lock = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        scratch.rename(self._lock_path)  # never there unlocked
        _opened.add(self)

    def forked(self) -> None:
        """Who forked us owns this: its lock is to go with it, though we live on."""
        os.close(self._lock)

    def write(self, parts: Iterable[memoryview], nbytes: int, purpose: dict[str, Any]) -> Segment | None:
        """The bytes in a segment: copied, but for a first part in memory that `empty` gave out.

        None when the quota, the host's shared memory, or the process's file descriptors are used up.
        """
        left, at = list(parts), PAGE
        segment = self._given_out(left[0], nbytes)
        if segment is not None:
            at += len(left.pop(0))
        else:
            segment = self._take(_capacity(nbytes + PAGE))
            if segment is None:
                return None
        for part in left:
            segment.map[at : at + len(part)] = part.cast("B")
            at += len(part)
        segment.generation += 1
        segment.reference = f"{self.name} {segment.path.name.rpartition('-')[2]} {segment.generation}"
        text = json.dumps({**purpose, "reference": segment.reference}).encode()
        _HEADER.pack_into(segment.map, 0, MAGIC, segment.generation, len(text))
        segment.map[_HEADER.size : _HEADER.size + len(text)] = text
        os.utime(segment.descriptor)  # which writing through a mapping does not set
        fcntl.flock(segment.descriptor, fcntl.LOCK_UN)
        return segment

    def empty(self, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """[nbytes] of undefined values in a segment. `write` does not copy them, once; they must not change after that.

        None as above. From any thread.
        """
        segment = self._take(_capacity(nbytes + 2 * PAGE))  # something small may follow
        if segment is None:
            return None
        array = np.asarray(_Part(segment.pages, PAGE, (nbytes,)))
        segment.array = weakref.ref(array)
        with self._mutex:
            self._given[_address(array.data)] = nbytes, segment
        return array

    def _given_out(self, part: memoryview, nbytes: int) -> Segment | None:
        with self._mutex:
            size, segment = self._given.get(_address(part), (-1, None))
            if segment is None or size != len(part) or PAGE + nbytes > segment.capacity:
                return None
            del self._given[_address(part)]
            return segment

    def free(self, segment: Segment, grace: float) -> None:
        """Nobody needs it any more, in `grace` seconds; somebody may still read it."""
        with self._mutex:
            self._free.setdefault(segment.capacity, []).append((time.monotonic() + grace, segment))

    def has_free(self, nbytes: int) -> bool:
        with self._mutex:
            free, now = self._free.get(_capacity(nbytes + PAGE), []), time.monotonic()
            return any(since <= now and _locked(segment) for since, segment in reversed(free))

    def shrink(self, seconds: float) -> None:
        """Give back what has been free for so long."""
        with self._mutex:
            self._take_back()
            for segments in self._free.values():
                for item in [item for item in segments if time.monotonic() - item[0] >= seconds]:
                    if _locked(item[1]):
                        segments.remove(item)
                        self.nbytes -= item[1].capacity
                        self._count -= 1
                        item[1].close(unlink=True)

    def _take_back(self) -> None:
        """What `empty` gave out and nobody wanted to write."""
        for address, (_, segment) in list(self._given.items()):
            if segment.array is not None and segment.array() is None:
                del self._given[address]
                self.free(segment, 0.0)

    def _take(self, capacity: int) -> Segment | None:
        """A free one that nobody reads, the last used first (its pages are warm); or a new one, exclusively locked."""
        with self._mutex:
            self._take_back()
            free = self._free.get(capacity, [])
            now = time.monotonic()
            for index in reversed(range(len(free))):
                if free[index][0] <= now and _locked(free[index][1]):
                    return free.pop(index)[1]
            if not self._has_room(capacity):
                self.shrink(0.0)
            return self._make(capacity) if self._has_room(capacity) else None

    def _has_room(self, capacity: int) -> bool:
        return self.nbytes + capacity <= self._quota and self._count < self._most

    def _make(self, capacity: int) -> Segment | None:
        path = self._prefix.with_name(f"{self._prefix.name}-{next(self._numbers)}")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if _exhausted(error):
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, capacity)  # now, with an error; not at a write, with SIGBUS
            pages = _Pages(descriptor, 0, capacity, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
            # Before Linux 5.14 pages are mapped one by one, in twice the time.
            _libc.madvise(pages.address, capacity, MADV_POPULATE_WRITE)
            segment = Segment(path, capacity, pages, np.asarray(_Part(pages, 0, (capacity,))).data, descriptor)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        self.nbytes += capacity
        self._count += 1
        return segment

    def close(self, used: Iterable[Segment]) -> None:
        """Unlink what is free: who has mapped it keeps it. What is still needed stays until somebody sweeps."""
        given = [segment for _, segment in self._given.values()]
        for segment in [*given, *(segment for _, segment in itertools.chain.from_iterable(self._free.values()))]:
            segment.close(unlink=True)
        left = list(used)
        for segment in left:
            segment.close(unlink=False)
        if not left:
            self._lock_path.unlink(missing_ok=True)
        _opened.discard(self)
        os.close(self._lock)


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, np.uint8).ctypes.data)


def _locked(segment: Segment) -> bool:
    """Whether it can be written: nobody reads it, and what was given out over it is gone."""
    if segment.array is not None:
        if segment.array() is not None:
            return False
        segment.array = None
    return _lock(segment.descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the exclusive lock could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Mapping:
    """A segment as a reader sees it, mapped once and pinned while arrays over it exist."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(self.descriptor).st_size
            self.pages = _Pages(self.descriptor, 0, size, mmap.PROT_READ, mmap.MAP_SHARED)
        except (OSError, ValueError):
            os.close(self.descriptor)
            raise
        self._header = np.asarray(_Part(self.pages, 0, (_HEADER.size,))).data
        self._pins: dict[int, weakref.ref[Any]] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._lock = threading.RLock()
        _opened.add(self)

    def forked(self) -> None:
        """From now on a lock of our own, under the same number: to unlock the shared one would unpin our parent's."""
        self._lock = threading.RLock()
        try:
            own = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # then what we see is pinned while our parent has it
            self._pins.clear()
            return
        if self._pins:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(own, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.dup2(own, self.descriptor, inheritable=False)
        os.close(own)

    def view(self, generation: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes, read-only. Raises Gone."""
        with self._lock:
            if not self._pins:
                try:
                    fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Gone("it is being written again") from None
            magic, found, _ = _HEADER.unpack_from(self._header)
            if magic != MAGIC or found != generation or PAGE + nbytes > self.pages.size:
                if not self._pins:
                    fcntl.flock(self.descriptor, fcntl.LOCK_UN)
                raise Gone(f"it serves generation {found} by now")
            array = np.asarray(_Seen(self, nbytes))
            number = next(self._numbers)
            self._pins[number] = weakref.ref(array, lambda _: self._unpin(number))
            return array

    def take(self, generation: int) -> None:
        os.pwrite(self.descriptor, _TAKEN.pack(generation), _TAKEN_AT)

    def _unpin(self, number: int) -> None:
        with self._lock:
            if self._pins.pop(number, None) is None or self._pins:
                return
            if self._closing:
                self._end()
            else:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close_if_unlinked(self) -> bool:
        """Let go of a file that its owner has unlinked and that nothing here shows any more."""
        return not os.fstat(self.descriptor).st_nlink and self.close_if_unseen()

    def close_if_unseen(self) -> bool:
        with self._lock:
            if self._pins:
                return False
            self.close()
            return True

    def close(self) -> None:
        """Now, or with the last array over it."""
        with self._lock:
            self._closing = True
            if not self._pins:
                self._end()

    def _end(self) -> None:
        _opened.discard(self)
        os.close(self.descriptor)


class Mappings:
    """A process's view of others' segments (and of its own)."""

    def __init__(self, deployment: str, folder: Path) -> None:
        self._prefix = folder / f"pipeline-{deployment}-"
        self._mappings: dict[str, _Mapping] = {}
        self._most = _most()

    def view(self, reference: str, nbytes: int, *, take: bool = False) -> npt.NDArray[np.uint8]:
        """The bytes a reference names, without copying while there are not too many of them; with `take`, nobody else
        will ask for them. Raises Gone, Exhausted."""
        owner, number, generation = reference.split(" ")
        name = f"{owner}-{number}"
        mapping = self._mappings.get(name)
        keep = mapping is not None or self._has_room()
        if mapping is None:
            mapping = self._map(name)
            if keep:
                self._mappings[name] = mapping
        try:
            found = mapping.view(int(generation), nbytes)
            if take:
                mapping.take(int(generation))
            return found if keep else found.copy()
        finally:
            if not keep:
                mapping.close()

    def _has_room(self) -> bool:
        """Nobody looks at some of what is mapped: the longest here goes first."""
        if len(self._mappings) >= self._most:
            for name, mapping in list(self._mappings.items()):
                if mapping.close_if_unseen():
                    del self._mappings[name]
                    break
        return len(self._mappings) < self._most

    def _map(self, name: str) -> _Mapping:
        try:
            return _Mapping(self._find(name))
        except (OSError, ValueError) as error:
            if _exhausted(error):
                raise Exhausted(str(error)) from None
            raise Gone(str(error)) from None

    def _find(self, name: str) -> Path:
        """Of an owner that began before Redis was flushed, or after, the deployment is another; its name is its own."""
        path = self._prefix.with_name(f"{self._prefix.name}{name}")
        return path if path.exists() else next(path.parent.glob(f"pipeline-*-{name}"), path)

    def __bool__(self) -> bool:
        return bool(self._mappings)

    def tidy(self) -> None:
        for name, mapping in list(self._mappings.items()):
            if mapping.close_if_unlinked():
                del self._mappings[name]

    def close(self) -> None:
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()


# -- what the dead have left ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Orphan:
    """A segment whose owner is dead."""

    path: Path
    owner: str
    purpose: dict[str, Any]


def orphans(deployment: str, folder: Path) -> list[Orphan]:
    """Segments of a deployment's dead owners."""
    found = []
    for path, match in _files(folder, deployment):
        if match["number"] and not _alive(folder, match):
            try:
                with path.open("rb") as file:
                    magic, _, length = _HEADER.unpack(file.read(_HEADER.size))
                    purpose = json.loads(file.read(length)) if magic == MAGIC and length < PAGE else {}
            except (OSError, ValueError, struct.error):
                purpose = {}  # killed before it was written
            found.append(Orphan(path, match["owner"], purpose))
    return found


def sweep(paths: Iterable[Path], deployment: str, folder: Path) -> None:
    """Unlink these segments of the dead, lock files without segments, and what another deployment forgot long ago.

    Who has mapped a segment keeps it.
    """
    for path in paths:
        path.unlink(missing_ok=True)
    files = list(_files(folder, None))
    owners = {match["owner"] for _, match in files if match["number"]}
    for path, match in files:
        with contextlib.suppress(OSError):
            if match["deployment"] == deployment:
                needless = not match["number"] and match["owner"] not in owners
            else:
                needless = time.time() - path.stat().st_mtime > FORGOTTEN
            if needless and not _alive(folder, match):
                path.unlink()


def _files(folder: Path, deployment: str | None) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in folder.glob(f"pipeline-{deployment or '*'}-*"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            yield path, match


def _alive(folder: Path, match: re.Match[str]) -> bool:
    try:
        descriptor = os.open(folder / f"pipeline-{match['deployment']}-{match['owner']}.lock", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return True  # another user's
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)

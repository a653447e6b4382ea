"""A watchdog ends the processes of a guardian that can no longer do it: it was killed with SIGKILL, or crashed.

It is a small process that holds the reading end of a pipe. The guardian writes the ids it looks after; when the pipe
closes, for whatever reason, those that are left get SIGTERM (so Valkey saves, workers drain) and after `GRACE` SIGKILL.

Why not Linux's PR_SET_PDEATHSIG: it fires when the *thread* that started the child ends, needs code between fork and
exec, reaches one process rather than its group, and exists on Linux only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import cache

__all__ = ["GRACE", "Watchdog", "watchdog"]

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL, once the guardian is gone."""


class Watchdog:
    """The guardian's side. A target is a process id, or a process group's id negated, as `kill(2)` has it."""

    def __init__(self) -> None:
        self._targets: set[int] = set()
        self._lock = threading.Lock()
        self._process = _launch()

    def watch(self, target: int) -> None:
        with self._lock:
            self._targets.add(target)
            self._tell(f"+{target}\n")

    def forget(self, target: int) -> None:
        """To be called as soon as the target has ended: its id may be given to a stranger."""
        with self._lock:
            self._targets.discard(target)
            self._tell(f"-{target}\n")

    def close(self) -> None:
        """Let go; whatever is still watched is ended. Returns when the watchdog has left."""
        with self._lock:
            _hang_up(self._process)

    def _tell(self, line: str) -> None:
        try:
            _write(self._process, line)
        except OSError:  # someone killed the watchdog: the next one learns everything anew
            _hang_up(self._process)
            self._process = _launch()
            _write(self._process, "".join(f"+{target}\n" for target in self._targets))


@cache
def watchdog() -> Watchdog:
    """The one watchdog of this process, started at first use. It also ends what is left at a normal exit."""
    dog = Watchdog()
    atexit.register(dog.close)
    return dog


def _launch() -> subprocess.Popen[bytes]:
    # By path and without site-packages: it is there in some 15 ms. Its own session keeps Ctrl-C from it.
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)


def _write(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    os.write(process.stdin.fileno(), text.encode())


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _guard(guardian: int) -> None:
    """The watchdog's side. A forked relative may keep the pipe open, so the parent's id is looked at as well."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    targets: set[int] = set()
    rest = b""
    while True:
        if not select.select([0], [], [], 1.0)[0]:
            if os.getppid() != guardian:
                break
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            (targets.add if line[:1] == b"+" else targets.discard)(int(line[1:]))
    _end(targets)


def _end(targets: set[int]) -> None:
    deadline = time.monotonic() + GRACE
    left = {target for target in targets if _signal(target, signal.SIGTERM)}
    while left and time.monotonic() < deadline:
        time.sleep(0.02)  # strangers' children cannot be waited for, only asked after
        left = {target for target in left if _signal(target, 0)}
    for target in left:
        _signal(target, signal.SIGKILL)


def _signal(target: int, number: int) -> bool:
    """Whether the target was there to receive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(target, number)
        return True
    return False


if __name__ == "__main__":
    _guard(int(sys.argv[1]))

"""What tests of real processes share."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from typing import IO

import psutil

__all__ = ["ended", "line_with"]


def ended(*processes: psutil.Process, within: float = 5.0) -> bool:
    """Whether all of them end in time. A zombie has ended: to reap orphans is init's affair, and it may be slow."""
    deadline = time.monotonic() + within
    while any(_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # they are not our children: nothing to wait on
    return True


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def line_with(text: str, process: subprocess.Popen[str]) -> str:
    """Wait for a line of its output; fails with everything that was said instead."""
    output: IO[str] | None = process.stdout
    assert output is not None
    said = []
    for line in output:
        said.append(line)
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not said, but:\n{''.join(said)}")

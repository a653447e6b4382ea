"""Trains the digit model with several worker processes whose gradients meet at the aggregator, run after run.

    python -m publishers.training --workers 2
    python -m publishers.training --workers 2 --run mine --runs 1 --rounds 300 --rate 0
    python -m publishers.training --workers 4 --rank 3 --run mine      one worker by hand, on another machine perhaps

Needs `pipeline serve subscribers.aggregation:app`. A worker that dies is started again and catches up.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, get_args

from pipeline.catalog import Mode
from pipeline.catalog.compression import check_codec
from pipeline.errors import ConfigurationError

from ..command import fail, positive, start_logging
from . import launcher

__all__ = ["main"]

logger = logging.getLogger("publishers.training")

BACKOFF = 1.0
STOP_SECONDS = 2.0
"""Less than `pipeline up` gives all of this: a worker that hangs is not to take its launcher along."""
HOPELESS = 2
"""Exit status of a worker that would fail again: its message says why."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = vars(_arguments().parse_args(arguments))
    workers, rank = options["workers"], options.pop("rank")
    options["run"] = options["run"] or time.strftime("digits-%H%M%S")
    if options["quorum"] is None:
        options["quorum"] = max(1, workers - 1)
    if options["quorum"] > workers:
        return fail(f"--quorum {options['quorum']} of {workers} workers cannot be reached")
    if rank is not None:
        return (
            fail(f"--rank is from 0 to {workers - 1}") if not 0 <= rank < workers else _work(options | {"rank": rank})
        )
    try:
        start_logging()
    except ConfigurationError as error:
        return fail(error)
    with launcher.listening(wanted=options["runs"] == 0):  # who trains for ever also starts what is asked for
        return _Workers([options | {"rank": rank} for rank in range(workers)]).run()


class _Workers:
    """One process a rank. This one imports no torch; it only looks after them."""

    def __init__(self, plans: list[dict[str, Any]]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._plans = plans
        self._processes: dict[int, SpawnProcess] = {}
        self._stopping = False

    def run(self) -> int:
        """Until all have done their runs, one is hopeless, or a signal comes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        for rank in range(len(self._plans)):
            self._start(rank)
        status = 0
        while self._processes and not self._stopping:
            wait([process.sentinel for process in self._processes.values()], timeout=0.2)
            for rank, process in list(self._processes.items()):
                if process.exitcode is None:
                    continue
                del self._processes[rank]
                if process.exitcode == HOPELESS:
                    status, self._stopping = HOPELESS, True
                elif process.exitcode != 0 and not self._stopping:
                    logger.warning("worker %d died (%s) and is started again", rank, _how(process.exitcode))
                    time.sleep(BACKOFF)
                    self._start(rank)
        self._end()
        return status

    def _start(self, rank: int) -> None:
        process = self._context.Process(target=_work_as_child, args=(self._plans[rank],), name=f"worker-{rank}")
        # Ctrl-C is for this one, which ends the workers; they would die of it, loudly, while they import torch.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.start()
        signal.signal(signal.SIGINT, before)
        self._processes[rank] = process

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _end(self) -> None:
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"status {status}"


def _work_as_child(options: dict[str, Any]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    status = _work(options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is closed; to take torch apart module by module costs a busy machine seconds


def _work(options: dict[str, Any]) -> int:
    """Be one worker. Prints the state after each run, so that workers can be compared."""
    from .demo import Plan, work

    plan = Plan(**options)

    def report(name: str, state: str) -> None:
        print(f"run {name} rank {plan.rank} state {state}", flush=True)

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        start_logging()
        work(plan, report=report)
    except (ConfigurationError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 0
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _count(text: str) -> int:
    """For argparse: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _codec(text: str) -> str:
    """For argparse: the name of a compression."""
    try:
        return check_codec(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m publishers.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=_count, default=2, metavar="N", help="processes, each with its shard (default: %(default)s)")
    add("--rank", type=int, metavar="R", help="be only this worker, in the foreground (default: start all)")
    add(
        "--run",
        metavar="NAME",
        help="runs are NAME.1, NAME.2, …; a name in use is joined (default: by the time of day)",
    )
    add("--runs", type=int, default=0, metavar="N", help="end after so many (default: go on for ever)")
    add("--rounds", type=_count, default=600, metavar="N", help="of each run (default: %(default)s)")
    add("--rate", type=float, default=8.0, metavar="N", help="most rounds a second; 0: no limit (default: %(default)s)")
    add("--batch", type=_count, default=64, metavar="N", help="samples a worker and round (default: %(default)s)")
    add("--learning-rate", type=positive, default=6e-3, metavar="X", help="of Adam (default: %(default)s)")
    add("--seed", type=int, default=0, help="of parameters and batches; run k adds k (default: %(default)s)")
    add("--quorum", type=_count, metavar="N", help="workers a round needs after its deadline (default: all but one)")
    add("--deadline", type=positive, default=2.0, metavar="S", help=(
        "seconds a round waits for all (default: %(default)s)"
    ))  # fmt: skip
    add("--mode", choices=get_args(Mode), default="sync", help="how they keep together (default: %(default)s)")
    add("--compress", type=_codec, default="none", metavar="NAME", help=(
        "none, bf16, fp16, int8, topk:SHARE or powersgd:RANK (default: %(default)s)"
    ))  # fmt: skip
    add("--publish-every", type=_count, default=10, metavar="N", help=(
        "rounds between weights for inference, which are published if no worse than the last (default: %(default)s)"
    ))  # fmt: skip
    return parser

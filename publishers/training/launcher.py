"""Training runs that are asked for by event: `catalog.StartRun` → processes of `python -m publishers.training`.

An event is held by lease for as long as its run lasts. A launcher that stops or dies leaves it to the next one, which
takes the run up again: workers join what rounds there are of a run of their name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

from pipeline import Message, Pipeline, Reject, Retry, RetryPolicy, catalog
from pipeline.catalog import RunStatus, StartRun
from pipeline.watchdog import watchdog

__all__ = ["listening", "make"]

logger = logging.getLogger("publishers.training")

MOST_RUNS = 2
"""At the same time by one launcher; more wait their turn."""
LEASE = 10.0
TAKEN_UP = 100
"""How often a run is taken up again before it is given up."""
STOP_SECONDS = 6.0
REASON = 2000
REASON_LINES = 5
"""Of what a run said last: at most so many characters and lines."""


def make(url: str | None = None) -> Pipeline:
    """The app that launches."""
    app = Pipeline("launcher", url)
    launcher = _Launcher(app)
    policy = RetryPolicy(attempts=TAKEN_UP)
    app.subscriber(
        catalog.run_starts, group="launcher", publishes=catalog.run_statuses, concurrency=MOST_RUNS, lease=LEASE,
        retry=policy,
    )(launcher.launch)  # fmt: skip
    app.on_stop(launcher.stop)
    return app


@contextlib.contextmanager
def listening(wanted: bool = True, url: str | None = None) -> Iterator[None]:
    """Launch runs from a thread, beside what the caller does in the block."""
    if not wanted:
        yield
        return
    app, loop, stop = make(url), asyncio.new_event_loop(), asyncio.Event()
    serving = loop.create_task(app.serve(stop))

    def serve() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)

    def end() -> None:
        stop.set()
        if not app.ready.is_set():  # still waiting for Redis
            serving.cancel()

    thread = threading.Thread(target=serve, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # it failed, and said so
            loop.call_soon_threadsafe(end)
        thread.join()
        loop.close()


class _Launcher:
    def __init__(self, app: Pipeline) -> None:
        self._app = app
        self._stopping = asyncio.Event()

    async def stop(self) -> None:
        self._stopping.set()

    async def launch(self, message: Message[StartRun]) -> RunStatus:
        """See a run through. What it says on stderr is passed on, and its end is why it failed, if it did."""
        plan = message.event
        process = await asyncio.create_subprocess_exec(
            *command(plan), stderr=asyncio.subprocess.PIPE, env={**os.environ, "PIPELINE_REDIS_URL": self._app.url}
        )
        watchdog().watch(process.pid)
        saying = asyncio.create_task(_pass_on(process), name=f"stderr of {plan.run}")
        try:
            await self._tell(message, "started")
            await self._until_it_ends(process)
        finally:
            await _end(process)
            watchdog().forget(process.pid)
            said = await saying
        if process.returncode == 0:
            return self._status(message, "finished")
        if self._stopping.is_set():
            await self._tell(message, "stopped")
            raise Retry("its launcher was stopped", delay=0.0)
        reason = said or f"it ended with status {process.returncode}"
        await self._tell(message, "failed", reason)
        raise Reject(f"run {plan.run!r}: {reason}")

    async def _until_it_ends(self, process: asyncio.subprocess.Process) -> None:
        waits = [asyncio.create_task(process.wait()), asyncio.create_task(self._stopping.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _tell(self, message: Message[StartRun], state: str, reason: str = "") -> None:
        await self._app.publish(catalog.run_statuses, self._status(message, state, reason))

    def _status(self, message: Message[StartRun], state: str, reason: str = "") -> RunStatus:
        return RunStatus.model_validate(
            {
                "run": message.event.run,
                "request": message.id,
                "state": state,
                "reason": reason,
                "launcher": self._app.consumer,
            }
        )


def command(plan: StartRun) -> list[str]:
    """The command line of a run."""
    options = {
        "run": plan.run, "runs": 1, "workers": plan.workers, "rounds": plan.rounds, "batch": plan.batch,
        "learning-rate": plan.learning_rate, "rate": plan.rate or 0, "seed": plan.seed, "mode": plan.mode,
        "compress": plan.compress,
    }  # fmt: skip
    return [sys.executable, "-m", "publishers.training", *(f"--{name}={value}" for name, value in options.items())]


async def _pass_on(process: asyncio.subprocess.Process) -> str:
    """Its stderr to ours; returns the last few lines."""
    assert process.stderr is not None
    tail = ""
    while chunk := await process.stderr.read(65536):
        text = chunk.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        tail = (tail + text)[-REASON:]
    return "\n".join(tail.strip().splitlines()[-REASON_LINES:])


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

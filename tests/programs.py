"""What tests of publishers, subscribers and examples share: programs as real processes, apps in the test's loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipeline import Channel, Message, Pipeline

from .apps import serving

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


@contextmanager
def program(*command: str, url: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`python COMMAND…`, ended with the block. Its output, errors included, is in `stdout`."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=_environment(url, environment),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def finished(*command: str, url: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND…` run to its end."""
    return subprocess.run(
        [sys.executable, *command],
        env=_environment(url, environment),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def app_program(module: str) -> tuple[str, str]:
    """The arguments with which python serves `module`'s app and says `ready`."""
    code = f"import asyncio, {module} as m; app = m.app\n" + (
        "async def tell():\n    await app.ready.wait(); print('ready', flush=True)\n"
        "app.on_start(lambda: asyncio.sleep(0, app.spawn(tell())))\napp.run()\n"
    )
    return "-c", code


@asynccontextmanager
async def served(app: Pipeline, url: str) -> AsyncIterator[None]:
    """A module's app, served at `url` in the test's own loop."""
    app.url = url
    async with serving(app):
        yield


async def collect(app: Pipeline, channel: Channel[T], count: int, seconds: float = 20.0) -> list[Message[T]]:
    """The first `count` messages that the channel ever had."""
    messages: list[Message[T]] = []
    async with asyncio.timeout(seconds), app.watch(channel, since=3600) as stream:
        if count:
            async for message in stream:
                messages.append(message)
                if len(messages) == count:
                    break
    return messages


def events(messages: list[Message[Any]]) -> list[Any]:
    return [message.event for message in messages]


def _environment(url: str, more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PIPELINE_REDIS_URL": url, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error", **more}

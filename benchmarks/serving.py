"""Predictions a second and their latency: closed-loop clients over HTTP, against other servers of the same model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from pipeline.server import Server

from .report import Figure
from .serving_models import INPUTS, export

__all__ = ["run"]

CLIENTS = (1, 16, 64)
PEERS = ("mosec", "litserve", "fastapi", "article")


def run(repeats: int, seconds: float) -> list[Figure]:
    """Each server is started, warmed, measured with every number of clients, and ended, in turn."""
    kinds = ["ours", *(kind for kind in PEERS if importlib.util.find_spec(kind) or kind == "article")]
    figures: dict[tuple[str, str, int, str], Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        specifications = {name: export(name, Path(folder)) for name in INPUTS}
        for _ in range(repeats):
            for model, specification in specifications.items():
                for kind in kinds:
                    with Server() as server, serving(kind, model, server.url, specification) as (port, path):
                        for clients in CLIENTS:
                            measured = load(port, path, model, clients, seconds)
                            for what, value in measured.items():
                                figure = figures.setdefault(
                                    (model, kind, clients, what),
                                    Figure(
                                        "serving",
                                        f"{model}, {clients} clients, {kind}",
                                        f"{what} {model} {clients}",
                                        peer=kind != "ours",
                                    ),
                                )
                                figure.values.append(value)
    return sorted(figures.values(), key=lambda figure: (figure.unit, figure.peer))


@contextlib.contextmanager
def serving(kind: str, model: str, url: str, specification: Path) -> Iterator[tuple[int, str]]:
    """The server, ready: its port, and the path to ask."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    environment = {
        **os.environ,
        "PIPELINE_REDIS_URL": url,
        "GATEWAY_PORT": str(port),
        "PIPELINE_MODELS": str(specification),
        "OMP_NUM_THREADS": "1",
    }
    path = "/predict"
    commands = [[sys.executable, "-m", "benchmarks.serving_peers", kind, model, str(port), url]]
    if kind == "ours":
        path = f"/models/{model}/predict"
        commands = [
            [sys.executable, "-m", "pipeline", "serve", "subscribers.serving:app"],
            [sys.executable, "-m", "publishers.gateway"],
        ]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        for command in commands
    ]
    try:
        wait(port, path, model)
        yield port, path
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with redis.Redis.from_url(url) as client:
            client.flushall()


def wait(port: int, path: str, model: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", INPUTS[model], {"content-type": "application/octet-stream"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                assert len(json.load(response)["predictions"]) == 5
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def load(port: int, path: str, model: str, clients: int, seconds: float) -> dict[str, float]:
    """What a process of its own measured."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", str(port), path, model, str(clients), str(seconds)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=120,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


# -- the clients ---------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """Asks again as soon as it has its answer."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self._request = request
        self._latencies = latencies
        self._buffer = b""
        self._sent = 0.0
        self._transport: Any = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopping = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        at = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.ended.set_exception(RuntimeError(f"{head!r} {body!r}"))
            return
        self._latencies.append(time.perf_counter() - self._sent)
        self._buffer = b""
        if self.stopping:
            self._transport.close()
            self.ended.set_result(None)
        else:
            self._ask()


async def measure(port: int, path: str, model: str, clients: int, seconds: float) -> dict[str, float]:
    body = INPUTS[model]
    request = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/octet-stream\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    makers = [loop.create_connection(lambda: Client(request, latencies), "127.0.0.1", port) for _ in range(clients)]
    made = [client for _, client in await asyncio.gather(*makers)]
    await asyncio.sleep(0.5)
    latencies.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    count, elapsed, seen = len(latencies), time.perf_counter() - began, sorted(latencies)
    for client in made:
        client.stopping = True
    await asyncio.gather(*(client.ended for client in made))
    if not seen:
        seen = sorted(latencies)
    return {
        "req/s": count / elapsed,
        "ms p50": 1000 * seen[len(seen) // 2],
        "ms p99": 1000 * seen[int(len(seen) * 0.99)],
    }


if __name__ == "__main__":
    port, path, model, clients, seconds = sys.argv[1:6]
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    print(json.dumps(asyncio.run(measure(int(port), path, model, int(clients), float(seconds)))))

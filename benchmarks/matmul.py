"""Matrix products: a job's round trip against torch itself; workers that share one; and one that no worker could hold.

As a program it is one of the workers: `python -m benchmarks.matmul work URL`, with the settings of its environment.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: who has computed leaves the cores to the other one

import asyncio
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import Pipeline, catalog
from pipeline.catalog import MatmulJob, MatmulResult, TensorFile
from pipeline.server import Server
from pipeline.settings import settings

from . import matmul_ladder
from .report import Figure

__all__ = ["run"]

SIZES = (256, 512, 1024, 2048, 4096)
REPEATS = 7
THREADS = 2
LIMIT = 600 << 20
"""Bytes that are a worker's own (RLIMIT_DATA: heap, stacks, private mappings) in the great product, enforced."""
HELD = 200 << 20
"""Bytes of matrices it is told to hold; torch itself takes 250 MB."""
GREAT = (8192, 32768, 8192)
"""m, k, n in float32: 2.15 GB of operands."""
ROWS = 1024


def run(repeats: int, seconds: float) -> list[Figure]:
    """Medians of 7, whatever `repeats` says, and the great product once."""
    torch.set_num_threads(THREADS)
    return [*_round_trips(), *_blocks(), *_great(), *matmul_ladder.run(repeats, seconds)]


# -- a round trip --------------------------------------------------------------------------------------------------


def _round_trips() -> list[Figure]:
    """Operands in shared memory; the product too, with the answer or in a file. Direct: of the same mapped operands."""
    figures = []
    with _folder("/dev/shm") as folder, _workers(folder, 1, THREADS) as url:
        for n in SIZES:
            _matrices(folder, n, n, n)
            a, b = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in "ab")
            note = f"{THREADS} threads each"
            ours = Figure("matmul", f"job of {n}³, request to answer", f"ms, {n}³", note=note)
            filed = Figure("matmul", f"job of {n}³, product in a file", f"ms, {n}³", note=note)
            direct = Figure("matmul", f"torch.matmul of {n}³", f"ms, {n}³", peer=True, note=note)

            with Pipeline("bench", url).blocking() as pipe:
                _interleaved(
                    folder,
                    (ours, lambda pipe=pipe: _ask(pipe, "event")),
                    (filed, lambda pipe=pipe: _ask(pipe, "file")),
                    (direct, lambda a=a, b=b: torch.matmul(a, b)),
                )
            overhead = Figure("matmul", f"overhead of a job of {n}³", "%", note=note)
            overhead.values = [100 * (ours.median / direct.median - 1)]
            figures += [ours, filed, direct, overhead]
    return figures


def _interleaved(folder: Path, *pairs: tuple[Figure, Callable[[], Any]]) -> None:
    """Milliseconds until the product is there; it is thrown away outside of them."""
    for turn in range(REPEATS + 2):
        for figure, work in pairs:
            began = time.perf_counter()
            product = work()
            if turn >= 2:  # the first two find nothing warm
                figure.values.append(1000 * (time.perf_counter() - began))
            if isinstance(product, MatmulResult):
                assert product.recomputed == 0
                if product.file:
                    (folder / product.file).unlink()
            del product


def _ask(pipe: Any, result: str, **options: Any) -> MatmulResult:
    job = MatmulJob(a=TensorFile(file="a.npy"), b=TensorFile(file="b.npy"), result=result, **options)
    found = pipe.request(catalog.matmul_jobs, job, timeout=600)
    assert isinstance(found, MatmulResult)
    return found


# -- workers that share --------------------------------------------------------------------------------------------


def _blocks() -> list[Figure]:
    """Two workers of one thread against one process of two, 4096³."""
    n = SIZES[-1]
    note = "2 workers of 1 thread; 1 process of 2 threads"
    ours = Figure("matmul", f"{n}³ in tiles, 2 workers", "GFLOP/s", note=note)
    direct = Figure("matmul", f"{n}³, torch.matmul", "GFLOP/s", peer=True, note=note)
    with _folder("/dev/shm") as folder, _workers(folder, 2, 1) as url:
        _matrices(folder, n, n, n)
        a, b = (torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in "ab")
        with Pipeline("bench", url).blocking() as pipe:
            times = (Figure("", "", ""), Figure("", "", ""))
            _interleaved(
                folder,
                (times[0], lambda: _ask(pipe, "file", blocks="always")),
                (times[1], lambda: torch.matmul(a, b)),
            )
    for figure, spent in zip((ours, direct), times, strict=True):
        figure.values = [2 * n**3 / (ms / 1000) / 1e9 for ms in spent.values]
    return [ours, direct]


# -- a product that no worker could hold ---------------------------------------------------------------------------


def _great() -> list[Figure]:
    m, k, n = GREAT
    gigabytes = 4 * (m * k + k * n) / 1e9
    taken = Figure("matmul", f"{gigabytes:.2f} GB of operands, 2 workers of {LIMIT >> 20} MiB each", "s")
    most = Figure("matmul", "most memory resident in one of those workers", "MB")
    environment = {"BENCH_LIMIT": str(LIMIT), "PIPELINE_MATMUL_MEMORY": str(HELD)}
    with _folder(None) as folder, _workers(folder, 2, 1, **environment) as url:
        _matrices(folder, m, k, n)
        with Pipeline("bench", url).blocking() as pipe:
            began = time.perf_counter()
            result = _ask(pipe, "file")
            taken.values.append(time.perf_counter() - began)
        taken.note = (
            f"{result.tiles} tiles, {result.gflops:.0f} GFLOP/s, RLIMIT_DATA enforced; {_verify(folder, result)}"
        )
        most.values = [max(json.loads(path.read_text()) for path in _ended(folder))]
    return [taken, most]


def _verify(folder: Path, result: MatmulResult) -> str:
    """C · x against A · (B · x) in float64, of three random x (Freivalds, 1977). Raises AssertionError."""
    a, b, c = (np.load(folder / name, mmap_mode="r") for name in ("a.npy", "b.npy", result.file))
    x = np.random.default_rng(7).standard_normal((b.shape[1], 3))
    expected, found = _times(a, _times(b, x)), _times(c, x)
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert worst < 1e-4, f"the product is wrong: {worst}"
    return f"product checked, relative error {worst:.1e}"


def _times(matrix: Any, x: Any) -> Any:
    rows = range(0, len(matrix), ROWS)
    return np.concatenate([matrix[start : start + ROWS].astype(np.float64) @ x for start in rows])


# -- what they share -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pipeline-benchmarks-", dir=parent))
    os.environ["PIPELINE_MATMUL_DIR"], os.environ["PIPELINE_DATA_DIR"] = str(folder), str(folder / "data")
    settings.cache_clear()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _matrices(folder: Path, m: int, k: int, n: int) -> None:
    """A and B of normal float32 elements, written a thousand rows at a time."""
    random = np.random.default_rng(m)
    for name, rows, columns in (("a", m, k), ("b", k, n)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (rows, columns))
        for start in range(0, rows, ROWS):
            part = array[start : start + ROWS]
            part[:] = random.standard_normal(part.shape, np.float32)


@contextlib.contextmanager
def _workers(folder: Path, count: int, threads: int, **more: str) -> Iterator[str]:
    with Server() as server:
        environment = {**os.environ, "PIPELINE_MATMUL_THREADS": str(threads), **more}
        command = [sys.executable, "-m", "benchmarks.matmul", "work", server.url]
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield server.url
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.communicate(timeout=60)


def _ended(folder: Path) -> list[Path]:
    """Workers say now and then what they take."""
    return list(folder.glob("resident-*.json"))


def work(url: str) -> None:
    """A matmul worker; with BENCH_LIMIT it may not have more data than so many bytes, and notes what it has."""
    limit = int(os.environ.get("BENCH_LIMIT", "0"))
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    from subscribers import matmul

    app = matmul.make(settings(), url)

    async def tell() -> None:
        await app.ready.wait()
        print("ready", flush=True)
        note = settings().matmul_folder / f"resident-{os.getpid()}.json"
        while limit:
            note.with_suffix(".new").write_text(
                json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
            )
            note.with_suffix(".new").replace(note)
            await asyncio.sleep(0.5)

    @app.on_start
    async def start() -> None:
        app.spawn(tell())

    app.run()


if __name__ == "__main__":
    work(sys.argv[2])

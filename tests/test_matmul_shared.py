"""Products that worker processes share: killed workers, the command line, jobs from scripts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save_file

from pipeline import Pipeline, RequestFailed, Tensor, catalog
from pipeline.catalog import MatmulResult
from pipeline.settings import settings
from publishers.jobs import multiply

from .processes import line_with
from .programs import ROOT, app_program, program

LEASE = "1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers note how fast this machine is: the first one measures, the others know."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def folder(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What workers and this process share."""
    monkeypatch.setenv("PIPELINE_MATMUL_DIR", str(tmp_path / "shared"))
    monkeypatch.setenv("PIPELINE_DATA_DIR", str(data))
    monkeypatch.setenv("PIPELINE_MATMUL_LEASE", LEASE)
    settings.cache_clear()
    yield tmp_path / "shared"
    settings.cache_clear()


@contextlib.contextmanager
def workers(url: str, count: int = 1) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Matmul workers by process id, ready."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(program(*app_program("subscribers.matmul"), url=url)) for _ in range(count)]
        for process in started:
            line_with("ready", process)
        yield {str(process.pid): process for process in started}


def matrix(*shape: int) -> Any:
    """Small whole numbers, whose products float32 holds exactly."""
    return np.random.default_rng(sum(shape)).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("victim", ["the coordinator", "another"])
async def test_a_killed_worker_costs_no_tile_more_than_one_repetition(
    valkey_url: str, folder: Path, tmp_path: Path, victim: str
) -> None:
    a, b = matrix(3000, 3000), matrix(3000, 3001)
    for name, array in (("a", a), ("b", b)):
        np.save(tmp_path / f"{name}.npy", array)
    seen: list[catalog.TileProgress] = []
    with workers(valkey_url, 2) as processes, redis.Redis.from_url(valkey_url) as client:
        async with Pipeline("t", valkey_url) as app:
            asking = asyncio.create_task(
                multiply(
                    app, tmp_path / "a.npy", tmp_path / "b.npy", output=tmp_path / "c.npy", blocks="always",
                    progress=seen.append, timeout=60,
                )
            )  # fmt: skip
            while len({tile.worker for tile in seen}) < 2:
                await asyncio.sleep(0.001)
                assert not asking.done(), "over before both had a tile"
            pending: Any = client.xpending("pipeline:{matmul.jobs}:s", "matmul")
            coordinator = _pid(pending["consumers"][0]["name"].decode())
            [other] = processes.keys() - {coordinator}
            dead = coordinator if victim == "the coordinator" else other
            processes[dead].kill()
            assert not asking.done()
            result = await asking
    assert np.array_equal(np.load(tmp_path / "c.npy"), (torch.from_numpy(a) @ torch.from_numpy(b)).numpy())
    assert result.tiles == 16
    assert result.recomputed <= 1, "a worker has one tile in its hands, so its death repeats at most that one"
    assert {_pid(tile.worker) for tile in seen} == set(processes)
    assert all(1 <= tile.done <= tile.total == result.tiles for tile in seen)
    assert list((folder / "jobs").iterdir()) == []


def _pid(consumer: str) -> str:
    """Of HOST-PID-SOURCE."""
    return consumer.rsplit("-", 2)[1]


async def test_a_script_multiplies_arrays_and_files(valkey_url: str, folder: Path, tmp_path: Path) -> None:
    a, b = matrix(30, 40), matrix(40, 50)
    np.save(tmp_path / "a.npy", a)
    save_file({"b": torch.from_numpy(b), "half": torch.from_numpy(b).bfloat16()}, tmp_path / "w.safetensors")
    with workers(valkey_url):
        async with Pipeline("t", valkey_url) as app:
            result = await multiply(app, a, (tmp_path / "w.safetensors", "b"), result="event")
            assert result.product == Tensor(a @ b)
            await multiply(app, tmp_path / "a.npy", b, a @ b, beta=-1.0, output=tmp_path / "zero.npy")
            assert not np.load(tmp_path / "zero.npy").any()
            half = (tmp_path / "w.safetensors", "half")
            with pytest.raises(ValueError, match="so it stays at"):
                await multiply(app, torch.from_numpy(a).bfloat16(), half, output=tmp_path / "half.npy")
            with pytest.raises(ValueError, match="expected a file that ends in"):
                await multiply(app, tmp_path / "missing.npy", b)
            with pytest.raises(RequestFailed, match="expected"):
                await multiply(app, a, a)
    assert list((folder / "staged").iterdir()) == []


# -- the command line ----------------------------------------------------------------------------------------------


def command(url: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "--url", url, "matmul", *arguments]


def test_the_command_line_shows_progress_and_puts_the_product_where_it_was_asked_for(
    valkey_url: str, folder: Path, tmp_path: Path
) -> None:
    a, b = matrix(600, 700), matrix(500, 700)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    files = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "-o", str(tmp_path / "c.npy"), "--transpose-b"]
    with workers(valkey_url):
        screen, terminal = pty.openpty()
        with os.fdopen(screen, "rb", buffering=0) as reader:
            done = subprocess.run(
                command(valkey_url, *files, "--alpha", "2", "--blocks", "always"),
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60,
            )  # fmt: skip
            os.close(terminal)
            shown = reader.read(65536).decode()
        assert (done.returncode, "100%" in shown) == (0, True), shown
        assert "float32 [600, 500] over k = 700: " in done.stdout
        assert "blas on cpu, 6 tiles" in done.stdout
        assert np.array_equal(np.load(tmp_path / "c.npy"), 2 * (a @ b.T))
        plain = subprocess.run(
            command(valkey_url, *files, "--json"), cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        found = MatmulResult.model_validate_json(plain.stdout)
        assert (plain.stderr, found.tiles, json.loads(plain.stdout)["m"]) == ("", 1, 600)
        wrong = subprocess.run(command(valkey_url, *files[:2]), cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert wrong.returncode == 1
        assert "expected [..., m, k] and [..., k, n]" in wrong.stderr
    missing = subprocess.run(command(valkey_url, "no.npy", files[1]), cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode == 2
    assert "there is no file 'no.npy'" in missing.stderr

"""Matmul jobs: right products wherever operands and results lie, honest figures, and jobs that cannot be."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import Pipeline, Reject, RequestFailed, Retry, Tensor, catalog
from pipeline.catalog import MatmulJob, MatmulResult, ProductOf, SystolicCycle, TensorFile
from pipeline.settings import Settings
from subscribers import matmul
from subscribers.kernels import DTYPES, result_dtype
from subscribers.matmul.files import Folder, open_tensor, save
from subscribers.matmul.worker import Worker

from .apps import serving
from .programs import collect

HAS_CUDA = torch.cuda.is_available()


def numbers(*shape: int, dtype: str = "float32") -> torch.Tensor:
    """Small whole numbers: their products are exact in every dtype."""
    values = np.random.default_rng(sum(shape)).integers(-3, 4, shape)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    name = str(a.dtype).removeprefix("torch.")
    return (a.double() @ b.double()).to(getattr(torch, result_dtype(name)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def options(folder: Path, measured: Path) -> Settings:
    """A worker that holds one MiB at most: products above it are computed in tiles."""
    return Settings(matmul_dir=folder, matmul_memory=1 << 20)


@pytest.fixture
async def app(valkey_url: str, options: Settings) -> AsyncIterator[Pipeline]:
    async with serving(matmul.make(options, valkey_url)), Pipeline("t", valkey_url) as app:
        yield app


async def ask(app: Pipeline, a: Any, b: Any, c: Any = None, **more: Any) -> MatmulResult:
    operands = {name: x if isinstance(x, (TensorFile, ProductOf)) else Tensor(x) for name, x in (("a", a), ("b", b))}
    if c is not None:
        operands["c"] = Tensor(c)
    result = await app.request(catalog.matmul_jobs, MatmulJob(**operands, **more), timeout=30)
    assert isinstance(result, MatmulResult)
    return result


def product(result: MatmulResult, folder: Path) -> torch.Tensor:
    return open_tensor(folder / result.file).tensor if result.file else torch.as_tensor(result.product)


# -- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["never", "always"])
@pytest.mark.parametrize("result", ["event", "file"])
async def test_a_product_is_right_in_every_dtype_and_awkward_shape(
    app: Pipeline, folder: Path, blocks: Any, result: Any
) -> None:
    for dtype in DTYPES:
        for m, k, n in ((1, 1, 1), (17, 31, 5), (300, 70, 520), (3, 0, 2), (0, 4, 2)):
            a, b = numbers(m, k, dtype=dtype), numbers(k, n, dtype=dtype)
            found = await ask(app, a, b, result=result, blocks=blocks)
            assert torch.equal(product(found, folder), exact(a, b)), (dtype, m, k, n)
            assert product(found, folder).dtype == exact(a, b).dtype
            assert (found.m, found.k, found.n, found.dtype, found.batch) == (m, k, n, dtype, [])
            assert (found.product is None) == (result == "file")


@pytest.mark.parametrize("blocks", ["never", "always"])
async def test_transposes_batches_alpha_and_beta(app: Pipeline, folder: Path, blocks: Any) -> None:
    a, b, c = numbers(2, 1, 40, 30), numbers(3, 50, 40), numbers(50)
    found = await ask(
        app, a, b, c, alpha=2.0, beta=-3.0, transpose_a=True, transpose_b=True, result="event", blocks=blocks
    )
    assert torch.equal(product(found, folder), 2 * (a.mT @ b.mT) - 3 * c)
    assert (found.batch, found.m, found.k, found.n) == ([2, 3], 30, 40, 50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
async def test_where_c_has_few_tiles_k_is_split_and_partial_products_are_added_up_once(
    app: Pipeline, folder: Path, dtype: str
) -> None:
    a, b = numbers(130, 20_000, dtype=dtype), numbers(20_000, 60, dtype=dtype)
    c = numbers(130, 60, dtype=result_dtype(dtype))
    found = await ask(app, a, b, c, alpha=2, beta=1, result="file", blocks="always")
    wide = 2 * (a.double() @ b.double()) + c.double()
    assert torch.equal(product(found, folder), wide.to(c.dtype))
    assert (found.tiles, found.recomputed) == (8, 0)


async def test_operands_are_files_and_earlier_products(app: Pipeline, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    a, b = numbers(30, 40), numbers(40, 20)
    np.save(folder / "a.npy", a.numpy())
    np.save(folder / "fortran.npy", np.asfortranarray(a.numpy()))
    save_file({"b": b, "half": b.bfloat16()}, folder / "w.safetensors")
    weights = TensorFile(file="w.safetensors", name="b")
    for blocks in ("never", "always"):
        first = await ask(app, TensorFile(file="a.npy"), weights, result="file", blocks=blocks)
        assert torch.equal(product(first, folder), a @ b)
        fortran = await ask(app, TensorFile(file="fortran.npy"), weights, result="event", blocks=blocks)
        assert torch.equal(product(fortran, folder), a @ b)
        chained = await ask(app, ProductOf(job=first.job), numbers(20, 7), result="event", blocks=blocks)
        assert torch.equal(product(chained, folder), a @ b @ numbers(20, 7))
    half = await ask(
        app, a.bfloat16(), TensorFile(file=str(folder / "w.safetensors"), name="half"), result="file", blocks="always"
    )
    assert torch.equal(load_file(folder / half.file)["product"], exact(a.bfloat16(), b.bfloat16()))


async def test_a_job_too_large_for_memory_is_tiled_and_leaves_nothing_behind(app: Pipeline, folder: Path) -> None:
    a, b = numbers(700, 900), numbers(900, 800)
    async with app.watch(catalog.matmul_progress) as stream:
        found = await ask(app, a, b, result="file")
        seen = [message.event async for message in _some(stream, found.tiles)]
    assert torch.equal(product(found, folder), a @ b)
    assert found.tiles == 12  # 256 × 256, the smallest there are
    assert [tile.done for tile in seen] == list(range(1, 13))
    assert {(tile.job, tile.total, tile.m, tile.k, tile.n) for tile in seen} == {(found.job, 12, 700, 900, 800)}
    assert list((folder / "jobs").iterdir()) == []
    assert [str(path.relative_to(folder)) for path in (folder / "products").iterdir()] == [found.file]


async def _some(stream: Any, count: int) -> AsyncIterator[Any]:
    async with asyncio.timeout(20):
        for _ in range(count):
            yield await anext(aiter(stream))


async def test_tiles_that_went_to_a_worker_without_the_jobs_folder_are_asked_for_again(
    valkey_url: str, options: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time half of them come to the right one, so it takes several turns."""
    monkeypatch.setattr(matmul, "STALLED", 1)
    here = options.model_copy(update={"matmul_lease": 0.3})
    elsewhere = here.model_copy(update={"matmul_dir": tmp_path / "elsewhere"})
    a = numbers(600, 600)
    workers = (matmul.make(here, valkey_url), matmul.make(elsewhere, valkey_url))
    async with serving(*workers), Pipeline("t", valkey_url) as app:
        found = await ask(app, a, a, result="event", blocks="always")
    assert torch.equal(torch.as_tensor(found.product), a @ a)
    assert (found.tiles, found.recomputed) == (9, 0)


async def test_big_products_travel_in_shared_memory_to_who_asked(app: Pipeline) -> None:
    """And to the channel of results only where nobody asked."""
    a = numbers(300, 300)
    for _ in range(5):
        found = await ask(app, a, a, result="event", blocks="never")
        assert torch.equal(torch.as_tensor(found.product), a @ a)
    assert app.payloads.placed == 5  # the jobs' operands, each in one segment
    await app.publish(catalog.matmul_jobs, MatmulJob(a=Tensor(a), b=Tensor(a), result="event", blocks="never"))
    *asked, last = [message.event for message in await collect(app, catalog.matmul_results, 6)]
    assert [event.product for event in asked] == [None] * 5
    assert torch.equal(torch.as_tensor(last.product), a @ a)


async def test_the_figures_agree_with_each_other(app: Pipeline) -> None:
    found = await ask(app, numbers(100, 200), numbers(200, 300))
    assert found.gflops == pytest.approx(2 * 100 * 200 * 300 / found.seconds / 1e9)
    assert (found.kernel, found.device) == (("cublas", "cuda") if HAS_CUDA else ("blas", "cpu"))
    assert found.peak_share is not None
    assert 0 < found.peak_share <= 1
    assert (found.product, found.file) == (None, "")


async def test_a_systolic_job_shows_each_of_its_cycles(app: Pipeline) -> None:
    async with app.watch(catalog.systolic_cycles) as stream:
        found = await ask(app, numbers(5, 5), numbers(5, 5), kernel="systolic", result="event")
        seen: list[SystolicCycle] = [message.event async for message in _some(stream, 13)]
    assert found.kernel == "systolic"
    assert [cycle.cycle for cycle in seen] == list(range(13))
    assert sum(int(np.asarray(cycle.active).sum()) for cycle in seen) == 5**3
    assert {cycle.job for cycle in seen} == {found.job}


# -- jobs that cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "more", "said"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), {}, r"A has shape \[2, 3\] and B \[4, 2\]; expected \[..., m, k\]"),
        (torch.ones(2, 3), torch.ones(2, 3), {"transpose_a": True, "transpose_b": True}, r"op\(A\) has shape \[3, 2\]"),
        (torch.ones(3), torch.ones(3, 2), {}, r"A has shape \[3\] and B \[3, 2\]"),
        (torch.ones(2, 2).double(), torch.ones(2, 2), {}, "A is float64 and B float32; expected both of one dtype"),
        (torch.ones(2, 2).bool(), torch.ones(2, 2).bool(), {}, "A is bool and B bool; expected both of one dtype"),
        (torch.ones(2, 2, 2), torch.ones(3, 2, 2), {}, "expected leading dimensions that broadcast"),
        (torch.ones(2, 2).int(), torch.ones(2, 2).int(), {"alpha": 0.5}, "alpha is 0.5 and beta 0.0; expected"),
        (torch.ones(2, 2).char(), torch.ones(2, 2).char(), {"alpha": 3e9}, "expected integers from -2147483648 to"),
        (torch.ones(2, 2), torch.ones(2, 2), {"alpha": 1e39}, "beta 0.0; expected numbers that float32 has, as A"),
        (torch.ones(2, 2), torch.ones(2, 2), {"beta": 1.0}, r"there is no C; expected one of shape \[2, 2\]"),
        (torch.ones(2, 2), torch.ones(2, 2), {"c": torch.ones(3)}, r"C is float32 of shape \[3\]; expected float32"),
        (torch.ones(2, 2), torch.ones(2, 2), {"kernel": "magic"}, "there is no kernel 'magic'; known: blas"),
    ],
)  # fmt: skip
async def test_operands_that_do_not_fit_are_rejected_with_what_was_expected(
    app: Pipeline, a: Any, b: Any, more: Any, said: str
) -> None:
    with pytest.raises(RequestFailed, match=said):
        await ask(app, a, b, **more)
    [letter] = await app.dead_letters("matmul.jobs")
    assert letter.event.attempts == 1


@pytest.mark.skipif(HAS_CUDA, reason="there is a GPU")
async def test_a_job_for_a_gpu_is_rejected_where_there_is_none(app: Pipeline) -> None:
    with pytest.raises(RequestFailed, match="use 'auto' or 'cpu'"):
        await ask(app, numbers(2, 2), numbers(2, 2), device="cuda")


async def test_nothing_outside_the_workers_folder_is_read(app: Pipeline, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", np.ones((2, 2), np.float32))
    folder.mkdir(exist_ok=True)
    (folder / "link.npy").symlink_to(tmp_path / "secret.npy")
    (folder / "a.txt").write_text("")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(folder / "pickled.npy", np.array([{}]), allow_pickle=True)
    (folder / "short.safetensors").write_bytes((200).to_bytes(8, "little") + b"{}")
    cases = {
        "../secret.npy": "expected a path within it",
        str(tmp_path / "secret.npy"): "expected a path within it",
        "link.npy": "expected a path within it",
        "sub/../../secret.npy": "expected a path within it",
        "a.txt": "expected .npy or .safetensors",
        "missing.npy": "there is no file 'missing.npy'",
        "broken.npy": "broken.npy cannot be read",
        "pickled.npy": "pickled.npy cannot be read",
        "short.safetensors": "short.safetensors cannot be read",
    }
    for file, said in cases.items():
        with pytest.raises(RequestFailed, match=said):
            await ask(app, TensorFile(file=file), numbers(2, 2))
    for job in ("nobody:1", "../../secret", "/etc/passwd"):
        with pytest.raises(RequestFailed, match="there is no product of job"):
            await ask(app, ProductOf(job=job), numbers(2, 2))


async def test_a_product_too_big_for_an_event_is_refused_before_it_is_computed(valkey_url: str, folder: Path) -> None:
    options = Settings(matmul_dir=folder, max_frame_bytes=100_000)
    async with serving(matmul.make(options, valkey_url)), Pipeline("t", valkey_url) as app:
        with pytest.raises(RequestFailed, match="expected result='file'"):
            await ask(app, numbers(400, 2), numbers(2, 400), result="event")


def test_a_tile_that_cannot_be_computed_ends_its_job(options: Settings, folder: Path) -> None:
    """The file goes between the plan and the tile."""
    worker = Worker(options)
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", numbers(600, 600).numpy())
    work = worker.open(MatmulJob(a=TensorFile(file="a.npy"), b=Tensor(numbers(600, 600))))
    plan, board = worker.share("t:1", work)
    assert not worker.is_complete("t:1", plan, board)
    (folder / "a.npy").unlink()
    with pytest.raises(Reject, match=r"there is no file 'a\.npy'"):
        worker.compute_tile("t:1", 0, last_attempt=False)
    with pytest.raises(Reject, match=r"tile 0: there is no file 'a\.npy'"):
        worker.is_complete("t:1", plan, board)
    board.close()


def test_a_tile_that_kills_its_workers_ends_its_job(options: Settings, folder: Path) -> None:
    worker = Worker(options)
    plan, board = worker.share("t:1", worker.open(MatmulJob(a=Tensor(numbers(600, 600)), b=Tensor(numbers(600, 600)))))
    for _ in range(4):
        board.begin(1)
    with pytest.raises(Reject, match="tile 1 of 9: its worker died each time"):
        worker.is_complete("t:1", plan, board)
    board.close()


def test_a_tile_in_another_workers_hands_is_left_alone_and_one_that_is_done_stays_done(options: Settings) -> None:
    one, other = Worker(options), Worker(options)
    a = numbers(600, 600)
    _, board = one.share("t:1", one.open(MatmulJob(a=Tensor(a), b=Tensor(a))))
    with board.claim(0) as claimed:
        assert claimed
        with pytest.raises(Retry):
            other.compute_tile("t:1", 0, last_attempt=False)
    assert other.compute_tile("t:1", 0, last_attempt=False) is not None
    assert one.compute_tile("t:1", 0, last_attempt=False) is None
    assert board.recomputed() == 0
    for worker in (one, other):
        worker.close_shared()
    board.close()


# -- files ---------------------------------------------------------------------------------------------------------


def test_old_products_go_and_new_ones_stay(folder: Path) -> None:
    for name in ("old", "new"):
        save(folder / "products" / f"{name}.npy", numbers(2, 2))
    os.utime(folder / "products" / "old.npy", (0, 0))
    Folder(folder).sweep(60)
    assert [path.name for path in (folder / "products").iterdir()] == ["new.npy"]


def test_an_old_file_that_was_staged_just_now_stays(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "weights.npy"
    save(theirs, numbers(2, 2))
    os.utime(theirs, (0, 0))
    (folder / "staged").mkdir(parents=True)
    os.link(theirs, folder / "staged" / "a.npy")
    Folder(folder).sweep(60)
    assert (folder / "staged" / "a.npy").exists()
    time.sleep(0.02)
    Folder(folder).sweep(0.01)
    assert (theirs.exists(), (folder / "staged" / "a.npy").exists()) == (True, False)

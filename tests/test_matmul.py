"""Matmul jobs: right products, honest figures, and jobs that cannot be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import Message, Pipeline, Reject, RequestFailed, Tensor, catalog
from pipeline.catalog import MatmulJob, MatmulResult
from subscribers import matmul

from .programs import collect, events, served

HAS_CUDA = torch.cuda.is_available()


def multiply(a: Any, b: Any, **more: Any) -> MatmulResult:
    job = MatmulJob(a=Tensor(a), b=Tensor(b), keep_result=True, **more)
    return matmul.multiply(Message(job, "t:1", "matmul.jobs", "t", datetime.now(UTC)))


def matrix(*shape: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(dtype)


@pytest.fixture
async def app(valkey_url: str) -> AsyncIterator[Pipeline]:
    async with served(matmul.app, valkey_url), Pipeline("t", valkey_url) as app:
        yield app


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no GPU"))]
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 31, 5), (33, 50, 70), (64, 1, 64), (3, 0, 2), (0, 4, 2)])
def test_the_product_is_numpys(shape: tuple[int, int, int], device: Any) -> None:
    m, k, n = shape
    a, b = matrix(m, k), matrix(k, n)
    result = multiply(a, b, device=device)
    assert result.product is not None
    assert result.product.dtype == "float32"
    assert np.array_equal(result.product, a @ b)
    assert (result.m, result.k, result.n, result.dtype, result.job, result.device) == (
        m,
        k,
        n,
        "float32",
        "t:1",
        device,
    )
    assert result.checksum == float((a @ b).sum())


@pytest.mark.parametrize("dtype", matmul.DTYPES)
def test_every_dtype_keeps_its_own(dtype: str) -> None:
    if dtype == "bfloat16":
        a, b = torch.from_numpy(matrix(8, 4)).bfloat16(), torch.from_numpy(matrix(4, 6)).bfloat16()
        expected: Any = a @ b
    else:
        a, b = matrix(8, 4, dtype=dtype), matrix(4, 6, dtype=dtype)
        expected = a @ b
    assert multiply(a, b, device="cpu").product == Tensor(expected)


def test_transposed_and_strided_operands_are_taken_as_they_are() -> None:
    a, b = matrix(10, 6).T, matrix(20, 14)[::2, ::2]
    assert multiply(a, b).product == Tensor(a @ b)


def test_the_figures_agree_with_each_other() -> None:
    result = multiply(matrix(100, 200), matrix(200, 300))
    assert result.gflops == pytest.approx(2 * 100 * 200 * 300 / result.seconds / 1e9)
    assert (result.kernel, result.device) == (("cublas", "cuda") if HAS_CUDA else ("blas", "cpu"))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.ones((2, 3)), np.ones((4, 2)), "A has shape [2, 3] and B [4, 2]; expected [m, k] and [k, n]"),
        (np.ones(3), np.ones((3, 2)), "A has shape [3] and B [3, 2]"),
        (np.ones((2, 2)), np.ones((2, 2), np.float32), "A is float64 and B float32; expected both of one dtype of"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), "A is bool and B bool; expected both of one dtype of float64"),
    ],
)
def test_operands_that_do_not_fit_are_rejected_with_what_was_expected(a: Any, b: Any, said: str) -> None:
    with pytest.raises(Reject) as rejected:
        multiply(a, b)
    assert said in rejected.value.reason


@pytest.mark.skipif(HAS_CUDA, reason="there is a GPU")
def test_a_job_for_a_gpu_is_rejected_where_there_is_none() -> None:
    with pytest.raises(Reject) as rejected:
        multiply(matrix(2, 2), matrix(2, 2), device="cuda")
    assert "expected 'auto' or 'cpu'" in rejected.value.reason


async def test_jobs_become_results_and_a_bad_one_is_a_dead_letter(app: Pipeline) -> None:
    jobs = [MatmulJob(a=Tensor(matrix(n, n)), b=Tensor(matrix(n, n))) for n in (5, 6)]
    bad = MatmulJob(a=Tensor(matrix(2, 3)), b=Tensor(matrix(2, 3)))
    receipt = await app.publish(catalog.matmul_jobs, [jobs[0], bad, jobs[1]])
    first, second = events(await collect(app, catalog.matmul_results, 2))
    assert (first.job, second.job) == (receipt.ids[0], receipt.ids[2])
    assert first.product is None
    answer = await app.request(catalog.matmul_jobs, jobs[0].model_copy(update={"keep_result": True}))
    assert answer.product == Tensor(np.asarray(jobs[0].a) @ np.asarray(jobs[0].b))
    with pytest.raises(RequestFailed, match=r"A has shape \[2, 3\] and B \[2, 3\]"):
        await app.request(catalog.matmul_jobs, bad)

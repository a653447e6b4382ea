"""Computes matmul jobs on the best device there is."""

from __future__ import annotations

import time

import torch

from pipeline import Message, Pipeline, Reject, Tensor, catalog
from pipeline.catalog import MatmulJob, MatmulResult

from .kernels import Device, best_device, choose

__all__ = ["DTYPES", "app", "multiply"]

app = Pipeline("matmul")

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32")


@app.on_start
async def prepare() -> None:
    torch.set_num_threads(1)


@app.subscriber(catalog.matmul_jobs, group="matmul", publishes=catalog.matmul_results, run_in="thread")
def multiply(message: Message[MatmulJob]) -> MatmulResult:
    """The product's figures, and the product itself where the job asks for it."""
    job = message.event
    check(job)
    (m, k), n = job.a.shape, job.b.shape[1]
    kernel = choose(_device(job), job.a.dtype, m, k, n)
    a = torch.as_tensor(job.a).to(kernel.device)
    b = torch.as_tensor(job.b).to(kernel.device)
    kernel.wait()
    started = time.perf_counter()
    c = kernel.multiply(a, b)
    kernel.wait()
    seconds = time.perf_counter() - started
    return MatmulResult(
        job=message.id,
        m=m,
        k=k,
        n=n,
        dtype=job.a.dtype,
        device=kernel.device,
        kernel=kernel.name,
        seconds=seconds,
        gflops=2 * m * k * n / seconds / 1e9,
        checksum=float(c.sum(dtype=torch.float64)),
        product=Tensor(c) if job.keep_result else None,
    )


def check(job: MatmulJob) -> None:
    """Raises Reject saying what was expected."""
    a, b = job.a, job.b
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise Reject(f"A has shape {list(a.shape)} and B {list(b.shape)}; expected [m, k] and [k, n]")
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        raise Reject(f"A is {a.dtype} and B {b.dtype}; expected both of one dtype of {', '.join(DTYPES)}")


def _device(job: MatmulJob) -> Device:
    best = best_device()
    if job.device == "auto":
        return best
    if job.device == "cuda" and best != "cuda":
        raise Reject("the job asks for device 'cuda' and this worker has none; expected 'auto' or 'cpu'")
    return job.device

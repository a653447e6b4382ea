"""Matrix products as jobs."""

from __future__ import annotations

from typing import Literal

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "MatmulJob",
    "MatmulResult",
    "SystolicCycle",
    "matmul_jobs",
    "matmul_results",
    "systolic_cycles",
]


class MatmulJob(Event):
    """C = A · B."""

    a: Tensor
    """shape [m, k]"""
    b: Tensor
    """shape [k, n], dtype as `a`"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_result: bool = False
    """True: the product travels back in the result event."""


class MatmulResult(Event):
    job: str
    """Id of the job's event."""
    m: int
    k: int
    n: int
    dtype: str
    device: str
    kernel: str
    seconds: float
    gflops: float
    """2·m·k·n / seconds / 1e9"""
    checksum: float
    """Sum of all elements of C, in float64."""
    product: Tensor | None = None


matmul_jobs: Channel[MatmulJob] = Channel("matmul.jobs", MatmulJob, reply=MatmulResult, frame=1, keep=10.0)


matmul_results: Channel[MatmulResult] = Channel("matmul.results", MatmulResult)


class SystolicCycle(Event):
    """One tick of the simulated systolic array: the picture of the wavefront."""

    job: str
    """Id of the job's event."""
    cycle: int
    """From 0."""
    cycles: int
    """How many the job takes: m + n + k - 2."""
    active: Tensor
    """bool [m, n]: the cells that multiply in this cycle."""


systolic_cycles: Channel[SystolicCycle] = Channel("matmul.systolic", SystolicCycle, durable=False)

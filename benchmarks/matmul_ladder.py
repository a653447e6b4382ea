"""Kernels against the vendor's library, in one run: the ladder as shares of cuBLAS, or `blocked` beside BLAS on a CPU.

Every product is checked, element by element, against float64 before it is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from subscribers.kernels import KERNELS, Kernel, result_dtype

from .report import Figure

__all__ = ["run"]

GPU_SIZE = 4096
GPU = {
    "float32": ("cublas", "cuda-naive", "cuda-tiled", "cuda-register"),
    "TF32": ("cublas", "triton"),
    "float16": ("cublas", "triton"),
    "bfloat16": ("cublas", "triton"),
}
"""The library first."""
CPU = {"float64": (256, 1024), "float32": (256, 1024), "int32": (256, 1024)}

_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "TF32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The greatest relative error of rounding a number."""


def run(repeats: int, seconds: float) -> list[Figure]:
    if torch.cuda.is_available():
        return [figure for kind, names in GPU.items() for figure in _compare(kind, names, GPU_SIZE, repeats, seconds)]
    print("matmul ladder: no CUDA device here, so nothing is said of its kernels; those of the CPU:", file=sys.stderr)
    names = ("blas", "blocked")
    return [f for kind, sizes in CPU.items() for n in sizes for f in _compare(kind, names, n, repeats, seconds)]


def _compare(kind: str, names: tuple[str, ...], n: int, repeats: int, seconds: float) -> Iterator[Figure]:
    """In turn, so that whatever else the machine does meets all of them."""
    kernels = [KERNELS[name] for name in names]
    dtype = "float32" if kind == "TF32" else kind
    generator = torch.Generator().manual_seed(n)
    a, b = (_random(generator, n, dtype).to(kernels[0].device) for _ in "ab")
    unit = f"GFLOP/s {kind} {n}³"
    where = torch.cuda.get_device_name() if kernels[0].device == "cuda" else f"{torch.get_num_threads()} threads"
    figures = [Figure("matmul", f"{one.name} {kind} {n}³", unit, peer=one is kernels[0], note=where) for one in kernels]
    with _tf32(kind == "TF32"):
        for kernel in kernels:
            _check(kernel, kind, a, b)
        for _ in range(repeats):
            for figure, kernel in zip(figures, kernels, strict=True):
                share = seconds / repeats / len(kernels)
                figure.values.append(2 * n**3 / _shortest(kernel, a, b, share) / 1e9)
    yield from figures


def _shortest(kernel: Kernel, a: torch.Tensor, b: torch.Tensor, seconds: float) -> float:
    """Of the runs that fit into `seconds`, at least one."""
    out = torch.empty((len(a), b.shape[1]), dtype=getattr(torch, result_dtype(_dtype(a))), device=a.device)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while True:
        kernel.wait()
        began = time.perf_counter()
        kernel.multiply(a, b, out=out)
        kernel.wait()
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended > deadline:
            return best


def _check(kernel: Kernel, kind: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """|C - AB| ≤ (rounding of the operands + k · rounding of the sums) · |A||B| + rounding of C, for every element.

    N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, (3.13). Raises AssertionError.
    """
    product, wanted = kernel.multiply(a, b), a.double() @ b.double()
    if not a.is_floating_point():
        assert torch.equal(product.double(), wanted), f"{kernel.name}: integers differ"
        return
    sums = _ROUNDING["float64" if kind == "float64" else "float32"] * a.shape[1]
    operands = 2 * _ROUNDING["TF32"] if kind == "TF32" else 0.0
    allowed = (operands + sums) * (a.double().abs() @ b.double().abs())
    allowed += _ROUNDING["float32" if kind == "TF32" else kind] * wanted.abs()
    if kind == "float64":
        allowed *= 2  # what it is compared with is rounded too
    wrong = int(((product.double() - wanted).abs() > allowed).sum())
    assert wrong == 0, f"{kernel.name} {kind}: {wrong} of {wanted.numel()} elements are off by more than rounding"


def _random(generator: torch.Generator, n: int, dtype: str) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.randn(n, n, generator=generator).to(kind)
    return torch.randint(-100, 100, (n, n), generator=generator).to(kind)


def _dtype(matrix: torch.Tensor) -> str:
    return str(matrix.dtype).removeprefix("torch.")


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether cuBLAS may round float32 as `triton` does."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

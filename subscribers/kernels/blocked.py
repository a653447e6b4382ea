"""`blocked`: a cache-blocked product for the CPU, compiled by Numba.

Blocks as in K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3), 2008: a
block of B stays in the second-level cache while rows of A and C stream past it. The innermost step adds four rows of B,
scaled by a 4 × 4 patch of A, to four rows of C: 16 multiply-adds on 12 memory operations, so that arithmetic and not
memory sets the pace, and a loop over columns that every compiler turns into vector instructions.
"""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np
import torch

__all__ = ["multiply"]

ROWS, DEPTH, COLUMNS = 64, 256, 512
"""Of a block. Four rows of B and of C: 16 KB in float32, for the first-level cache; a block of B: 512 KB."""

_turn = threading.Lock()
"""Numba's fallback for threads aborts the process when two threads of Python enter it at once."""


def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    wide = {torch.int8: torch.int32, torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(a.dtype, a.dtype)
    direct = out.dtype == wide and beta == 0 and alpha == 1 and out.is_contiguous()
    with _turn:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        for one, other, result in zip(a.to(wide), b.to(wide), out, strict=True):
            product = result if direct else torch.empty(result.shape, dtype=wide)
            _product(one.contiguous().numpy(), other.contiguous().numpy(), product.numpy())
            if not direct:
                product = product if alpha == 1 else product.mul_(alpha)
                result.copy_(product if beta == 0 else product.add_(result, alpha=beta))


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def _product(a: Any, b: Any, c: Any) -> None:
    """c ← a · b, all contiguous: each layout would be compiled anew."""
    (m, k), n = a.shape, b.shape[1]
    down, across = (m + ROWS - 1) // ROWS, (n + COLUMNS - 1) // COLUMNS
    for block in numba.prange(down * across):
        top, left = block % down * ROWS, block // down * COLUMNS
        bottom, right = min(top + ROWS, m), min(left + COLUMNS, n)
        sums = np.zeros((ROWS, COLUMNS), c.dtype)
        packed = np.empty((DEPTH, COLUMNS), c.dtype)
        for start in range(0, k, DEPTH):
            end = min(start + DEPTH, k)
            for p in range(end - start):
                for j in range(right - left):
                    packed[p, j] = b[start + p, left + j]
            _block(a[top:bottom, start:end], packed, sums, right - left)
        for i in range(bottom - top):
            for j in range(right - left):
                c[top + i, left + j] = sums[i, j]


@numba.njit(cache=True, nogil=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def _block(a: Any, b: Any, sums: Any, n: int) -> None:
    """sums += a · b, eight rows of b at a time; what is left over, by ones."""
    m, k = a.shape
    for p in range(0, k - k % 8, 8):
        b0, b1, b2, b3, b4, b5, b6, b7 = b[p], b[p + 1], b[p + 2], b[p + 3], b[p + 4], b[p + 5], b[p + 6], b[p + 7]
        for i in range(m):
            row = sums[i]
            a0, a1, a2, a3 = a[i, p], a[i, p + 1], a[i, p + 2], a[i, p + 3]
            a4, a5, a6, a7 = a[i, p + 4], a[i, p + 5], a[i, p + 6], a[i, p + 7]
            for j in range(n):
                row[j] += (
                    a0 * b0[j]
                    + a1 * b1[j]
                    + a2 * b2[j]
                    + a3 * b3[j]
                    + a4 * b4[j]
                    + a5 * b5[j]
                    + a6 * b6[j]
                    + a7 * b7[j]
                )
    for p in range(k - k % 8, k):
        for i in range(m):
            for j in range(n):
                sums[i, j] += a[i, p] * b[p, j]

"""`systolic`: a square grid of cells in step with one clock, simulated cycle by cycle.

Output-stationary (H. T. Kung, "Why systolic architectures?", Computer 15(1), 1982). Cell (i, j) keeps C[i, j]. A flows
to the right, row i of it i cycles late; B flows down, column j of it j cycles late. Every cycle each cell multiplies
the two numbers in its registers, adds the product to what it keeps, and passes them on. A[i, p] and B[p, j] meet in
cell (i, j) in cycle i + j + p; the last ones in cycle m + n + k - 3, counted from 0. So n³ multiply-accumulates on
n² cells take 3n - 2 cycles: n of work in each cell, 2n - 2 for the wavefront to cross the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Run", "multiply", "run", "wavefront"]

MAX_CELLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """What the array did."""

    product: npt.NDArray[Any]
    """[m, n], summed in ascending order of k."""
    cycles: int
    """m + n + k - 2, or 0 if there is nothing to do."""
    multiply_accumulates: int
    """m · k · n, counted as the cells did them."""


def run(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Run:
    """A [m, k] · B [k, n] on an array of m × n cells; numbers of one dtype, added up in it."""
    kept = np.zeros((len(a), b.shape[1]), a.dtype)
    cycles = operations = 0
    for left, above, active in _clock(a, b):
        cycles += 1
        kept += left * above
        operations += int(np.count_nonzero(active))
    return Run(kept, cycles, operations)


def wavefront(n: int) -> Iterator[npt.NDArray[np.bool_]]:
    """For n × n matrices, the cells that multiply in each of the 3n - 2 cycles: bool [n, n]."""
    ones = np.ones((n, n), np.int8)
    for _, _, active in _clock(ones, ones):
        yield active


def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    if out[0].numel() > MAX_CELLS:
        raise ValueError(f"C has shape {list(out.shape[1:])}; the simulated array has at most {MAX_CELLS:,} cells")
    wide = {torch.int8: torch.int32, torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(a.dtype, a.dtype)
    for one, other, result in zip(a.to(wide), b.to(wide), out, strict=True):
        product = torch.from_numpy(run(one.numpy(), other.numpy()).product)
        product = product if alpha == 1 else product * alpha
        result.copy_(product if beta == 0 else product + result * beta)


def _clock(
    a: npt.NDArray[Any], b: npt.NDArray[Any]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """Each cycle's registers: what every cell has of A and of B, and whether these are numbers of the matrices."""
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, k, n):
        return
    rows, columns = np.arange(m), np.arange(n)
    left, above = np.zeros((m, n), a.dtype), np.zeros((m, n), b.dtype)
    has_left, has_above = np.zeros((m, n), bool), np.zeros((m, n), bool)
    for cycle in range(m + n + k - 2):
        for registers in (left, has_left):
            registers[:, 1:] = registers[:, :-1].copy()
        for registers in (above, has_above):
            registers[1:] = registers[:-1].copy()
        entering = cycle - rows
        has_left[:, 0] = (entering >= 0) & (entering < k)
        left[:, 0] = np.where(has_left[:, 0], a[rows, entering.clip(0, k - 1)], 0)
        entering = cycle - columns
        has_above[0] = (entering >= 0) & (entering < k)
        above[0] = np.where(has_above[0], b[entering.clip(0, k - 1), columns], 0)
        yield left, above, has_left & has_above

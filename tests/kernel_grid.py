"""Awkward products for every kernel, compared with float64; and kernels with a piece taken out, which must fail them.

`python -m tests.kernel_grid NAME…` runs the kernels of one family, and their mutants, and prints what failed as JSON.
The simulator and the interpreter are chosen by environment variables before the first import, so they need a process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subscribers import kernels
from subscribers.kernels import KERNELS, Kernel, result_dtype

SHAPES = ((1, 1, 1), (17, 31, 5), (33, 50, 70), (16, 8, 24), (5, 300, 7), (1, 9, 20), (20, 9, 1), (0, 4, 2), (3, 0, 2))
"""[m, k] · [k, n]: single numbers, no multiple of any tile, all multiples, much longer than wide, vectors, empty."""
LARGE = ((129, 257, 130), (300, 1000, 520), (512, 512, 512))
"""For real devices, whose tiles are larger than a simulator's."""
LAYOUTS = ("aligned", "contiguous", "transposed", "strided", "batched", "broadcast")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]
    dtype: str
    layout: str = "aligned"
    alpha: int = 1
    beta: int = 0


def cases(kernel: Kernel, dtypes: tuple[str, ...], large: bool = False) -> Iterator[Case]:
    first = "float32"
    for shape in SHAPES + (LARGE if large else ()):
        yield Case(shape, first)
    for layout in LAYOUTS[1:]:
        yield Case((17, 31, 5), first, layout)
        yield Case((6, 10, 9), first, layout, 2, -3)
    for dtype in dtypes:
        yield Case((9, 12, 10), dtype)
        yield Case((9, 12, 10), dtype, "strided", -2, 3)
        for beta in (0, 3):  # nothing of A and B, so that all of C is to be written all the same
            yield Case((9, 12, 10), dtype, "batched", 0, beta)
            yield Case((9, 0, 10), dtype, "batched", 2, beta)


def failures(kernel: Kernel, wanted: Iterator[Case] | list[Case], device: str) -> list[str]:
    """What went wrong, a line a case."""
    return [f"{kernel.name} {case}: {problem}" for case in wanted if (problem := failure(kernel, case, device))]


def failure(kernel: Kernel, case: Case, device: str) -> str:
    torch.manual_seed(0)
    (m, k, n), batch = case.shape, {"batched": (2, 3), "broadcast": (2,)}.get(case.layout, ())
    a = _operand((*batch, m, k), case.dtype, case.layout, device)
    b = _operand((k, n) if case.layout == "broadcast" else (*batch, k, n), case.dtype, case.layout, device)
    c = _operand((*batch, m, n), result_dtype(case.dtype), case.layout, device)
    field, out = _guarded((*batch, m, n), result_dtype(case.dtype), case.layout, device)
    wanted = case.alpha * _wide(a) @ _wide(b) + case.beta * _wide(c)
    before = field.clone()
    try:
        kernel.multiply(
            a, b, alpha=float(case.alpha), beta=float(case.beta), c=c if case.beta else None, out=out
        )  # floats, as jobs have them
        kernel.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not torch.equal(out, wanted.to(out.dtype)):
        return f"{int((out != wanted.to(out.dtype)).sum())} of {out.numel()} elements are wrong"
    out.copy_(_inside(before, out.shape, case.layout))
    return "" if torch.equal(field.nan_to_num(9999), before.nan_to_num(9999)) else "wrote outside of C"


def mutants(path: Path, mutations: dict[str, tuple[str, int, str, str]]) -> Iterator[tuple[str, str]]:
    """name → (function, which occurrence within it, text, what is put in its place). Yields name and mutated source."""
    source = path.read_text()
    for name, (function, occurrence, text, replacement) in mutations.items():
        start = source.index(f"def {function}(")
        for _ in range(occurrence + 1):
            start = source.index(text, start) + len(text)  # a text that is not there is an error of the test
        yield name, source[: start - len(text)] + replacement + source[start:]


LADDER_MUTATIONS = {
    "naive: no bounds": ("naive", 0, "row < m and column < n", "True"),
    "tiled: no barrier after loading": ("tiled", 0, "cuda.syncthreads()", "pass"),
    "tiled: no barrier before overwriting": ("tiled", 1, "cuda.syncthreads()", "pass"),
    "tiled: rows of A": ("tiled", 0, "row < m and start + x < k", "start + x < k"),
    "tiled: columns of A": ("tiled", 0, "row < m and start + x < k", "row < m"),
    "tiled: rows of B": ("tiled", 0, "start + y < k and column < n", "column < n"),
    "tiled: columns of B": ("tiled", 0, "start + y < k and column < n", "start + y < k"),
    "tiled: one slice only": ("tiled", 0, "range(0, k, tile)", "range(0, tile, tile)"),
    "tiled: bounds of C": ("tiled", 0, "if row < m and column < n:", "if True:"),
    "register: no barrier after loading": ("register", 0, "cuda.syncthreads()", "pass"),
    "register: no barrier before overwriting": ("register", 1, "cuda.syncthreads()", "pass"),
    "register: vectors of A": ("register", 0, "vectors and row < m and column + vector <= k", "vectors and row < m"),
    "register: vectors of A, rows": ("register", 0, "vectors and row < m and", "vectors and"),
    "register: vectors of B": ("register", 0, "vectors and row < k and column + vector <= n", "vectors and row < k"),
    "register: vectors of B, rows": ("register", 0, "vectors and row < k and", "vectors and"),
    "register: rows of A": ("register", 0, "inside = row < m and column + v < k", "inside = column + v < k"),
    "register: columns of A": ("register", 0, "inside = row < m and column + v < k", "inside = row < m"),
    "register: rows of B": ("register", 0, "inside = row < k and column + v < n", "inside = column + v < n"),
    "register: columns of B": ("register", 0, "inside = row < k and column + v < n", "inside = row < k"),
    "register: the last slice's depth": ("register", 0, "min(depth, k - start)", "depth - 1"),
    "register: rows of C": ("register", 0, "if row < m:", "if True:"),
    "register: columns of C": ("register", 0, "if column < n:", "if True:"),
}
TRITON_MUTATIONS = {
    "triton: slices of A": ("_product", 0, "mask=(at + depth < stop)[None, :]", "mask=(depth >= 0)[None, :]"),
    "triton: slices of B": ("_product", 0, "mask=(at + depth < stop)[:, None]", "mask=(depth >= 0)[:, None]"),
    "triton: rows of C": ("_product", 0, "inside = (rows < m)", "inside = (rows >= 0)"),
    "triton: columns of C": ("_product", 0, "(columns < n)[None, :]", "(columns >= 0)[None, :]"),
    "triton: splits": ("_product", 0, "split * part, min", "0 * part, min"),
}
FAMILIES = {
    "cuda_ladder": (("cuda-naive", "cuda-tiled", "cuda-register"), LADDER_MUTATIONS),
    "tensor_cores": (("triton",), TRITON_MUTATIONS),
}


def killing(mutation: str) -> list[Case]:
    """The cases of the grid that a mutant has to fail at least one of."""
    shapes = ((5, 300, 7),) if "splits" in mutation else ((17, 31, 5), (18, 21, 20))
    return [Case(shape, "float32", layout) for shape in shapes for layout in ("strided", "aligned")]


def main(family: str) -> None:
    names, mutations = FAMILIES[family]
    dtypes = {name: tuple(one for one in KERNELS[name].dtypes if one != "bfloat16") for name in names}
    # Triton's interpreter takes bfloat16's words for integers: that dtype is compiled here, and run on a GPU.
    found = {name: failures(KERNELS[name], cases(KERNELS[name], dtypes[name]), "cpu") for name in names}
    path = Path(kernels.__file__).with_name(f"{family}.py")
    with tempfile.TemporaryDirectory() as folder:
        for number, (mutation, source) in enumerate(mutants(path, mutations)):
            file = Path(folder, f"mutant_{number}.py")
            file.write_text(source)
            spec = importlib.util.spec_from_file_location(f"subscribers.kernels.{family}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            prefix = mutation.partition(":")[0]
            kernel = KERNELS[prefix if prefix == "triton" else f"cuda-{prefix}"]
            found[mutation] = next(([one] for case in killing(mutation) if (one := failure(kernel, case, "cpu"))), [])
    print(json.dumps(found))


def _operand(shape: tuple[int, ...], dtype: str, layout: str, device: str) -> torch.Tensor:
    """Small integers, so that every dtype is exact, in a field of what would spoil the product."""
    _, inside = _guarded(shape, dtype, layout, device)
    return inside.copy_(torch.randint(-4, 5, shape, device=device))


def _guarded(shape: tuple[int, ...], dtype: str, layout: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    (*batch, rows, columns), kind = shape, getattr(torch, dtype)
    poison = float("nan") if kind.is_floating_point else 97
    if layout == "contiguous":
        field = torch.full(shape, poison, dtype=kind, device=device)
    elif layout == "transposed":
        field = torch.full((*batch, columns + 3, rows + 5), poison, dtype=kind, device=device)
    elif layout == "strided":
        field = torch.full((*batch, rows * 2 + 40, columns * 3 + 60), poison, dtype=kind, device=device)
    else:  # rows begin where 128-bit loads may
        field = torch.full((*batch, rows + 20, -(-columns // 4) * 4 + 24), poison, dtype=kind, device=device)
    return field, _inside(field, shape, layout)


def _inside(field: torch.Tensor, shape: torch.Size | tuple[int, ...], layout: str) -> torch.Tensor:
    rows, columns = shape[-2:]
    if layout == "contiguous":
        return field
    if layout == "transposed":
        return field[..., 1 : 1 + columns, 2 : 2 + rows].mT
    if layout == "strided":
        return field[..., 1 : 1 + 2 * rows : 2, 2 : 2 + 3 * columns : 3]
    return field[..., 1 : 1 + rows, 4 : 4 + columns]


def _wide(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.double()


class _Allocations(dict[object, object]):
    """A block's shared arrays in Numba's simulator, which looks for one and makes it with no lock in between: two
    threads could get an array each, and on a busy machine a block of the product was wrong now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._making = threading.Lock()

    def get(self, key: object, default: object = None) -> object:
        """Whoever finds none goes on to make it; the others wait."""
        self._making.acquire()
        found = super().get(key, default)
        if found is not None:
            self._making.release()
        return found

    def __setitem__(self, key: object, made: object) -> None:
        super().__setitem__(key, made)
        self._making.release()


def _wait_for_each_other() -> None:
    """The simulator looks all the time whether a block's threads are at the barrier, in turn with these threads
    themselves: on a busy machine that took longer than all they compute. Here who arrives tells."""
    from numba.cuda.simulator.kernel import BlockManager, BlockThread

    begin = BlockThread.run

    def run(self: Any) -> None:
        try:
            begin(self)
        finally:
            self._manager.arrived.release()

    def syncthreads(self: Any) -> None:
        self.syncthreads_blocked = True
        self._manager.arrived.release()
        self.syncthreads_event.wait()
        self.syncthreads_event.clear()
        if self.abort:
            raise RuntimeError("another thread of the block failed")

    def run_block(self: Any, place: Any, *args: Any) -> None:
        self.arrived = threading.Semaphore(0)
        points = np.ndindex(*self._block_dim)
        threads = [BlockThread(lambda: self._f(*args), self, place, point, self._debug) for point in points]
        for thread in threads:
            thread.start()
        running = threads
        while running:
            for _ in running:
                self.arrived.acquire()
            failed = next((thread.exception for thread in running if thread.exception), None)
            running = [thread for thread in running if thread.syncthreads_blocked]
            for thread in running:
                thread.abort, thread.syncthreads_blocked = failed is not None, False
                thread.syncthreads_event.set()
            if failed is not None:
                raise failed[0].with_traceback(failed[1])

    BlockThread.run, BlockThread.syncthreads, BlockManager.run = run, syncthreads, run_block


def _share_once() -> None:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    begin = FakeCUDAShared.__init__

    def initialize(self: Any, size: int) -> None:
        begin(self, size)
        self._allocations = _Allocations()

    FakeCUDAShared.__init__ = initialize


if __name__ == "__main__":
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        _share_once()
        _wait_for_each_other()
    main(sys.argv[1])

"""A product in tiles, as one of its workers sees it: files that it shares with others, and what it keeps of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..kernels import Kernel, choose
from .board import Board
from .files import Folder, Mapped, create, open_written
from .plan import Plan, Tile

__all__ = ["Blocks", "SharedProduct", "prepare"]

PLAN, BOARD, PARTIALS = "plan.json", "board", "partials.npy"
MAPPED = 32 << 20
"""Bytes of a file that are mapped at a time, where a product takes more memory than there is."""


class Blocks:
    """Parts of operands, copied from their files and kept: the last used ones, up to `most` bytes of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.nbytes = 0
        self.read = 0
        """Bytes copied so far."""
        self._blocks: OrderedDict[object, torch.Tensor] = OrderedDict()

    def get(self, key: object, nbytes: int, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        block = self._blocks.get(key)
        if block is None:
            while self._blocks and self.nbytes + nbytes > self.most:
                self.nbytes -= self._blocks.popitem(last=False)[1].nbytes
            block = self._blocks[key] = read()
            self.nbytes += block.nbytes
            self.read += block.nbytes
        self._blocks.move_to_end(key)
        return block


class SharedProduct:
    """A job's plan, board, operands and product, opened by one process.

    Raises FileNotFoundError when the job is over.
    """

    def __init__(self, folder: Folder, job: str, memory: int) -> None:
        self.where = folder.shared(job)
        self.plan = Plan.model_validate_json((self.where / PLAN).read_bytes())
        self.board = Board(self.where / BOARD)
        plan, batch = self.plan, self.plan.shapes.batch
        try:
            self._files = [folder.open(plan.a), folder.open(plan.b)]
            a, b = (one.tensor for one in self._files)
            a, b = a.mT if plan.transpose_a else a, b.mT if plan.transpose_b else b
            self._a, self._b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
            self._c = None
            if plan.c is not None and plan.beta:
                self._files.append(folder.open(plan.c))
                self._c = self._files[-1].tensor.expand(plan.shapes.product)
            self._product = open_written(product_path(self.where, plan))
            self._partials = open_written(self.where / PARTIALS) if plan.splits > 1 else None
        except BaseException:
            self.board.close()
            raise
        self._blocks = Blocks(memory // 2)

    # -- a tile --------------------------------------------------------------------------------------------------

    def compute(self, index: int) -> float | None:
        """Compute a tile, unless that was done before. Returns the seconds it took; None if there was nothing to do.

        Raises BlockingIOError while another worker computes it.
        """
        seconds = None
        if not self.board.is_done(index):
            seconds = self._claimed(index, lambda: self._compute(self.plan.tile(index)))
        if self._partials is not None:
            self._add_up(index % self.plan.corners, self._partials)
        return seconds

    def _add_up(self, corner: int, partials: Mapped) -> None:
        """A corner's partial products, in the order of k whoever computed them: once all of them are there, it is up to
        whoever handles any of them."""
        plan = self.plan
        if self.board.done(slice(corner, plan.tiles, plan.corners)) == plan.splits:
            entry = plan.final(corner)
            if not self.board.is_done(entry):
                self._claimed(entry, lambda: self._sum(plan.tile(corner), partials))

    def _claimed(self, entry: int, work: Callable[[], None]) -> float | None:
        with self.board.claim(entry) as claimed:
            if not claimed:
                raise BlockingIOError(f"another worker computes tile {entry}")
            if self.board.is_done(entry):
                return None
            self.board.begin(entry)
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            self.board.finish(entry, seconds)
            return seconds

    def _compute(self, tile: Tile) -> None:
        plan = self.plan
        kernel = self.kernel()
        whole = tile.inner == (0, plan.shapes.k)
        target = self._target(tile)
        steps = list(_steps(tile.inner, plan.tile_k))
        direct = kernel.device == "cpu" and len(steps) <= 1
        out = target if direct else None
        alpha, beta = (plan.alpha, plan.beta) if whole else (1.0, 0.0)
        c = None
        if whole and self._c is not None:
            c = _part(self._c, tile).to(kernel.device, getattr(torch, plan.sum_dtype))
        for inner in steps or [tile.inner]:
            a = self._block(kernel, "a", self._a, tile, tile.rows, inner)
            b = self._block(kernel, "b", self._b, tile, inner, tile.columns)
            out = kernel.multiply(a, b, alpha=alpha, beta=beta, c=c, out=out)
            c, beta = out, 1.0
        kernel.wait()
        if not direct and out is not None:
            target.copy_(out)
        self._forget()

    def _block(
        self, kernel: Kernel, name: str, operand: torch.Tensor, tile: Tile, rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        """Part of an operand on the kernel's device, in what is computed in; where there is memory, as it is mapped."""
        part = operand[tile.batch][rows[0] : rows[1], columns[0] : columns[1]]
        dtype = getattr(torch, self.plan.compute_dtype)
        if not self.plan.tight and kernel.device == "cpu" and part.dtype == dtype:
            return part
        nbytes = part.numel() * dtype.itemsize

        def read() -> torch.Tensor:
            block = torch.empty(part.shape, dtype=dtype, device=kernel.device)
            for piece, copy in zip(_pieces(part), _pieces(block, part), strict=True):
                copy.copy_(piece)
                self._forget()
            return block

        return self._blocks.get((name, tile.batch, rows, columns), nbytes, read)

    def _target(self, tile: Tile) -> torch.Tensor:
        """Where a tile belongs: in the product, or beside the other parts of its sum."""
        if self._partials is not None:
            return _part(self._partials.tensor[tile.split], tile)
        return _part(self._product.tensor, tile)

    def _sum(self, tile: Tile, partials: Mapped) -> None:
        plan = self.plan
        total = _part(partials.tensor[0], tile).clone()
        for split in range(1, plan.splits):
            total += _part(partials.tensor[split], tile)
        number = float if total.is_floating_point() else int
        total *= number(plan.alpha)
        if self._c is not None:
            total += _part(self._c, tile).to(total.dtype) * number(plan.beta)
        _part(self._product.tensor, tile).copy_(total)
        self._forget()

    def kernel(self) -> Kernel:
        """What tiles are computed with here. Raises KernelUnavailable."""
        return plan_kernel(self.plan)

    def _forget(self) -> None:
        if self.plan.tight:
            for file in (*self._files, self._product, *filter(None, (self._partials,))):
                file.forget()

    def close(self) -> None:
        self.board.close()


def plan_kernel(plan: Plan) -> Kernel:
    """Raises KernelUnavailable."""
    return choose(plan.device, plan.compute_dtype, plan.tile_m, plan.tile_k, plan.tile_n, name=plan.kernel)


def prepare(folder: Folder, job: str, plan: Plan) -> Path:
    """Make what the workers of a job share; what is there already stays, so that a job goes on where it was.

    Raises OSError where there is too little space.
    """
    where = folder.shared(job)
    path = product_path(where, plan)
    if not (where / PLAN).exists():
        create(path, plan.shapes.out_dtype, plan.shapes.product)
        if plan.splits > 1:
            create(where / PARTIALS, plan.sum_dtype, (plan.splits, *plan.shapes.product))
        Board.make(where / BOARD, plan.entries)
        scratch = where / f".{PLAN}"
        scratch.write_text(plan.model_dump_json())
        scratch.replace(where / PLAN)  # last: now the job is there
    return path


def product_path(where: Path, plan: Plan) -> Path:
    return where / ("product.safetensors" if plan.shapes.out_dtype == "bfloat16" else "product.npy")


def _pieces(part: torch.Tensor, like: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """A part of a mapped matrix, piece by piece: to read some of each row, the kernel maps all of them."""
    strides = (like if like is not None else part).stride()
    dimension = 0 if strides[0] >= strides[1] else 1
    step = max(1, MAPPED // max(1, strides[dimension] * (like if like is not None else part).element_size()))
    for start in range(0, part.shape[dimension], step):
        yield part.narrow(dimension, start, min(step, part.shape[dimension] - start))


def _part(matrix: torch.Tensor, tile: Tile) -> torch.Tensor:
    return matrix[tile.batch][tile.rows[0] : tile.rows[1], tile.columns[0] : tile.columns[1]]


def _steps(inner: tuple[int, int], step: int) -> Iterator[tuple[int, int]]:
    for start in range(inner[0], inner[1], step):
        yield start, min(start + step, inner[1])

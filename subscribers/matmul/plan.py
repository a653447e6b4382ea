"""How a product is cut into tiles that workers share. C is stationary: a tile of C is computed by one worker, which
goes along k, so that a product needs no reduction; only where C has too few tiles for the workers is k split as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline import Reject
from pipeline.catalog import MatmulJob, TensorFile

from ..kernels import DTYPES, expected_scalars, result_dtype

__all__ = ["Plan", "Shapes", "Tile", "check"]

STEP = 128
"""Tiles are multiples of this, where C is not smaller."""
SMALLEST, LARGEST = 256, 2048
"""One core multiplies tiles of 1024 as fast as the whole, and tiles of 512 a fifth slower (4096³, float32, MKL)."""
ENOUGH_TILES = 16
"""So many tiles share well among a few workers…"""
FEW_TILES = 8
"""…and with fewer than these k is split, too."""
LEAST_K = 2048
"""How much of k a split must hold: writing and adding up a partial product costs about as much as 100 steps of k."""
STRIP = 4
"""Tiles of one row of C in a frame at most; see `Plan.strips`."""

WIDE = {"float16": "float32", "bfloat16": "float32"}
"""What partial products are computed and added up in."""
ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


class Shapes(BaseModel):
    """What is multiplied, once it is known to fit: op(A) [*batch, m, k], op(B) [*batch, k, n]."""

    model_config = ConfigDict(frozen=True)

    m: int
    k: int
    n: int
    batch: tuple[int, ...]
    dtype: str

    @property
    def product(self) -> tuple[int, ...]:
        return (*self.batch, self.m, self.n)

    @property
    def out_dtype(self) -> str:
        return result_dtype(self.dtype)

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n * math.prod(self.batch)

    @property
    def out_nbytes(self) -> int:
        return math.prod(self.product) * ITEMSIZE[self.out_dtype]


def check(job: MatmulJob, a: Any, b: Any, c: Any | None) -> Shapes:
    """`a`, `b` and `c` have `shape` and `dtype`. Raises Reject saying what was expected."""
    a_dtype, b_dtype = _name(a.dtype), _name(b.dtype)
    if a_dtype != b_dtype or a_dtype not in DTYPES:
        raise Reject(f"A is {a_dtype} and B {b_dtype}; expected both of one dtype of {', '.join(DTYPES)}")
    a_shape, b_shape = tuple(a.shape), tuple(b.shape)
    if len(a_shape) >= 2 and job.transpose_a:
        a_shape = (*a_shape[:-2], a_shape[-1], a_shape[-2])
    if len(b_shape) >= 2 and job.transpose_b:
        b_shape = (*b_shape[:-2], b_shape[-1], b_shape[-2])
    of = ("op(A)" if job.transpose_a else "A", "op(B)" if job.transpose_b else "B")
    shown = f"{of[0]} has shape {list(a_shape)} and {of[1]} {list(b_shape)}"
    if len(a_shape) < 2 or len(b_shape) < 2 or a_shape[-1] != b_shape[-2]:
        raise Reject(f"{shown}; expected [..., m, k] and [..., k, n]")
    try:
        batch = np.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    except ValueError:
        raise Reject(f"{shown}; expected leading dimensions that broadcast") from None
    shapes = Shapes(m=a_shape[-2], k=a_shape[-1], n=b_shape[-1], batch=batch, dtype=a_dtype)
    if expected := expected_scalars(a_dtype, job.alpha, job.beta):
        raise Reject(f"alpha is {job.alpha} and beta {job.beta}; expected {expected}, as A and B are {a_dtype}")
    if job.beta and c is None:
        raise Reject(f"beta is {job.beta} and there is no C; expected one of shape {list(shapes.product)}")
    if c is not None and not (_name(c.dtype) == shapes.out_dtype and _broadcasts(tuple(c.shape), shapes.product)):
        raise Reject(
            f"C is {_name(c.dtype)} of shape {list(c.shape)}; expected {shapes.out_dtype} of shape "
            f"{list(shapes.product)} or one that broadcasts to it"
        )
    return shapes


class Tile(BaseModel):
    """Rows and columns of C that one worker computes, over a part of k: half-open ranges."""

    model_config = ConfigDict(frozen=True)

    batch: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    inner: tuple[int, int]
    split: int
    corner: int
    """Which tile of C, counted as the tiles of the first split."""


class Plan(BaseModel):
    """A product in tiles: what all its workers know of it."""

    model_config = ConfigDict(frozen=True)

    shapes: Shapes
    a: TensorFile
    b: TensorFile
    c: TensorFile | None
    alpha: float
    beta: float
    transpose_a: bool
    transpose_b: bool
    device: Literal["auto", "cpu", "cuda"]
    kernel: str | None
    tile_m: int
    tile_n: int
    tile_k: int
    """How much of k is held at a time."""
    splits: int
    tight: bool
    """Operands and product take more memory than a worker may hold."""

    @classmethod
    def of(cls, job: MatmulJob, shapes: Shapes, operands: list[TensorFile], nbytes: int, memory: int) -> Plan:
        """`operands`: A, B and perhaps C; `nbytes`: theirs and the product's; `memory`: a worker's, in bytes."""
        tile_m, tile_n = _tile(shapes, memory)
        corners = math.prod(shapes.batch) * _parts(shapes.m, tile_m) * _parts(shapes.n, tile_n)
        splits = max(1, min(FEW_TILES // max(1, corners), shapes.k // LEAST_K)) if corners < FEW_TILES else 1
        room = memory - 2 * tile_m * tile_n * _wide_itemsize(shapes.dtype)
        tile_k = max(STEP, room // (2 * (tile_m + tile_n) * _wide_itemsize(shapes.dtype)) // STEP * STEP)
        return cls(
            shapes=shapes, a=operands[0], b=operands[1], c=operands[2] if len(operands) > 2 else None,
            alpha=job.alpha, beta=job.beta, transpose_a=job.transpose_a, transpose_b=job.transpose_b,
            device=job.device, kernel=job.kernel, tile_m=tile_m, tile_n=tile_n,
            tile_k=max(1, min(tile_k, _split(shapes.k, splits))), splits=splits, tight=nbytes > memory,
        )  # fmt: skip

    @cached_property
    def columns(self) -> int:
        """Tiles side by side in C."""
        return _parts(self.shapes.n, self.tile_n)

    @cached_property
    def corners(self) -> int:
        """Tiles of C."""
        return math.prod(self.shapes.batch) * _parts(self.shapes.m, self.tile_m) * self.columns

    @property
    def tiles(self) -> int:
        return self.corners * self.splits

    @property
    def compute_dtype(self) -> str:
        """What tiles are computed in: wider than A and B where partial products are added up."""
        dtype = self.shapes.dtype
        return dtype if self.tile_k >= self.shapes.k else WIDE.get(dtype, dtype)

    @property
    def sum_dtype(self) -> str:
        """What partial products are added up in."""
        return result_dtype(self.compute_dtype)

    def final(self, index: int) -> int:
        """The board's entry for the tile of C that a tile is part of: itself, or the sum of its partial products."""
        return index if self.splits == 1 else self.tiles + index % self.corners

    @property
    def finals(self) -> slice:
        return slice(0, self.corners) if self.splits == 1 else slice(self.tiles, self.entries)

    @property
    def entries(self) -> int:
        """Of the board."""
        return self.tiles if self.splits == 1 else self.tiles + self.corners

    def tile(self, index: int) -> Tile:
        """Raises IndexError."""
        if not 0 <= index < self.tiles:
            raise IndexError(f"tile {index} of {self.tiles}")
        split, corner = divmod(index, self.corners)
        row, column = divmod(corner, self.columns)
        batch, row = divmod(row, _parts(self.shapes.m, self.tile_m))
        return Tile(
            batch=tuple(int(one) for one in np.unravel_index(batch, self.shapes.batch)) if self.shapes.batch else (),
            rows=_range(row, self.tile_m, self.shapes.m),
            columns=_range(column, self.tile_n, self.shapes.n),
            inner=_range(split, _split(self.shapes.k, self.splits), self.shapes.k),
            split=split,
            corner=corner,
        )

    def strips(self) -> Iterator[list[int]]:
        """The tiles in the order in which they are best computed, cut where one worker may leave off for another.

        A strip lies in one row of C, so that these rows of A are read once for it; rows are gone through to and fro, so
        that the columns of B read last are those needed first.
        """
        length = max(1, min(STRIP, self.tiles // (4 * FEW_TILES)))
        for row in range(self.tiles // self.columns):
            indexes = list(range(row * self.columns, (row + 1) * self.columns))
            if row % 2:
                indexes.reverse()
            for start in range(0, len(indexes), length):
                yield indexes[start : start + length]


def _tile(shapes: Shapes, memory: int) -> tuple[int, int]:
    """Square, so that every number read is used most often; many enough to share, few enough to be worth an event."""
    itemsize = _wide_itemsize(shapes.dtype)
    spread = math.isqrt(max(1, math.prod(shapes.product) // ENOUGH_TILES))
    fits = math.isqrt(memory // (8 * itemsize))
    side = max(SMALLEST, min(_parts(spread, STEP), fits // STEP, LARGEST // STEP) * STEP)
    return max(1, min(side, shapes.m)), max(1, min(side, shapes.n))


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _split(k: int, splits: int) -> int:
    return max(1, _parts(k, splits))


def _range(index: int, part: int, size: int) -> tuple[int, int]:
    return min(index * part, size), min((index + 1) * part, size)


def _wide_itemsize(dtype: str) -> int:
    return ITEMSIZE[WIDE.get(result_dtype(dtype), result_dtype(dtype))]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")

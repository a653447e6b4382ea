"""`triton`: tensor cores, by Triton. float16 and bfloat16, summed in float32; float32 is rounded to TF32 (10 bits).

A block computes a tile of C over slices of k that are fetched some stages ahead (P. Tillet, H. T. Kung and D. Cox,
"Triton: an intermediate language and compiler for tiled neural network computations", MAPL 2019). Blocks are numbered
so that those under way together share rows of A and columns of B in the second-level cache. Where C has fewer tiles
than the device has multiprocessors, k is split between several blocks, whose sums are added in a fixed order.

With TRITON_INTERPRET=1, set before the first import of triton, it runs on the CPU in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from . import tuning

__all__ = ["SIMULATED", "TILES", "Tile", "compiled", "multiply"]

SIMULATED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes, [rows, columns] of C, in slices of `depth`, by `warps` warps, with `stages` in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = (
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 64, 4, 5),
    Tile(32, 64, 64, 4, 5),
)
"""What is tried; for float32 at half the depth. Those that a device lacks the shared memory for are passed over."""
GROUP = 8
"""Rows of tiles that are walked together."""
MAX_SPLITS = 16
SLICES = 4
"""A block does at least so many, or splitting costs more than it gains."""


def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    _run(a, b, out, alpha, beta, _tile(a, b))


def compiled(dtype: str, capability: tuple[int, int], tile: Tile = TILES[2]) -> Any:
    """The kernel for aligned contiguous matrices, compiled ahead of time: `asm["ptx"]`, `asm["cubin"]`, `metadata`."""
    kinds = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    tile = tile_for(dtype, tile)
    constants = {**_constants(tile, splits=1, adds=False, whole=True), "a_column": 1, "b_column": 1, "out_column": 1}
    pointers = ("a", "b", "out")
    sizes = ("m", "n", "k", *(f"{one}_{stride}" for one in pointers for stride in ("batch", "row")))
    signature = dict.fromkeys(_product.arg_names, "i32")
    signature |= dict.fromkeys(pointers, f"*{kinds[dtype]}") | {"alpha": "fp32", "beta": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(_product.arg_names.index(one),): [["tt.divisibility", 16]] for one in pointers + sizes}
    source = ASTSource(fn=_product, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})


def tile_for(dtype: str, tile: Tile) -> Tile:
    return Tile(tile.rows, tile.columns, tile.depth // 2, tile.warps, tile.stages) if dtype == "float32" else tile


def _tile(a: torch.Tensor, b: torch.Tensor) -> Tile:
    """The fastest here for this dtype and shape class, measured once and kept as `choose`'s choices."""
    if SIMULATED:
        return Tile(16, 16, 16, 1, 1)
    dtype = str(a.dtype).removeprefix("torch.")
    key = f"{dtype} " + " ".join(map(str, tuning.shape_class(a.shape[1], a.shape[2], b.shape[2])))

    def measure() -> dict[str, int]:
        out = torch.empty((len(a), a.shape[1], b.shape[2]), dtype=a.dtype, device=a.device)
        seconds: dict[Tile, float] = {}
        for tile in (tile_for(dtype, one) for one in TILES):
            try:
                seconds[tile] = triton.testing.do_bench(partial(_run, a, b, out, 1.0, 0.0, tile), warmup=5, rep=20)
            except OutOfResources:
                continue
        return asdict(min(seconds, key=seconds.__getitem__))

    return Tile(**tuning.known("cuda", "tiles", key, measure))


def _run(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float, tile: Tile) -> None:
    (batch, m, k), n = a.shape, b.shape[2]
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    splits = _splits(tiles * batch, k, tile.depth)
    if splits == 1:
        _launch(a, b, out, alpha, beta, tile, splits)
        return
    sums = torch.empty((splits, batch, m, n), dtype=torch.float32, device=out.device)
    _launch(a, b, sums.view(-1, m, n), 1.0, 0.0, tile, splits)
    product = sums.sum(0).mul_(alpha)
    out.copy_(product if beta == 0 else product.add_(out, alpha=beta))


def _launch(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float, tile: Tile, splits: int
) -> None:
    (batch, m, k), n = a.shape, b.shape[2]
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns) * splits * batch,)
    constants = _constants(tile, splits, adds=beta != 0, whole=k % (tile.depth * splits) == 0)
    strides = (*a.stride(), *b.stride(), *out.stride())
    _product[grid](
        a, b, out, m, n, k, batch, *strides, alpha, beta, **constants, num_warps=tile.warps, num_stages=tile.stages
    )


def _splits(tiles: int, k: int, depth: int) -> int:
    """A power of two, as high as fills the device while every block still has slices to do."""
    processors = 8 if SIMULATED else torch.cuda.get_device_properties().multi_processor_count
    splits = 1
    while tiles * splits * 2 <= processors and k >= SLICES * depth * splits * 2 and splits < MAX_SPLITS:
        splits *= 2
    return splits


def _constants(tile: Tile, splits: int, adds: bool, whole: bool) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP_ROWS": GROUP,
        "SPLITS": splits,
        "ADDS": adds,
        "WHOLE": whole,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    a,
    b,
    out,
    m,
    n,
    k,
    batch,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    out_batch,
    out_row,
    out_column,
    alpha,
    beta,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    GROUP_ROWS: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    ADDS: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
):
    """A tile of out[split · batch + index]: alpha · A · B over this split's part of k, + beta · out if ADDS.

    WHOLE: the slices cover k exactly, so none is masked.
    """
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    product, block = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    group = block // (GROUP_ROWS * across)
    height = min(down - group * GROUP_ROWS, GROUP_ROWS)
    top = (group * GROUP_ROWS + block % (GROUP_ROWS * across) % height) * ROWS
    left = block % (GROUP_ROWS * across) // height * COLUMNS
    index, split = (product % batch).to(tl.int64), product // batch

    rows, columns, depth = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    part = tl.cdiv(tl.cdiv(k, DEPTH), SPLITS) * DEPTH
    start, stop = split * part, min(k, split * part + part)
    # Rows and columns beyond the edge are those at the beginning once more, and are not stored.
    a_rows, b_columns = (rows % m).to(tl.int64), (columns % n).to(tl.int64)
    slices = (start + depth).to(tl.int64)
    a_at = a + index * a_batch + a_rows[:, None] * a_row + slices[None, :] * a_column
    b_at = b + index * b_batch + slices[:, None] * b_row + b_columns[None, :] * b_column

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(start, stop, DEPTH):
        if WHOLE:
            left_factor, right_factor = tl.load(a_at), tl.load(b_at)
        else:
            left_factor = tl.load(a_at, mask=(at + depth < stop)[None, :], other=0.0)
            right_factor = tl.load(b_at, mask=(at + depth < stop)[:, None], other=0.0)
        total = tl.dot(left_factor, right_factor, total, input_precision="tf32")
        a_at += DEPTH * a_column
        b_at += DEPTH * b_row

    out_at = (
        out + product.to(tl.int64) * out_batch + rows.to(tl.int64)[:, None] * out_row + columns[None, :] * out_column
    )
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    total *= alpha
    if ADDS:
        total += beta * tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)

"""`cuda-naive`, `cuda-tiled`, `cuda-register`: three rungs from a thread an element to registers, by Numba.

Each rung multiplies the arithmetic done per number fetched: naive 1 (every factor comes from global memory), tiled
`TILE` (from shared memory), register 64 / 16 = 4 times more (from a thread's own registers). The steps are those of
S. Boehm, "How to optimize a CUDA matmul kernel for cuBLAS-like performance" (2022), after V. Volkov and J. Demmel,
"Benchmarking GPUs to tune dense linear algebra" (SC '08).

All take any strides and any shape: a block steps over ceil(k / depth) slices, and what lies outside the matrices is
loaded as 0. Two barriers a slice: no thread reads a tile before all have written it, none overwrites it before all have
read it.

With NUMBA_ENABLE_CUDASIM=1, set before the first import of numba, they run on the CPU in Numba's simulator, a thread
of Python for each of the GPU's, with smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import torch
from numba import cuda, types

__all__ = ["SIMULATED", "multiply", "ptx", "threads"]

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
TILE = 8 if SIMULATED else 32
ALIGNMENT = None if SIMULATED else 16
"""Of tiles in shared memory, in bytes: 128-bit loads need it, and the simulator knows none."""
BLOCKS = 2
"""Of `cuda-register` on a multiprocessor at once, so that one computes while the other waits: at most 128 registers."""
MAX_GRID = 65535

_SUMMED_IN = {
    "float64": types.float64,
    "float32": types.float32,
    "float16": types.float32,
    "int64": types.int64,
    "int32": types.int32,
    "int8": types.int32,
}


@dataclass(frozen=True, slots=True)
class Blocking:
    """Of `cuda-register`: a block computes [rows, columns] of C, a thread [height, width], in slices of `depth`."""

    rows: int
    columns: int
    depth: int
    height: int
    width: int

    @property
    def threads(self) -> int:
        return self.rows // self.height * (self.columns // self.width)


def blocking(dtype: str) -> Blocking:
    if SIMULATED:
        return Blocking(16, 16, 4, 8, 8)
    if dtype in ("float64", "int64"):
        return Blocking(64, 64, 8, 4, 4)
    return Blocking(128, 128, 8, 8, 8)


def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
    dtype = str(a.dtype).removeprefix("torch.")
    (batch, m, _), n = a.shape, b.shape[-1]
    summed_in = _SUMMED_IN[dtype]
    if name == "cuda-register":
        plan = blocking(dtype)
        kernel = _register(dtype, _vectors(a) and _vectors(b), beta != 0)
        rows, columns, block = plan.rows, plan.columns, (plan.threads, 1)
    else:
        kernel = (_naive if name == "cuda-naive" else _tiled)(dtype)
        rows, columns, block = TILE, TILE, (TILE, TILE)
    grid = (-(-m // rows) * -(-n // columns), min(batch, MAX_GRID))
    scalars = (summed_in(alpha), summed_in(beta))
    if SIMULATED:
        kernel[grid, block](*(FakeCUDAArray(one.numpy()) for one in (a, b, out)), *scalars)
    else:
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        arrays = [cuda.as_cuda_array(one.detach(), sync=False) for one in (a, b, out)]
        kernel[grid, block, stream](*arrays, *scalars)


def threads(name: str, dtype: str) -> int:
    """In a block."""
    return blocking(dtype).threads if name == "cuda-register" else TILE * TILE


def ptx(name: str, dtype: str, capability: tuple[int, int]) -> str:
    """The kernel for contiguous matrices, compiled ahead of time for a compute capability, such as (9, 0)."""
    kernel = {"cuda-naive": _naive, "cuda-tiled": _tiled, "cuda-register": _register}[name](dtype)
    element, summed_in = getattr(types, dtype), _SUMMED_IN[dtype]
    operand = types.Array(element, 3, "C")
    product = types.Array(summed_in if dtype == "int8" else element, 3, "C")
    signature = types.void(operand, operand, product, summed_in, summed_in)
    options = {name: value for name, value in kernel.targetoptions.items() if name == "launch_bounds"}
    text, _ = cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=capability, output="ptx", **options)
    return str(text)


@cache
def _naive(dtype: str) -> Any:
    """A thread an element of C. Neighbouring threads take neighbouring columns, so their loads of B coalesce."""
    summed_in, tile = _SUMMED_IN[dtype], TILE

    def naive(a: Any, b: Any, out: Any, alpha: Any, beta: Any) -> None:
        batch, m, k = a.shape
        n = b.shape[2]
        across = (n + tile - 1) // tile
        row = cuda.blockIdx.x // across * tile + cuda.threadIdx.y
        column = cuda.blockIdx.x % across * tile + cuda.threadIdx.x
        if row < m and column < n:
            for index in range(cuda.blockIdx.y, batch, cuda.gridDim.y):
                total = summed_in(0)
                for p in range(k):
                    total += summed_in(a[index, row, p]) * summed_in(b[index, p, column])
                if beta == 0:
                    out[index, row, column] = alpha * total
                else:
                    out[index, row, column] = alpha * total + beta * summed_in(out[index, row, column])

    return cuda.jit(naive)


@cache
def _tiled(dtype: str) -> Any:
    """A block a tile of C; the tiles of A and B that it needs pass through shared memory."""
    summed_in, tile = _SUMMED_IN[dtype], TILE
    shape = (tile, tile)

    def tiled(a: Any, b: Any, out: Any, alpha: Any, beta: Any) -> None:
        a_tile = cuda.shared.array(shape, summed_in)
        b_tile = cuda.shared.array(shape, summed_in)
        batch, m, k = a.shape
        n = b.shape[2]
        across = (n + tile - 1) // tile
        y, x = cuda.threadIdx.y, cuda.threadIdx.x
        row = cuda.blockIdx.x // across * tile + y
        column = cuda.blockIdx.x % across * tile + x
        for index in range(cuda.blockIdx.y, batch, cuda.gridDim.y):
            total = summed_in(0)
            for start in range(0, k, tile):
                a_tile[y, x] = summed_in(a[index, row, start + x]) if row < m and start + x < k else summed_in(0)
                b_tile[y, x] = summed_in(b[index, start + y, column]) if start + y < k and column < n else summed_in(0)
                cuda.syncthreads()
                for p in range(tile):
                    total += a_tile[y, p] * b_tile[p, x]
                cuda.syncthreads()
            if row < m and column < n:
                if beta == 0:
                    out[index, row, column] = alpha * total
                else:
                    out[index, row, column] = alpha * total + beta * summed_in(out[index, row, column])

    return cuda.jit(tiled)


@cache
def _register(dtype: str, vectors: bool = True, adds: bool = False) -> Any:
    """A thread a tile of C, kept in registers: for every `height + width` numbers from shared memory, their products.

    A thread's rows and columns come in chunks of neighbours, loaded from shared memory by one instruction, and the
    chunks of a warp lie side by side. Tiles of A are stored transposed, a chunk apart from a multiple of the banks.
    vectors: load 128 bits at a time from global memory too; A and B must be aligned, see `_vectors`.
    adds: whether beta is not 0. Decided outside, because both ways at once take twice the registers at the end.
    """
    summed_in, plan, alignment = _SUMMED_IN[dtype], blocking(dtype), ALIGNMENT
    rows, columns, depth, height, width = plan.rows, plan.columns, plan.depth, plan.height, plan.width
    team, across_block = plan.threads, columns // width
    chunk = vector = vector_width(dtype)
    from_global, from_shared, one_from_global, store = _loader(vector, 1), _loader(chunk, 3), _loader(1, 1), _storer()
    a_vectors, b_vectors = rows * depth // vector // team, depth * columns // vector // team
    a_row, b_row = depth // vector, columns // vector
    a_shape, b_shape = (depth, rows + chunk), (depth, columns)
    high, wide = height // chunk, width // chunk
    row_step, column_step = rows // high, columns // wide

    def register(a: Any, b: Any, out: Any, alpha: Any, beta: Any) -> None:
        a_tile = cuda.shared.array(a_shape, summed_in, alignment)
        b_tile = cuda.shared.array(b_shape, summed_in, alignment)
        a_part = cuda.local.array(height, summed_in)
        b_part = cuda.local.array(width, summed_in)
        total = cuda.local.array((height, width), summed_in)
        batch, m, k = a.shape
        n = b.shape[2]
        across = (n + columns - 1) // columns
        top = cuda.blockIdx.x // across * rows
        left = cuda.blockIdx.x % across * columns
        thread = cuda.threadIdx.x
        y, x = thread // across_block * chunk, thread % across_block * chunk
        for index in range(cuda.blockIdx.y, batch, cuda.gridDim.y):
            for i in range(height):
                for j in range(width):
                    total[i, j] = summed_in(0)
            for start in range(0, k, depth):
                for step in range(a_vectors):
                    position = step * team + thread
                    i, p = position // a_row, position % a_row * vector
                    row, column = top + i, start + p
                    if vectors and row < m and column + vector <= k:
                        values = from_global(a, (index, row, column))
                        for v in range(vector):
                            a_tile[p + v, i] = summed_in(values[v])
                    else:
                        for v in range(vector):
                            inside = row < m and column + v < k
                            a_tile[p + v, i] = summed_in(a[index, row, column + v]) if inside else summed_in(0)
                for step in range(b_vectors):
                    position = step * team + thread
                    p, j = position // b_row, position % b_row * vector
                    row, column = start + p, left + j
                    if vectors and row < k and column + vector <= n:
                        values = from_global(b, (index, row, column))
                        for v in range(vector):
                            b_tile[p, j + v] = summed_in(values[v])
                    else:
                        for v in range(vector):
                            inside = row < k and column + v < n
                            b_tile[p, j + v] = summed_in(b[index, row, column + v]) if inside else summed_in(0)
                cuda.syncthreads()
                for p in range(min(depth, k - start)):
                    for part in range(high):
                        values = from_shared(a_tile, (p, part * row_step + y))
                        for v in range(chunk):
                            a_part[part * chunk + v] = values[v]
                    for part in range(wide):
                        values = from_shared(b_tile, (p, part * column_step + x))
                        for v in range(chunk):
                            b_part[part * chunk + v] = values[v]
                    for i in range(height):
                        for j in range(width):
                            total[i, j] += a_part[i] * b_part[j]
                cuda.syncthreads()
            for i in range(height):
                row = top + i // chunk * row_step + y + i % chunk
                if row < m:
                    for j in range(width):
                        column = left + j // chunk * column_step + x + j % chunk
                        if column < n:
                            value = alpha * total[i, j]
                            if adds:
                                value += beta * summed_in(one_from_global(out, (index, row, column))[0])
                            store(out, (index, row, column), value)

    return cuda.jit(register, **({} if SIMULATED else {"launch_bounds": (team, BLOCKS)}))


def vector_width(dtype: str) -> int:
    """Neighbours along a row that are loaded at once: 128 bits of the wider types, four of the narrower."""
    return 2 if dtype in ("float64", "int64") else 4


def _vectors(matrices: torch.Tensor) -> bool:
    """Whether rows are contiguous and every one begins where a vector may."""
    width = vector_width(str(matrices.dtype).removeprefix("torch."))
    *outer, inner = matrices.stride()
    address = matrices.data_ptr()
    return inner == 1 and address % (width * matrices.element_size()) == 0 and not any(s % width for s in outer)


if SIMULATED:
    from numba.cuda.cudadrv.devicearray import FakeCUDAArray

    def _loader(width: int, space: int) -> Any:
        return lambda array, index: [array[(*index[:-1], index[-1] + v)] for v in range(width)]

    def _storer() -> Any:
        def store(array: Any, index: Any, value: Any) -> None:
            array[index] = value

        return store

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    @cache
    def _loader(width: int, space: int) -> Any:
        """A function (array, index) → tuple of the `width` neighbours from there, by one instruction.

        space: where the array lies, as LLVM numbers it for NVIDIA: 1 global, 3 shared.
        """

        def typer(context: Any, array: Any, index: Any) -> Any:
            return types.UniTuple(array.dtype, width)(array, index), generate

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array_type = signature.args[0]
            pointer = _pointer(context, builder, signature, arguments, space)
            element = context.get_data_type(array_type.dtype)
            vector = ir.PointerType(ir.VectorType(element, width), addrspace=space)
            loaded = builder.load(builder.bitcast(pointer, vector))
            loaded.align = width * array_type.dtype.bitwidth // 8
            values = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), lane)) for lane in range(width)]
            return context.make_tuple(builder, signature.return_type, values)

        return intrinsic(typer)

    @cache
    def _storer() -> Any:
        """A procedure (array, index, value) that writes to global memory."""

        def typer(context: Any, array: Any, index: Any, value: Any) -> Any:
            return types.void(array, index, value), generate

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
            builder.store(value, _pointer(context, builder, signature, arguments, 1))
            return context.get_dummy_value()

        return intrinsic(typer)

    def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, space: int) -> Any:
        """Of array[index], both the first arguments."""
        array_type, index_type = signature.args[:2]
        array = context.make_array(array_type)(context, builder, arguments[0])
        indices = [
            context.cast(builder, value, kind, types.intp)
            for value, kind in zip(cgutils.unpack_tuple(builder, arguments[1]), index_type, strict=True)
        ]
        pointer = cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)
        return builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, addrspace=space))

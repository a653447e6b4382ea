"""Matrix products as jobs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "MatmulJob",
    "MatmulResult",
    "MatmulTile",
    "Operand",
    "ProductOf",
    "SystolicCycle",
    "TensorFile",
    "TileProgress",
    "matmul_jobs",
    "matmul_progress",
    "matmul_results",
    "matmul_tiles",
    "systolic_cycles",
]


class TensorFile(Event):
    """A tensor in a file that the workers share: below their PIPELINE_MATMUL_DIR, and nowhere else."""

    file: str
    """A `.npy` or `.safetensors` file, relative to that directory."""
    name: str = ""
    """Which tensor of a `.safetensors` file; "" where it holds one."""


class ProductOf(Event):
    """The product of an earlier job that ran with `result="file"`."""

    job: str
    """Id of the job's event."""


Operand = Tensor | TensorFile | ProductOf


class MatmulJob(Event):
    """alpha · op(A) · op(B) + beta · C, where op is nothing or the transposition of the last two dimensions."""

    a: Operand
    """op(A) has shape [..., m, k]; float64, float32, float16, bfloat16, int64, int32 or int8."""
    b: Operand
    """op(B) has shape [..., k, n] and A's dtype; leading dimensions broadcast."""
    c: Operand | None = None
    """Shape [..., m, n] or what broadcasts to it, dtype of the product: A's, or int32 where that is int8."""
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    beta: float = Field(default=0.0, allow_inf_nan=False)
    transpose_a: bool = False
    transpose_b: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernel: str | None = None
    """None: the fastest, by measurement."""
    result: Literal["none", "event", "file"] = "none"
    """Where the product goes: nowhere, into the result event, or into a file that the result event names.

    Where the job is a request, the answer has the product, and what is published on `matmul.results` only its figures.
    """
    blocks: Literal["auto", "never", "always"] = "auto"
    """Whether the workers share the product, tile by tile. auto: when one worker's memory is too small for it."""


class MatmulResult(Event):
    job: str
    """Id of the job's event."""
    m: int
    k: int
    n: int
    batch: list[int] = Field(default_factory=list)
    """Leading dimensions of the product."""
    dtype: str
    """Of A and B."""
    device: str
    kernel: str
    seconds: float
    """Of computing; of a product in tiles, from the first to the last one."""
    gflops: float
    """2·m·k·n·(batch) / seconds / 1e9"""
    peak_share: float | None = None
    """0…1: gflops over what the device was measured to reach; of a product in tiles, while a worker computed."""
    product: Tensor | None = None
    """With `result="event"`: [..., m, n]."""
    file: str = ""
    """With `result="file"`: where the product is, relative to PIPELINE_MATMUL_DIR."""
    tiles: int = 1
    recomputed: int = 0
    """Tiles that were begun a second time, because their worker died."""


class MatmulTile(Event):
    """One tile of a product that the workers share: what `matmul.jobs`' worker asks of all of them."""

    job: str
    """Id of the job's event."""
    index: int = Field(ge=0)
    """Which tile of the job's plan."""


class TileProgress(Event):
    """A tile is done."""

    job: str
    """Id of the job's event."""
    done: int
    """Tiles so far."""
    total: int
    m: int
    k: int
    n: int
    worker: str
    seconds: float
    """What this tile took."""


matmul_jobs: Channel[MatmulJob] = Channel("matmul.jobs", MatmulJob, reply=MatmulResult, frame=1, keep=10.0)


matmul_results: Channel[MatmulResult] = Channel("matmul.results", MatmulResult)


matmul_tiles: Channel[MatmulTile] = Channel("matmul.tiles", MatmulTile, frame=16, keep=10.0)
"""A frame holds tiles of one row of C, side by side: who takes it reads these rows of A once."""


matmul_progress: Channel[TileProgress] = Channel("matmul.progress", TileProgress, durable=False)


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

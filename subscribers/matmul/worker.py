"""What one process of matmul workers does with its one computing thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch

from pipeline import Reject, Retry, Tensor
from pipeline.catalog import MatmulJob, MatmulResult, Operand, TensorFile
from pipeline.settings import Settings

from ..kernels import KernelUnavailable, best_device, choose, measured_peak, share_of_peak
from .board import Board, fail, failure
from .files import Folder, open_tensor, save
from .plan import Plan, Shapes, check
from .tiles import BOARD, PLAN, SharedProduct, plan_kernel, prepare, product_path

__all__ = ["Work", "Worker"]

logger = logging.getLogger("subscribers.matmul")

T = TypeVar("T")

FREE_SHARE = 4
"""Of the memory that is free, one part in so many is used by default."""
ASIDE = 0.5
"""Seconds after which a tile that another worker computes is looked at again."""


class Work:
    """A job with its operands at hand: what it is, and what it takes."""

    def __init__(self, job: MatmulJob, folder: Folder, limit: int) -> None:
        """Raises Reject saying what was expected."""
        self.job = job
        self.tensors = [_tensor(operand, folder) for operand in (job.a, job.b, job.c) if operand is not None]
        self.shapes = check(job, self.tensors[0], self.tensors[1], self.tensors[2] if job.c is not None else None)
        if job.result == "event" and self.shapes.out_nbytes > limit:
            raise Reject(
                f"the product takes {self.shapes.out_nbytes:,} bytes, and an event at most {limit:,} "
                "(PIPELINE_MAX_FRAME_BYTES); expected result='file'"
            )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + self.shapes.out_nbytes

    def operands(self) -> list[torch.Tensor]:
        """op(A), op(B), and C if there is one."""
        a, b, *c = self.tensors
        return [a.mT if self.job.transpose_a else a, b.mT if self.job.transpose_b else b, *c]


Empty = Callable[[tuple[int, ...], str], npt.NDArray[Any]]
"""Memory for a product, by shape and dtype; see Pipeline.empty."""


class Worker:
    """Raises Reject, from whatever it is asked to do, for jobs that cannot be."""

    def __init__(self, options: Settings, empty: Empty = np.empty) -> None:
        self.folder = Folder(options.matmul_folder)
        self.memory = options.matmul_memory or psutil.virtual_memory().available // FREE_SHARE
        self.stopping = False
        self._limit = options.max_frame_bytes
        self._empty = empty
        self._shared: SharedProduct | None = None
        self._shared_job = ""
        threads = options.matmul_threads
        self._thread = ThreadPoolExecutor(1, "matmul", initializer=torch.set_num_threads, initargs=(threads,))

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """In the computing thread, which does one thing at a time: kernels have the threads they are told to have."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def open(self, job: MatmulJob) -> Work:
        return Work(job, self.folder, self._limit)

    def warm_up(self) -> None:
        """Know the device's peak before a job has to wait for it."""
        measured_peak(best_device(), "float32")

    # -- a product in this process -------------------------------------------------------------------------------

    def compute(self, id_: str, job: MatmulJob) -> MatmulResult | Work:
        """The result; or what there is to do, where that is to be done in tiles."""
        work = self.open(job)
        if self._is_shared(work):
            return work
        shapes = work.shapes
        with _rejecting():
            kernel = choose(job.device, shapes.dtype, shapes.m, shapes.k, shapes.n, name=job.kernel)
            a, b, *c = (tensor.to(kernel.device) for tensor in work.operands())
            kernel.wait()
            # Into memory that is used again and sent from: fresh pages, or a copy, cost a tenth of their product.
            out = self._out(shapes) if kernel.device == "cpu" and shapes.out_nbytes else None
            began = time.perf_counter()
            product = kernel.multiply(a, b, alpha=job.alpha, beta=job.beta, c=c[0] if c else None, out=out)
            kernel.wait()
            seconds = time.perf_counter() - began
        file = ""
        if job.result == "file":
            path = self.folder.product(id_, shapes.out_dtype)
            save(path, product)
            file = self.folder.name(path)
        gflops = shapes.operations / seconds / 1e9
        return _result(
            id_, shapes, device=kernel.device, kernel=kernel.name, seconds=seconds, gflops=gflops,
            peak_share=share_of_peak(kernel.device, shapes.dtype, gflops),
            product=Tensor(product) if job.result == "event" else None, file=file,
        )  # fmt: skip

    def _is_shared(self, work: Work) -> bool:
        """Whether a product is computed in tiles."""
        blocks = work.job.blocks
        too_big = blocks == "auto" and work.nbytes > self.memory
        return (blocks == "always" or too_big) and work.shapes.operations > 0

    def _out(self, shapes: Shapes) -> torch.Tensor:
        """[..., m, n], of undefined values."""
        memory = torch.from_numpy(self._empty((shapes.out_nbytes,), "uint8"))
        return memory.view(getattr(torch, shapes.out_dtype)).view(shapes.product)

    # -- a product that workers share ----------------------------------------------------------------------------

    def share(self, id_: str, work: Work) -> tuple[Plan, Board]:
        """Make ready what the workers of this job share; after a coordinator's death, what is there."""
        where = self.folder.shared(id_)
        with _rejecting():
            if not (where / PLAN).exists():
                names = ("a", "b", "c")
                operands = (work.job.a, work.job.b, work.job.c)
                files = [
                    self._file(where / name, operand, tensor)
                    for name, operand, tensor in zip(names, operands, work.tensors, strict=False)
                ]
                plan = Plan.of(work.job, work.shapes, files, work.nbytes, self.memory)
                plan_kernel(plan)
                prepare(self.folder, id_, plan)
            plan = Plan.model_validate_json((where / PLAN).read_bytes())
            return plan, Board(where / BOARD)

    def _file(self, path: Path, operand: Operand | None, tensor: torch.Tensor) -> TensorFile:
        """An operand as all workers can read it."""
        if isinstance(operand, TensorFile):
            return operand
        if operand is not None and not isinstance(operand, Tensor):
            return TensorFile(file=self.folder.name(self.folder.path(operand)))
        dtype = str(tensor.dtype).removeprefix("torch.")
        path = path.with_suffix(".safetensors" if dtype == "bfloat16" else ".npy")
        save(path, tensor)
        return TensorFile(file=self.folder.name(path))

    def compute_tile(self, job: str, index: int, *, last_attempt: bool) -> tuple[Plan, int, float] | None:
        """(plan, tiles done, seconds of this one); None if there was nothing to do. Raises Retry."""
        try:
            shared = self._open_shared(job)
            if shared is None:
                return None
            seconds = shared.compute(index)
        except BlockingIOError:
            raise Retry("another worker computes it", delay=ASIDE) from None
        except Exception as error:
            if last_attempt or isinstance(error, (Reject, KernelUnavailable, ValueError)):
                fail(self.folder.shared(job), f"tile {index}: {error}")
            raise
        return None if seconds is None else (shared.plan, shared.board.done(slice(shared.plan.tiles)), seconds)

    def _open_shared(self, job: str) -> SharedProduct | None:
        """The last job's stays open; None when this one is over."""
        if self._shared_job != job or self._shared is None or not (self._shared.where / PLAN).exists():
            self.close_shared()
            try:
                self._shared, self._shared_job = SharedProduct(self.folder, job, self.memory), job
            except FileNotFoundError:
                logger.info("job %s is over, or its coordinator's PIPELINE_MATMUL_DIR is another folder", job)
        return self._shared

    def close_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def tidy(self, keep: float) -> None:
        """Let go of a job that is over, and of files that are too old."""
        if self._shared is not None and not (self._shared.where / PLAN).exists():
            self.close_shared()
        self.folder.close_gone()
        self.folder.sweep(keep)

    def is_complete(self, id_: str, plan: Plan, board: Board) -> bool:
        """Whether all tiles of C are there. Raises Reject when that will never be, Retry when we are to stop."""
        if board.done(plan.finals) == plan.corners:
            return True
        if self.stopping:
            raise Retry("this worker stops; another one goes on", delay=0.0)
        if reason := failure(self.folder.shared(id_)):
            raise Reject(reason)
        if (index := board.deadly()) is not None:
            raise Reject(
                f"tile {index} of {plan.tiles}: its worker died each time it was begun; is there enough memory?"
            )
        return False

    def finish(self, id_: str, work: Work, plan: Plan, board: Board) -> MatmulResult:
        where, shapes = self.folder.shared(id_), work.shapes
        kernel = plan_kernel(plan)
        path, kept = product_path(where, plan), self.folder.product(id_, shapes.out_dtype)
        seconds = max(1e-9, time.time() - (where / PLAN).stat().st_mtime)
        busy = max(1e-9, board.seconds())
        product = None
        if work.job.result == "event":
            product = Tensor(open_tensor(path).tensor)
        result = _result(
            id_, shapes, device=kernel.device, kernel=kernel.name, seconds=seconds,
            gflops=shapes.operations / seconds / 1e9,
            peak_share=share_of_peak(kernel.device, plan.compute_dtype, shapes.operations / busy / 1e9),
            product=product, file=self.folder.name(kept) if work.job.result == "file" else "",
            tiles=plan.tiles, recomputed=board.recomputed(),
        )  # fmt: skip
        if work.job.result == "file":
            kept.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # else a coordinator that was killed had come this far
                path.replace(kept)
        self.drop(id_)
        return result

    def drop(self, id_: str) -> None:
        """The job is over: workers that are still asked for a tile of it do nothing."""
        shutil.rmtree(self.folder.shared(id_), ignore_errors=True)


def _tensor(operand: Operand, folder: Folder) -> torch.Tensor:
    return torch.as_tensor(operand) if isinstance(operand, Tensor) else folder.open(operand).tensor


@contextlib.contextmanager
def _rejecting() -> Any:
    try:
        yield
    except (KernelUnavailable, ValueError) as error:
        raise Reject(str(error)) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Reject(f"there is no space for the product: {error}") from error


def _result(id_: str, shapes: Shapes, **more: Any) -> MatmulResult:
    return MatmulResult(
        job=id_, m=shapes.m, k=shapes.k, n=shapes.n, batch=list(shapes.batch), dtype=shapes.dtype, **more
    )

"""Matrix products by name: one registry. A family of kernels is a file, imported when one of its kernels is first used.

    kernel = choose("auto", "float32", m, k, n)           # the fastest, by measurement; or name="cuda-tiled"
    a, b = a.to(kernel.device), b.to(kernel.device)
    product = kernel.multiply(a, b, alpha=2.0)            # asynchronous on a GPU
    kernel.wait()

name            device  file            extra   what it is
blas            cpu     blas                    torch on the CPU: MKL, oneDNN
blocked         cpu     blocked                 Numba: packed, register-tiled, parallel; integers, which BLAS lacks
systolic        cpu     systolic                a cycle-accurate systolic array; only by name
cublas          cuda    blas                    torch on the GPU
cuda-naive      cuda    cuda_ladder     cuda    Numba: a thread an element
cuda-tiled      cuda    cuda_ladder     cuda    Numba: tiles in shared memory
cuda-register   cuda    cuda_ladder     cuda    Numba: a tile of C in every thread's registers, 128-bit loads
triton          cuda    tensor_cores    cuda    Triton: tensor cores, split-K; float32 as TF32, so only by name

Transposes are views: `a.mT` is multiplied as it lies in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch

from pipeline.errors import ConfigurationError

__all__ = [
    "DTYPES",
    "KERNELS",
    "Device",
    "Kernel",
    "KernelUnavailable",
    "best_device",
    "choose",
    "expected_scalars",
    "measured_peak",
    "result_dtype",
    "share_of_peak",
]

Device = Literal["cpu", "cuda"]

FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int8")
DTYPES = (*FLOATS, *INTEGERS)
"""What A and B may be, both the same. int8 is summed and returned in int32; the others keep their dtype. float16 and
bfloat16 are summed in float32. Integers wrap around, as numpy's do."""


class KernelUnavailable(ConfigurationError):
    """Raised when a product is asked for that no kernel here computes: why, and what to do."""


class Family(Protocol):
    """What a file of kernels offers."""

    @staticmethod
    def multiply(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        """out ← alpha · A · B + beta · out, by the kernel called `name`.

        a [batch, m, k], b [batch, k, n], out [batch, m, n], any strides, no size 0, all on the kernel's device.
        With beta = 0, out may hold anything, NaN too. alpha is not 0. alpha and beta are integers where out is.
        """


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to multiply matrices on one device."""

    name: str
    device: Device
    dtypes: tuple[str, ...]
    """Of A and B."""
    file: str
    """The family's module in this package."""
    extra: str = ""
    """The extra whose packages it needs."""
    automatic: tuple[str, ...] = ()
    """The dtypes for which `choose` may take it without being asked to."""

    def unavailable(self) -> str:
        """Why it cannot run here, and what to do; empty if it can. The first call may import much."""
        return _unavailable(self)

    def multiply(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """alpha · A · B + beta · C, on `device`, where all tensors are; `wait` before you look at a clock.

        a: [..., m, k] and b: [..., k, n], of one dtype of `dtypes`, any strides; leading dimensions broadcast. With
        alpha = 0 they are not looked at: NaN and infinity in them are nothing.
        c: [..., m, n] or what broadcasts to it, in `result_dtype`. out: [..., m, n], filled and returned; it may be c.

        Raises ValueError saying what was expected, KernelUnavailable if the kernel cannot run here.
        """
        if reason := self.unavailable():
            raise KernelUnavailable(reason)
        shape = _shape(self, a, b, alpha, beta, c)
        dtype = result_dtype(_name(a.dtype))
        out = _destination(out, shape, dtype, a.device)
        if beta != 0 and c is not None and c is not out:
            out.copy_(c.expand(shape))
        (*batch, m, n), k = shape, a.shape[-1]
        if dtype not in FLOATS:
            alpha, beta = int(alpha), int(beta)
        if (k == 0 or alpha == 0) and 0 not in shape:
            out.zero_() if beta == 0 else out.mul_(beta)
        elif 0 not in shape:
            flat = out if out.ndim == 3 else _flat(out, m, n)
            family = cast("Family", import_module(f".{self.file}", __name__))
            family.multiply(
                self.name,
                _flat(a.expand(*batch, m, k), m, k),
                _flat(b.expand(*batch, k, n), k, n),
                flat,
                alpha,
                beta,
            )
            if flat.data_ptr() != out.data_ptr():
                out.copy_(flat.view(shape))
        return out

    def wait(self) -> None:
        """Return when the device has done its work."""
        if self.device == "cuda" and torch.cuda.is_available():  # in a simulator there is nothing to wait for
            torch.cuda.synchronize()


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("blas", "cpu", DTYPES, "blas", automatic=DTYPES),
        Kernel("blocked", "cpu", DTYPES, "blocked", automatic=INTEGERS),
        Kernel("systolic", "cpu", DTYPES, "systolic"),
        Kernel("cublas", "cuda", (*FLOATS, "int8"), "blas", automatic=(*FLOATS, "int8")),
        Kernel("cuda-naive", "cuda", (*FLOATS[:3], *INTEGERS), "cuda_ladder", "cuda"),
        Kernel("cuda-tiled", "cuda", (*FLOATS[:3], *INTEGERS), "cuda_ladder", "cuda", automatic=INTEGERS),
        Kernel("cuda-register", "cuda", (*FLOATS[:3], *INTEGERS), "cuda_ladder", "cuda", automatic=INTEGERS),
        Kernel("triton", "cuda", ("float32", "float16", "bfloat16"), "tensor_cores", "cuda", ("float16", "bfloat16")),
    )
}
"""Every kernel by name; on each device the first that can compute a dtype is the one taken before any measurement."""


def best_device() -> Device:
    return "cuda" if torch.cuda.is_available() else "cpu"


def result_dtype(dtype: str) -> str:
    """Of the product of two matrices of `dtype`."""
    return "int32" if dtype == "int8" else dtype


def expected_scalars(dtype: str, alpha: float, beta: float) -> str:
    """What alpha and beta have to be where A and B are of `dtype`; "" when they are."""
    if result_dtype(dtype) not in FLOATS:
        limits = torch.iinfo(getattr(torch, result_dtype(dtype)))
        fit = all(one % 1 == 0 and limits.min <= one <= limits.max for one in (alpha, beta))
        return "" if fit else f"integers from {limits.min} to {limits.max}"
    most = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).max
    fit = all(abs(one) <= most or not math.isfinite(one) for one in (alpha, beta))
    return "" if fit else "numbers that float32 has"


def choose(
    device: Literal["auto", "cpu", "cuda"], dtype: str, m: int, k: int, n: int, *, name: str | None = None
) -> Kernel:
    """The kernel called `name`, or else the fastest here for [m, k] · [k, n] on `device` ("auto": the best there is).

    The fastest is measured once a device, dtype and shape class (the powers of two around m, k and n), and kept in
    memory and in `kernels.json` in the data directory (PIPELINE_DATA_DIR).

    Raises KernelUnavailable saying why there is none.
    """
    if name is not None:
        return _named(name, device, dtype)
    from . import tuning

    where = best_device() if device == "auto" else device
    if where == "cuda" and best_device() != "cuda":
        raise KernelUnavailable("the job asks for device 'cuda', and there is no CUDA device here; use 'auto' or 'cpu'")
    candidates = [kernel for kernel in KERNELS.values() if kernel.device == where and dtype in kernel.automatic]
    candidates = [kernel for kernel in candidates if not kernel.unavailable()]
    if not candidates:
        raise KernelUnavailable(f"no kernel multiplies {dtype} on {where}; known dtypes: {', '.join(DTYPES)}")
    return tuning.fastest(candidates, dtype, m, k, n)


def measured_peak(device: Device, dtype: str) -> float:
    """GFLOP/s of the fastest product of big square matrices on `device`, measured once and kept like `choose`."""
    from . import tuning

    return tuning.measured_peak(device, dtype)


def share_of_peak(device: Device, dtype: str, gflops: float) -> float:
    """`gflops` over the measured peak, at most 1: a product that is faster than the peak becomes the peak."""
    from . import tuning

    return tuning.share_of_peak(device, dtype, gflops)


def _named(name: str, device: str, dtype: str) -> Kernel:
    kernel = KERNELS.get(name)
    if kernel is None:
        raise KernelUnavailable(f"there is no kernel {name!r}; known: {', '.join(KERNELS)}")
    if device not in ("auto", kernel.device):
        raise KernelUnavailable(f"kernel {name!r} runs on {kernel.device}, and the job asks for device {device!r}")
    if dtype not in kernel.dtypes:
        raise KernelUnavailable(f"kernel {name!r} does not multiply {dtype}; it does {', '.join(kernel.dtypes)}")
    if reason := kernel.unavailable():
        raise KernelUnavailable(reason)
    return kernel


@cache
def _unavailable(kernel: Kernel) -> str:
    try:
        family = import_module(f".{kernel.file}", __name__)
    except ModuleNotFoundError as error:
        return f"kernel {kernel.name!r} needs {error.name}: pip install " + (
            f"'redis-ml-pipeline[{kernel.extra}]'" if kernel.extra else str(error.name)
        )
    simulated = bool(getattr(family, "SIMULATED", False))
    if kernel.device == "cuda" and not simulated and not torch.cuda.is_available():
        return f"kernel {kernel.name!r} needs a CUDA device, and there is none here"
    return ""


def _shape(
    kernel: Kernel, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float, c: torch.Tensor | None
) -> tuple[int, ...]:
    """[..., m, n]. Raises ValueError."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"A has shape {list(a.shape)} and B {list(b.shape)}; expected [..., m, k] and [..., k, n]")
    dtype = _name(a.dtype)
    if a.dtype != b.dtype or dtype not in kernel.dtypes:
        raise ValueError(
            f"A is {dtype} and B {_name(b.dtype)}; kernel {kernel.name!r} expects both of one of "
            f"{', '.join(kernel.dtypes)}"
        )
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"A has shape {list(a.shape)} and B {list(b.shape)}; their leading dimensions do not broadcast"
        ) from None
    shape = (*batch, a.shape[-2], b.shape[-1])
    if expected := expected_scalars(dtype, alpha, beta):
        raise ValueError(f"alpha is {alpha} and beta {beta}; expected {expected}, as A and B are {dtype}")
    if beta != 0 and c is None:
        raise ValueError(f"beta is {beta} and there is no C; expected one of shape {list(shape)}")
    if c is not None and (_name(c.dtype) != result_dtype(dtype) or _broadcast(c.shape, shape) != shape):
        raise ValueError(
            f"C is {_name(c.dtype)} of shape {list(c.shape)}; expected {result_dtype(dtype)} of shape {list(shape)}"
        )
    return shape


def _destination(out: torch.Tensor | None, shape: tuple[int, ...], dtype: str, device: torch.device) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    if tuple(out.shape) != shape or _name(out.dtype) != dtype:
        raise ValueError(f"out is {_name(out.dtype)} of shape {list(out.shape)}; expected {dtype} of {list(shape)}")
    return out


def _flat(matrices: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """As [batch, rows, columns]; a copy only where several leading dimensions do not lie evenly in memory."""
    if matrices.ndim == 2:
        return matrices.unsqueeze(0)
    return matrices.reshape(-1, rows, columns)


def _broadcast(shape: Any, other: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(tuple(shape), other)
    except ValueError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Matrix products by name. Heavy imports happen when a kernel is first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["KERNELS", "Device", "Kernel", "best_device", "choose"]

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """`multiply(a, b)` takes and gives torch tensors on `device`; `wait` returns when the device has done its work."""

    name: str
    device: Device
    multiply: Callable[[Any, Any], Any]
    wait: Callable[[], None]


KERNELS: dict[str, Kernel] = {
    "blas": Kernel("blas", "cpu", torch.matmul, lambda: None),
    "cublas": Kernel("cublas", "cuda", torch.matmul, torch.cuda.synchronize),
}


def best_device() -> Device:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(device: Device) -> Kernel:
    """The kernel for a device: the first one registered for it."""
    return next(kernel for kernel in KERNELS.values() if kernel.device == device)

"""Which kernel is fastest, and how fast the device is: measured once, kept in memory and in a file for other processes.

The file is `kernels.json` in the data directory; delete it to measure anew:

    {"<device, threads>": {"choices": {"float32 64 64 64": {"kernel": "blas", "seconds": {"blas": …}}},
                           "peaks": {"float32": …}}}
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pipeline.settings import settings

from . import KERNELS, Device, Kernel, choose, result_dtype

__all__ = ["fastest", "known", "measured_peak", "share_of_peak", "shape_class"]

logger = logging.getLogger("subscribers.kernels")

Known = dict[str, dict[str, dict[str, Any]]]
"""Device → kind → key → what was measured."""

LARGEST = 1024
"""Sizes above this are measured at this size: what is fastest does not change beyond it, and it costs milliseconds."""
PATIENCE = 0.2
"""Seconds of measuring a kernel, the first call (which may compile) not counted."""
PEAK_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PEAK_SIZES_OF_INTEGERS = {"cpu": (256, 512), "cuda": (2048, 4096)}

_lock = threading.RLock()
"""One measurement at a time: two would slow each other down."""
_memory: Known = {}


def fastest(candidates: list[Kernel], dtype: str, m: int, k: int, n: int) -> Kernel:
    """The fastest of `candidates`, all of one device, for this dtype and shape class."""
    if len(candidates) == 1:
        return candidates[0]
    device = candidates[0].device
    key = f"{dtype} " + " ".join(map(str, shape_class(m, k, n)))
    names = {kernel.name for kernel in candidates}

    def measure() -> dict[str, Any]:
        seconds = {kernel.name: _seconds(kernel, dtype, *shape_class(m, k, n)) for kernel in candidates}
        logger.info("%s on %s: %s", key, device, ", ".join(f"{name} {s:.3g} s" for name, s in seconds.items()))
        return {"kernel": min(seconds, key=seconds.__getitem__), "seconds": seconds}

    chosen = known(device, "choices", key, measure, lambda known: set(known["seconds"]) == names)
    return KERNELS[chosen["kernel"]]


def measured_peak(device: Device, dtype: str) -> float:
    """GFLOP/s (for integers: multiplications and additions, in thousand millions a second)."""

    def measure() -> float:
        integers = not getattr(torch, dtype).is_floating_point
        sizes = (PEAK_SIZES_OF_INTEGERS if integers else PEAK_SIZES)[device]
        return max(2 * n**3 / _seconds(choose(device, dtype, n, n, n), dtype, n, n, n) / 1e9 for n in sizes)

    return float(known(device, "peaks", dtype, measure))


def share_of_peak(device: Device, dtype: str, gflops: float) -> float:
    peak = measured_peak(device, dtype)
    if gflops > peak:
        _remember(device, "peaks", dtype, gflops)
    return gflops / max(gflops, peak)


def shape_class(m: int, k: int, n: int) -> tuple[int, int, int]:
    """The nearest powers of two, at most `LARGEST`: shapes of one class have one fastest kernel."""
    rounded = [min(LARGEST, 1 << round(math.log2(max(size, 1)))) for size in (m, k, n)]
    return rounded[0], rounded[1], rounded[2]


def _seconds(kernel: Kernel, dtype: str, m: int, k: int, n: int) -> float:
    """The shortest of several runs."""
    a, b = (_operand(dtype, rows, columns, kernel.device) for rows, columns in ((m, k), (k, n)))
    out = torch.empty((m, n), dtype=getattr(torch, result_dtype(dtype)), device=kernel.device)
    kernel.multiply(a, b, out=out)
    kernel.wait()
    best, deadline = float("inf"), time.perf_counter() + PATIENCE
    while True:
        began = time.perf_counter()
        kernel.multiply(a, b, out=out)
        kernel.wait()
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended > deadline:
            return best


def _operand(dtype: str, rows: int, columns: int, device: str) -> torch.Tensor:
    """Small numbers other than zero, which some processors multiply faster."""
    values = torch.arange(1, rows * columns + 1, device=device).remainder_(7).add_(1)
    return values.view(rows, columns).to(getattr(torch, dtype))


def known(
    device: Device,
    kind: str,
    key: str,
    measure: Callable[[], Any],
    fits: Callable[[Any], bool] = lambda known: True,
) -> Any:
    where = _place(device)
    if (found := _found(_memory, where, kind, key)) is not None and fits(found):
        return found
    with _lock:
        for known in (_memory, _read()):
            if (found := _found(known, where, kind, key)) is not None and fits(found):
                _memory.setdefault(where, {}).setdefault(kind, {})[key] = found
                return found
        value = measure()
        _remember(device, kind, key, value)
        return value


def _remember(device: Device, kind: str, key: str, value: Any) -> None:
    """In memory and in the file, beside what other processes have written there meanwhile."""
    where = _place(device)
    with _lock:
        known = _read()
        for place in (_memory, known):
            place.setdefault(where, {}).setdefault(kind, {})[key] = value
        _write(known)


def _found(known: Known, where: str, kind: str, key: str) -> Any:
    return known.get(where, {}).get(kind, {}).get(key)


def _file() -> Path:
    return settings().data_dir / "kernels.json"


def _read() -> Known:
    try:
        known = json.loads(_file().read_bytes())
    except (OSError, ValueError):  # there is none yet, or it is damaged: measured anew
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: Known) -> None:
    """As a whole, so that no reader sees half of it. A data directory that cannot be written costs only time."""
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1, sort_keys=True)
        Path(name).replace(path)
    except OSError as error:
        logger.warning("what was measured is not kept: %s", error)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _place(device: Device) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{_processor()}, threads: {torch.get_num_threads()}"

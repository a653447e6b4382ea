"""What NVIDIA's management library says of this host's GPUs; the only file that knows of it (extra `gpu`)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .metrics import GpuSample

__all__ = ["Gpus"]

logger = logging.getLogger("pipeline.gpu")


class Gpus:
    """Reads them in a thread: the driver may take its time. Without the library, or without a GPU, it costs nothing."""

    def __init__(self) -> None:
        self._library: Any = None
        self._devices: list[Any] | None = None

    async def read(self) -> list[GpuSample] | None:
        if self._devices == []:
            return None
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[GpuSample] | None:
        try:
            if self._devices is None:
                self._devices = []  # whatever goes wrong now is not tried again
                self._devices = self._open()
            return [self._sample(index, device) for index, device in enumerate(self._devices)] or None
        except ImportError:
            return None
        except self._library.NVMLError as error:
            logger.debug("no GPUs in reports: %s", error)
            self._devices = []
            return None

    def _open(self) -> list[Any]:
        import pynvml  # the module of the distribution nvidia-ml-py

        self._library = pynvml
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def _sample(self, index: int, device: Any) -> GpuSample:
        library = self._library
        memory = library.nvmlDeviceGetMemoryInfo(device)
        return GpuSample(
            index=index,
            name=library.nvmlDeviceGetName(device),
            utilisation=library.nvmlDeviceGetUtilizationRates(device).gpu / 100,
            memory_used=memory.used,
            memory_total=memory.total,
        )

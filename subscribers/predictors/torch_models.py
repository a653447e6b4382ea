"""Models of torch: exported programs (.pt2), and weights in safetensors for a module that a factory makes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import BadModel, ModelSpec, OutOfMemory, file_of

__all__ = ["TorchEngine", "load"]


class TorchEngine:
    def __init__(self, module: Callable[[torch.Tensor], Any], device: str) -> None:
        self.device = device
        self._module = module

    def infer(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        try:
            with torch.inference_mode():
                output = self._module(torch.from_numpy(batch).to(self.device))
            rows: npt.NDArray[Any] = output.float().cpu().numpy()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(str(error)) from None
        except RuntimeError as error:
            if "not enough memory" in str(error):  # how torch's CPU allocator says so
                raise OutOfMemory(str(error)) from None
            raise
        return rows


def on_device(module: torch.nn.Module, spec: ModelSpec, device: str, compile_it: bool) -> TorchEngine:
    """Raises BadModel when the device is not there."""
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cuda" and not torch.cuda.is_available():
        raise BadModel("PIPELINE_DEVICE=cuda, but torch finds no GPU")
    module = module.to(where)
    if spec.channels_first:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    # `forward` itself: nobody hooks what is served, and looking for hooks costs as much as a small model.
    return TorchEngine(torch.compile(module, dynamic=True) if compile_it else module.forward, where)


def load(spec: ModelSpec, folder: Path, device: str, compile_it: bool) -> TorchEngine:
    path = file_of(spec, folder)
    if spec.kind == "torch-export":
        try:
            # Shapes and dtypes are checked before: the program's own guards would double the time of a small model.
            module: torch.nn.Module = torch.export.load(path).module(check_guards=False)
        except Exception as error:
            raise BadModel(f"{path} is no exported program of this torch: {error}") from None
        return on_device(module, spec, device, compile_it)
    if spec.factory is None:
        raise BadModel(f"model {spec.name!r}: kind 'safetensors' needs a factory, 'module:function'")
    module_name, _, function = spec.factory.partition(":")
    try:
        module = getattr(import_module(module_name), function)()
        module.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise BadModel(f"{path} is no safetensors file: {error}") from None
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise BadModel(f"model {spec.name!r}: {error}") from None
    return on_device(module.eval().requires_grad_(requires_grad=False), spec, device, compile_it)

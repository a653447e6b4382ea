"""Models of ONNX Runtime (extra `onnx`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from . import BadModel, ModelSpec, file_of

__all__ = ["OnnxEngine", "load"]


class OnnxEngine:
    def __init__(self, session: Any, device: str) -> None:
        self.device = device
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name

    def infer(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(self._session.run([self._output], {self._input: np.ascontiguousarray(batch)})[0])


def load(spec: ModelSpec, folder: Path, device: str, compile_it: bool) -> OnnxEngine:
    path = file_of(spec, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    wanted = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(path, options, providers)
    except Exception as error:
        raise BadModel(f"{path} is no ONNX model that this runtime reads: {error}") from None
    return OnnxEngine(session, "cuda" if session.get_providers()[0].startswith("CUDA") else "cpu")

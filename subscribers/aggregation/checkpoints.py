"""Checkpoints of runs: safetensors files, whole or not there. The two newest of a run are kept."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.settings import settings

__all__ = ["Checkpoint", "folder_of", "latest", "save"]

logger = logging.getLogger("subscribers.aggregation")

KEPT = 2
_NAME = re.compile(r"round-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    round: int
    tensors: Mapping[str, npt.NDArray[Any]]
    note: dict[str, Any] = field(default_factory=dict)


def folder_of(run: str, shard: int) -> Path:
    """`<PIPELINE_DATA_DIR>/runs/<run>[.<shard>]`."""
    name = quote(run, safe="")
    return settings().data_dir / "runs" / (f"{name}.{shard}" if shard else name)


def save(run: str, shard: int, checkpoint: Checkpoint) -> Path:
    """Raises OSError."""
    folder = folder_of(run, shard)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{checkpoint.round:09d}.safetensors"
    scratch = path.with_suffix(".part")
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in checkpoint.tensors.items()}
    save_file(arrays, scratch, {"note": json.dumps(checkpoint.note)})
    scratch.replace(path)
    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def latest(run: str, shard: int) -> Checkpoint | None:
    """The newest that can be read; None when there is none."""
    for path in reversed(_files(folder_of(run, shard))):
        try:
            with safe_open(path, "np") as file:
                note = json.loads((file.metadata() or {}).get("note", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("checkpoint %s cannot be read and is left out: %s", path, error)
            continue
        found = _NAME.fullmatch(path.name)
        return Checkpoint(int(found[1]) if found else 0, tensors, note)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*.safetensors") if _NAME.fullmatch(path.name))

"""Checkpoints of runs: safetensors files, whole or not there. The two newest of a run are kept.

`keep` writes in a thread: a file may take longer than a lease, and who hears no signs of life meanwhile takes everybody
for dead. A checkpoint that is not in its file yet goes with this process, as the rounds after any other one do.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline.settings import settings

__all__ = ["Checkpoint", "folder_of", "keep", "latest", "save"]

logger = logging.getLogger("subscribers.aggregation")

KEPT = 2
_NAME = re.compile(r"round-(\d+)\.safetensors")


_thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
_changing = threading.Lock()
_waiting: dict[Path, Checkpoint] = {}
"""By folder, the newest that is not in its file yet."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    round: int
    tensors: Mapping[str, npt.NDArray[Any]]
    note: dict[str, Any] = field(default_factory=dict)


def folder_of(run: str, shard: int) -> Path:
    """`<PIPELINE_DATA_DIR>/runs/<run>[@<shard>]`; no run has that sign in its name."""
    name = quote(run, safe="")
    return settings().data_dir / "runs" / (f"{name}@{shard}" if shard else name)


def keep(run: str, shard: int, checkpoint: Checkpoint) -> Future[None]:
    """Save it soon, after those before it; `latest` finds it at once. Where several wait, only the newest is written.

    Its arrays are not to be changed any more. What cannot be written is logged.
    """
    folder = folder_of(run, shard)
    with _changing:
        _waiting[folder] = checkpoint
    return _thread.submit(_write, folder)


def _write(folder: Path) -> None:
    checkpoint = _waiting.get(folder)
    if checkpoint is None:
        return  # it was written in the place of one before it
    try:
        _save(folder, checkpoint)
    except Exception as error:  # the next one may do better
        logger.error("no checkpoint of round %d in %s: %s", checkpoint.round, folder, error)
    with _changing:
        if _waiting.get(folder) is checkpoint:
            del _waiting[folder]


def save(run: str, shard: int, checkpoint: Checkpoint) -> Path:
    """Raises OSError, SafetensorError."""
    return _save(folder_of(run, shard), checkpoint)


def _save(folder: Path, checkpoint: Checkpoint) -> Path:
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
    """The newest that can be read, or is about to be written; None when there is none."""
    folder = folder_of(run, shard)
    if (waiting := _waiting.get(folder)) is not None:
        return waiting
    for path in reversed(_files(folder)):
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

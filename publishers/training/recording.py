"""Recorded runs: every round's contributions and mean as safetensors, from which the run can be gone through again.

    DIR/initial.rank-0.safetensors          what the run began with, note and all
    DIR/round-000012.rank-1.safetensors     what rank 1 contributed, as it travelled; metadata: codec, samples
    DIR/round-000012.safetensors            the mean, as it travelled; metadata: codec, ranks, refused

Every worker that joined with `record=DIR` writes its own, and a mean where it is not there yet; those of several hosts
can be put into one folder. A run that goes on from a checkpoint goes on in the folder too.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline import Tensor
from pipeline.catalog import Round
from pipeline.catalog.compression import clipped, decode, merge
from pipeline.errors import ConfigurationError

from .parameters import parameters_of

__all__ = ["Recorder", "replay"]


class Recorder:
    """What one worker writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begins(self, number: int) -> None:
        """A run begins here. Raises ConfigurationError where another one is recorded."""
        rounds = _rounds(self._folder)
        if max(rounds, default=-1) >= number:
            raise ConfigurationError(f"{self._folder} holds the record of another run; give record= an empty folder")
        if not rounds:
            for path in self._folder.glob("initial.rank-*.safetensors"):
                path.unlink(missing_ok=True)

    def resumes(self, number: int) -> None:
        """The run goes on from a checkpoint: what came after that is gone through again."""
        for later, path in _rounds(self._folder).items():
            if later >= number:
                path.unlink(missing_ok=True)

    def initial(self, rank: int, tensors: Mapping[str, Tensor], note: str, about: Mapping[str, Any]) -> None:
        name = f"initial.rank-{rank}"
        if not self._path(name).exists():  # else it was here before
            self._save(name, tensors, {"note": note, **about})

    def contributed(self, rank: int, number: int, codec: str, parts: Mapping[str, Tensor], samples: int) -> None:
        self._save(f"round-{number:06d}.rank-{rank}", parts, {"codec": codec, "samples": samples})

    def closed(self, closed: Round) -> None:
        name = f"round-{closed.round:06d}"
        if not self._path(name).exists():
            about = {"codec": closed.codec, "ranks": closed.ranks, "refused": closed.refused, "late": closed.late}
            self._save(name, closed.parts, about)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _save(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        scratch = self._folder / f"{name}.{secrets.token_hex(4)}.part"
        arrays, dtypes = {}, {}
        for key, tensor in tensors.items():
            dtypes[key] = tensor.dtype
            raw = np.frombuffer(tensor.buffer(), np.uint16) if tensor.dtype == "bfloat16" else np.asarray(tensor)
            arrays[key] = np.array(raw).reshape(tensor.shape)
        save_file(arrays, scratch, {"about": json.dumps({**about, "dtypes": dtypes})})
        scratch.replace(self._path(name))


def replay(folder: str | Path, model: Any, optimizer: Any = None) -> int:
    """Go through a recorded run of mode sync or local again: `model` ends with the weights that it ended with.

    Every mean is computed anew from the contributions where all are there, and must have the same bits as the recorded.
    optimizer  made as in the run (mode sync); its state is loaded
    Returns the number of rounds. Raises ConfigurationError when something is missing or differs.
    """
    from .modes import Outer

    path = Path(folder)
    begins = sorted(path.glob("initial.rank-*.safetensors"))
    if not begins:
        raise ConfigurationError(f"{path} holds no recorded run: initial.rank-*.safetensors is not there")
    parameters = parameters_of(model)
    tensors, about = min((_load(file) for file in begins), key=lambda found: int(found[1]["round"]))
    note = json.loads(about["note"] or "{}")
    parameters.load(tensors, note)
    if optimizer is not None:
        parameters.load_optimizer(optimizer, tensors, note)
    outer = Outer(parameters.read(), *about["outer"]) if about["mode"] == "local" else None
    if outer is not None:
        outer.load(tensors)
    number = begin = int(about["round"])
    while (file := path / f"round-{number:06d}.safetensors").is_file():
        recorded, closed = _load(file)
        codec, parts = closed["codec"], recorded
        again = _merged(path, number, closed, parameters.size, about.get("clip")) if parts else None
        if again is not None and not _same(again, (codec, parts)):
            raise ConfigurationError(f"{file}: the mean is not that of the recorded contributions")
        if parts:
            mean = decode(codec, parts, parameters.size)
            if outer is not None:
                parameters.write(outer.step(mean))
            else:
                parameters.apply(mean, optimizer)
        number += 1
    if any(later > number for later in _rounds(path)):
        raise ConfigurationError(f"{file} is not there, though later rounds are")
    return number - begin


def _rounds(folder: Path) -> dict[int, Path]:
    """The recorded means by round."""
    found = {path: re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in folder.iterdir()}
    return {int(name[1]): path for path, name in found.items() if name}


def _merged(
    folder: Path, number: int, closed: Mapping[str, Any], size: int, clip: float | None
) -> tuple[str, Mapping[str, Tensor]] | None:
    """The mean of a round's contributions; None when not all are there."""
    files = [folder / f"round-{number:06d}.rank-{rank}.safetensors" for rank in closed["ranks"]]
    if closed["late"] or closed["refused"] or not all(file.is_file() for file in files):
        return None
    loaded = [_load(file) for file in files]
    total = sum(about["samples"] for _, about in loaded)
    codec, parts, _ = merge([(about["samples"] / total, about["codec"], parts) for parts, about in loaded], size)
    return clipped(codec, parts, size, clip) if clip is not None and parts else (codec, parts)


def _same(one: tuple[str, Mapping[str, Tensor]], other: tuple[str, Mapping[str, Tensor]]) -> bool:
    return one[0] == other[0] and dict(one[1]) == dict(other[1])


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        tensors = {}
        for key in file.keys():  # noqa: SIM118 (no mapping)
            array = file.get_tensor(key)
            dtype = about["dtypes"][key]
            tensors[key] = (
                Tensor.from_buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, dtype, array.shape)
                if dtype == "bfloat16"
                else Tensor(array)
            )
    return tensors, about

"""The files of matmul jobs, all below one folder: operands that jobs refer to, products, and what workers share.

    <folder>/**.npy, **.safetensors     operands, put there by whoever asks for products
    <folder>/products/<job>.npy         products (bfloat16, which .npy lacks: .safetensors)
    <folder>/jobs/<job>/                a product that is being computed in tiles

Tensors are memory-mapped: nothing is read before it is needed, and what was read may be forgotten again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import Reject, Tensor
from pipeline.catalog import ProductOf, TensorFile

__all__ = ["Folder", "Mapped", "create", "open_tensor", "open_written", "save"]

SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I8": "int8",
}  # fmt: skip
SAFETENSORS_HEADER = 100_000_000
"""Bytes at most, says the format."""
ALIGNMENT = 64
MOST_OPEN = 8
"""Operands' files that stay mapped."""

_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,200}")


@dataclass(frozen=True, slots=True)
class Mapped:
    """A tensor over a file. Read-only unless it was created here."""

    tensor: torch.Tensor
    mapping: mmap.mmap

    def forget(self) -> None:
        """Let go of the pages that were read; what was written stays in the file."""
        self.mapping.madvise(mmap.MADV_DONTNEED)


class Folder:
    """Names of files, checked: whatever a job says, nothing outside `root` is touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root = root.resolve()
        self._open: OrderedDict[tuple[Path, str], tuple[os.stat_result, Mapped]] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, operand: TensorFile | ProductOf) -> Path:
        """Where an operand is. Raises Reject."""
        if isinstance(operand, ProductOf):
            return self._product(operand.job)
        name = Path(operand.file)
        found = (self._root / name).resolve()
        if ".." in name.parts or not found.is_relative_to(self._root):
            raise Reject(
                f"file {operand.file!r} is not below the workers' PIPELINE_MATMUL_DIR; expected a path within it"
            )
        if found.suffix not in (".npy", ".safetensors"):
            raise Reject(f"file {operand.file!r}: expected .npy or .safetensors")
        if not found.is_file():
            raise Reject(f"there is no file {operand.file!r} in the workers' PIPELINE_MATMUL_DIR")
        return found

    def open(self, operand: TensorFile | ProductOf) -> Mapped:
        """Raises Reject saying what was expected. The last used files stay mapped, so their pages are found once."""
        path, name = self.path(operand), operand.name if isinstance(operand, TensorFile) else ""
        try:
            with self._lock:
                known = self._open.pop((path, name), None)
                found = known if known and _is_still(path, known[0]) else (path.stat(), open_tensor(path, name))
                self._open[path, name] = found
                while len(self._open) > MOST_OPEN:
                    self._open.popitem(last=False)
            return found[1]
        except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise Reject(f"{path.name} cannot be read: {error}") from None

    def product(self, job: str, dtype: str) -> Path:
        """Where the product of a job goes."""
        return self._root / "products" / f"{_plain(job)}{'.safetensors' if dtype == 'bfloat16' else '.npy'}"

    def shared(self, job: str) -> Path:
        """What the workers of a job share."""
        return self._root / "jobs" / _plain(job)

    def name(self, path: Path) -> str:
        """As results and jobs say it."""
        return str(path.relative_to(self._root))

    def close_gone(self) -> None:
        """Let go of files that were deleted or written anew: their memory is held as long as they are mapped."""
        with self._lock:
            for key, (stat, _) in list(self._open.items()):
                if not _is_still(key[0], stat):
                    del self._open[key]

    def sweep(self, seconds: float) -> None:
        """Delete products, and what is left of jobs and of who asked for them, that nothing has touched for so long."""
        before = time.time() - seconds
        for path in itertools.chain.from_iterable(
            self._root.glob(f"{kind}/*") for kind in ("products", "jobs", "staged")
        ):
            with contextlib.suppress(OSError):
                if max(map(_touched, (path, *path.glob("*")))) >= before:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _product(self, job: str) -> Path:
        for dtype in ("", "bfloat16"):
            path = self.product(job, dtype)
            if path.is_file():
                return path
        raise Reject(
            f"there is no product of job {job!r}; expected a job that ran with result='file' and is not too old"
        )


def open_tensor(path: Path, name: str = "") -> Mapped:
    """A `.npy` file, or a tensor of a `.safetensors` file. Raises ValueError, OSError."""
    if path.suffix == ".safetensors":
        dtype, shape, offset = _in_safetensors(path, name)
        return _mapped(path, "r", dtype, shape, offset)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap):
        raise ValueError("it is not one array; expected a .npy file")
    if not array.dtype.isnative:
        raise ValueError(f"its byte order is not this machine's (dtype {array.dtype.str})")
    if not array.flags.c_contiguous and array.ndim != 2:
        raise ValueError("it is in Fortran order, which only matrices may be; expected C order")
    base: Any = array
    while isinstance(base, np.memmap):
        base = base.base
    if array.flags.c_contiguous:
        return Mapped(torch.as_tensor(Tensor(array)), base)
    return Mapped(torch.as_tensor(Tensor(array.T)).mT, base)


def create(path: Path, dtype: str, shape: tuple[int, ...]) -> Mapped:
    """A new file of zeros, to be written through its tensor. Raises OSError if there is no space for it now.

    Space is taken as it is written. To take it here, by posix_fallocate, would hold up every product (by 2 % of 4096³);
    should the space be used up meanwhile, workers die of SIGBUS, and the tile's job ends (see Board.deadly).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    nbytes, free = math.prod(shape) * _words(dtype).itemsize, os.statvfs(path.parent)
    if nbytes > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, f"{path.name} takes {nbytes:,} bytes, and less is free in {path.parent}")
    with path.open("w+b") as file:
        file.write(_header(path, dtype, shape))
        offset = file.tell()
        file.truncate(offset + nbytes)
    return _mapped(path, "r+", dtype, shape, offset)


def save(path: Path, tensor: torch.Tensor) -> None:
    """Write a tensor to a new file, which is there under its name when all of it is. Raises OSError.

    To write costs less than to compute into a new file's mapping, page fault by page fault: 25 against 90 ms for 64 MB.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    tensor = tensor.contiguous().cpu()
    array = (tensor.view(torch.int16) if dtype == "bfloat16" else tensor).numpy()
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with scratch.open("wb") as file:
            file.write(_header(path, dtype, shape))
            # In one call of the system: a sixth quicker than array.tofile.
            file.write(array.reshape(-1).view(np.uint8).data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _header(path: Path, dtype: str, shape: tuple[int, ...]) -> bytes:
    words = _words(dtype)
    if path.suffix == ".safetensors":
        kind = next(key for key, value in SAFETENSORS.items() if value == dtype)
        nbytes = math.prod(shape) * words.itemsize
        text = json.dumps({"product": {"dtype": kind, "shape": list(shape), "data_offsets": [0, nbytes]}}).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": words.str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def open_written(path: Path) -> Mapped:
    """A file that `create` made, to be written on."""
    if path.suffix == ".safetensors":
        dtype, shape, offset = _in_safetensors(path, "product")
        return _mapped(path, "r+", dtype, shape, offset)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _mapped(path, "r+", array.dtype.name, array.shape, array.offset)


def _mapped(path: Path, mode: str, dtype: str, shape: tuple[int, ...], offset: int) -> Mapped:
    array: Any = np.memmap(path, _words(dtype), mode, offset, shape)  # type: ignore[call-overload]
    tensor = torch.from_numpy(array) if mode == "r+" else torch.as_tensor(Tensor(array))
    return Mapped(tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor, array.base)


def _words(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.int16 if dtype == "bfloat16" else dtype)


def _in_safetensors(path: Path, name: str) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and offset of a tensor. The library's own reader keeps all it has read in memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= SAFETENSORS_HEADER:
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    if not name and len(tensors) == 1:
        name = next(iter(tensors))
    if name not in tensors:
        raise ValueError(f"it has no tensor {name!r}; it has {', '.join(sorted(tensors))[:500]}")
    kind, shape, (begin, end) = (tensors[name][key] for key in ("dtype", "shape", "data_offsets"))
    if kind not in SAFETENSORS:
        raise ValueError(f"tensor {name!r} is {kind}; expected one of {', '.join(SAFETENSORS)}")
    dtype = SAFETENSORS[kind]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has shape {shape} at {begin}…{end}")
    if end - begin != math.prod(shape) * _words(dtype).itemsize or 8 + length + end > size:
        raise ValueError(f"tensor {name!r} does not lie within the file")
    return dtype, tuple(shape), 8 + length + begin


def _is_still(path: Path, before: os.stat_result) -> bool:
    """Whether a file is the one it was."""
    try:
        now = path.stat()
    except OSError:
        return False
    return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) == (
        before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns,
    )  # fmt: skip


def _plain(job: str) -> str:
    """A job's id as the name of a file: ids hold what publishers call themselves, which may be anything."""
    return job if _PLAIN.fullmatch(job) else hashlib.sha256(job.encode()).hexdigest()


def _touched(path: Path) -> float:
    """Unix seconds. A staged file is a link to somebody's, which may be old: when it was linked counts."""
    stat = path.stat()
    return stat.st_ctime if path.parent.name == "staged" else stat.st_mtime

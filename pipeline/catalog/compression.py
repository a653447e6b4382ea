"""Lossy compression of float32 vectors, for sums that travel: what is lost now is added to the next vector.

    encoder = Encoder("int8", size=vector.size)
    parts = encoder.encode(vector)            name → Tensor; `encoder.error` remembers what the parts do not say
    decode("int8", parts, vector.size)        float32 [size]
    codec, parts = merge([(0.5, "int8", parts), (0.5, "int8", others)], size)      the weighted sum, ready to travel

    none       4 bytes a value; exact
    bf16 fp16  2 bytes
    int8       1 byte, and a float32 scale a block of 1,024 (symmetric, absolute maximum)
    topk:F     the share F (default 0.01) of largest magnitude, 8 bytes each; the threshold comes from a sample
    powersgd:R matrices as products of rank R (default 2); vectors as they are. Vogels et al. 2019, one worker's factors

Everything works through the vector in chunks that stay in a core's cache, so a codec costs about one pass over memory.
Error feedback: Seide et al. 2014, Karimireddy et al. 2019. Top-k by a sampled threshold: Lin et al. 2018 (DGC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError
from ..tensors import Tensor

__all__ = ["CODECS", "Encoder", "check_codec", "decode", "merge", "nbytes_of"]

Vector = npt.NDArray[np.float32]
Parts = Mapping[str, Tensor]

CODECS = ("none", "bf16", "fp16", "int8", "topk", "powersgd")
CHUNK = 1 << 15
"""Values worked on at a time: 128 KiB."""
BLOCK = 1024
"""Values that share a scale."""
SAMPLE = 1 << 14
SPLIT = 1 << 18
"""Values from which on two threads share the work."""

_threads = ThreadPoolExecutor(2, thread_name_prefix="compression")


def check_codec(name: str) -> str:
    """Return `name`, or raise ConfigurationError saying which there are."""
    _split_name(name)
    return name


def _split_name(name: str) -> tuple[str, float]:
    kind, _, option = name.partition(":")
    defaults = {"topk": 0.01, "powersgd": 2.0}
    try:
        value = float(option) if option else defaults.get(kind, 0.0)
    except ValueError:
        value = -1.0
    fits = {"topk": 0 < value <= 1, "powersgd": value >= 1 and value == int(value)}.get(kind, not option)
    if kind not in CODECS or not fits:
        raise ConfigurationError(
            f"compression {name!r} is unknown; use none, bf16, fp16, int8, topk:SHARE (0 to 1) or powersgd:RANK"
        )
    return kind, value


def nbytes_of(parts: Parts) -> int:
    """What they take on the wire."""
    return sum(tensor.nbytes for tensor in parts.values())


class Encoder:
    """Compresses one vector after the other, all of `size` values.

    shapes: of the matrices that powersgd finds in it, by offset; the other codecs do not care
    """

    def __init__(self, codec: str, size: int, shapes: Mapping[int, tuple[int, int]] | None = None) -> None:
        self.codec = codec
        self.kind, self._option = _split_name(codec)
        self.size = size
        self.error: Vector | None = None if self.kind == "none" else np.zeros(size, np.float32)
        """What former parts left out."""
        self._turn = 0
        rank = int(self._option)
        self._shapes = (
            {at: shape for at, shape in (shapes or {}).items() if rank * sum(shape) < shape[0] * shape[1]}
            if self.kind == "powersgd"
            else {}
        )
        self._q = {
            at: np.random.default_rng(at).standard_normal((shape[1], rank)).astype(np.float32)
            for at, shape in self._shapes.items()
        }

    def encode(self, vector: Vector) -> dict[str, Tensor]:
        """float32 [size] → parts. The vector is not changed; with codec none it is not copied either."""
        if vector.dtype != np.float32 or vector.shape != (self.size,):
            raise ValueError(f"expected float32 [{self.size}], not {vector.dtype} {list(vector.shape)}")
        if self.error is None:
            return {"values": Tensor(vector)}
        self._turn += 1
        if self.kind == "topk":
            return self._top(vector)
        if self.kind == "powersgd":
            return self._factors(vector)
        out = _Dense.empty(self.kind, self.size)
        _in_ranges(self.size, lambda low, high: self._encode_range(out, vector, low, high))
        return out.parts()

    def _encode_range(self, out: _Dense, vector: Vector, low: int, high: int) -> None:
        assert self.error is not None
        scratch = np.empty(CHUNK, np.float32)
        for at in range(low, high, CHUNK):
            to = min(at + CHUNK, high)
            error, back = self.error[at:to], scratch[: to - at]
            error += vector[at:to]
            out.write(error, at)
            out.read(back, at)
            error -= back

    def _top(self, vector: Vector) -> dict[str, Tensor]:
        assert self.error is not None
        self.error += vector
        wanted = max(1, round(self._option * self.size))
        step = max(1, self.size // SAMPLE)
        sample = np.abs(self.error[self._turn % step :: step])
        rank = max(0, min(len(sample) - 1, round(len(sample) * (1 - self._option))))
        threshold = max(float(np.partition(sample, rank)[rank]), np.finfo(np.float32).tiny)
        found = [
            np.flatnonzero(np.abs(self.error[at : at + CHUNK]) >= threshold) + at for at in range(0, self.size, CHUNK)
        ]
        indices = np.concatenate(found)
        if len(indices) > 2 * wanted:  # the sample was no likeness of the whole
            values = np.abs(self.error[indices])
            indices = np.sort(indices[np.argpartition(values, -wanted)[-wanted:]])
        values = self.error[indices]
        self.error[indices] = 0
        return {"indices": Tensor(indices.astype(np.uint32)), "values": Tensor(values)}

    def _factors(self, vector: Vector) -> dict[str, Tensor]:
        assert self.error is not None
        self.error += vector
        parts: dict[str, Tensor] = {}
        for at, shape in self._shapes.items():
            matrix = self.error[at : at + shape[0] * shape[1]].reshape(shape)
            p, _ = np.linalg.qr(matrix @ self._q[at])
            p = np.ascontiguousarray(p, np.float32)
            q = matrix.T @ p
            self._q[at] = q
            parts[f"p{at}"], parts[f"q{at}"] = Tensor(p), Tensor(q)
            matrix -= p @ q.T
        rest = [self.error[low:high] for low, high in _gaps(self._shapes, self.size)]
        parts["rest"] = Tensor(np.concatenate(rest) if rest else np.empty(0, np.float32))
        for part in rest:
            part[:] = 0
        return parts


class _Dense:
    """The parts of a codec that keeps every value, readable and writable by range."""

    def __init__(self, kind: str, words: npt.NDArray[Any], scales: Vector | None = None) -> None:
        self.kind = kind
        self.words = words
        self.scales = scales

    @classmethod
    def empty(cls, kind: str, size: int) -> _Dense:
        words = {"none": np.float32, "bf16": np.uint16, "fp16": np.float16, "int8": np.int8}[kind]
        scales = np.empty(-(-size // BLOCK), np.float32) if kind == "int8" else None
        return cls(kind, np.empty(size, words), scales)

    @classmethod
    def of(cls, kind: str, parts: Parts, size: int) -> _Dense:
        """Raises ValueError when the parts are not such a codec's."""
        wanted = {"none": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}[kind]
        values = parts.get("values")
        if values is None or values.dtype != wanted or values.shape != (size,):
            raise ValueError(f"expected values of {wanted} [{size}], not {values!r}")
        words = np.frombuffer(values.buffer(), np.uint16) if kind == "bf16" else np.asarray(values)
        if kind != "int8":
            return cls(kind, words)
        scales = parts.get("scales")
        if scales is None or scales.dtype != "float32" or scales.shape != (-(-size // BLOCK),):
            raise ValueError(f"expected scales of float32 [{-(-size // BLOCK)}], not {scales!r}")
        return cls(kind, words, np.asarray(scales))

    def parts(self) -> dict[str, Tensor]:
        if self.kind == "bf16":
            return {"values": Tensor.from_buffer(self.words.view(np.uint8).data, "bfloat16", self.words.shape)}
        if self.scales is not None:
            return {"values": Tensor(self.words), "scales": Tensor(self.scales)}
        return {"values": Tensor(self.words)}

    def write(self, values: Vector, at: int) -> None:
        """`at` is a multiple of the block."""
        to = at + len(values)
        if self.kind == "bf16":
            bits = values.view(np.uint32)
            rounded = bits >> 16
            rounded &= 1
            rounded += bits  # to the nearest, ties to even
            rounded += 0x7FFF
            rounded >>= 16
            self.words[at:to] = rounded
            if np.isnan(values).any():
                self.words[at:to][np.isnan(values)] = 0x7FC0
        elif self.scales is None:
            with np.errstate(over="ignore"):
                self.words[at:to] = values
        else:
            whole = len(values) // BLOCK * BLOCK
            if whole:
                self._quantize(values[:whole].reshape(-1, BLOCK), at)
            if whole < len(values):
                self._quantize(values[whole:].reshape(1, -1), at + whole)

    def _quantize(self, blocks: Vector, at: int) -> None:
        assert self.scales is not None
        largest = np.maximum(blocks.max(1), -blocks.min(1))
        first = at // BLOCK
        self.scales[first : first + len(blocks)] = largest * np.float32(1 / 127)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
            scaled = blocks * factors[:, None]
            np.rint(scaled, out=scaled)
            self.words[at : at + blocks.size] = scaled.reshape(-1)

    def read(self, out: Vector, at: int) -> None:
        words = self.words[at : at + len(out)]
        if self.kind == "bf16":
            bits = out.view(np.uint32)
            bits[:] = words
            bits <<= 16
            return
        out[:] = words
        if self.scales is not None:
            whole = len(out) // BLOCK * BLOCK
            first = at // BLOCK
            blocks = out[:whole].reshape(-1, BLOCK)
            blocks *= self.scales[first : first + len(blocks), None]
            if whole < len(out):
                out[whole:] *= self.scales[first + len(blocks)]


def decode(codec: str, parts: Parts, size: int, out: Vector | None = None) -> Vector:
    """Parts → float32 [size], into `out` where given. Codec none gives a read-only view of the parts themselves.

    Raises ValueError when the parts are not what `codec` makes of `size` values.
    """
    kind, _ = _split_name(codec)
    if kind == "none" and out is None:
        whole: Vector = _Dense.of(kind, parts, size).words
        return whole
    vector: Vector = np.empty(size, np.float32) if out is None else out
    if kind in ("topk", "powersgd"):
        vector[:] = 0
        (_add_sparse if kind == "topk" else _add_factors)(parts, vector)
        return vector
    dense = _Dense.of(kind, parts, size)

    def read(low: int, high: int) -> None:
        for at in range(low, high, CHUNK):
            dense.read(vector[at : min(at + CHUNK, high)], at)

    _in_ranges(size, read)
    return vector


def merge(summands: Sequence[tuple[float, str, Parts]], size: int) -> tuple[str, dict[str, Tensor], list[int]]:
    """Σ weight · parts, in the order given, as codec and parts; and which summands held NaN or infinity, left out.

    The weights of what is left are scaled to their former sum. Exact values stay exact; bf16 and int8 come back as
    bf16, fp16 as fp16; topk and powersgd stay as compressed as they came. Same summands, same bits.
    Raises ValueError when parts are not their codec's.
    """
    bad: list[int] = []
    while True:
        good = [summand for index, summand in enumerate(summands) if index not in bad]
        if not good:
            return "none", {}, bad
        scale = sum(weight for weight, _, _ in summands) / sum(weight for weight, _, _ in good)
        codec, parts = _merged([(weight * scale, codec, parts) for weight, codec, parts in good], size)
        if all(_finite(tensor) for tensor in parts.values()):
            return codec, parts, bad
        culprits = [
            index
            for index, (_, codec, parts) in enumerate(summands)
            if index not in bad and not all(_finite(tensor) for tensor in parts.values())
        ]
        bad.extend(culprits or [index for index in range(len(summands)) if index not in bad])  # else they overflow


def _merged(summands: Sequence[tuple[float, str, Parts]], size: int) -> tuple[str, dict[str, Tensor]]:
    kinds = {_split_name(codec)[0] for _, codec, _ in summands}
    if kinds == {"topk"}:
        return "topk", _merge_sparse(summands, size)
    if kinds == {"powersgd"}:
        return "powersgd", _merge_factors(summands, size)
    if kinds & {"topk", "powersgd"}:
        total = np.zeros(size, np.float32)
        for weight, codec, parts in summands:
            total += np.float32(weight) * decode(codec, parts, size)
        return "none", {"values": Tensor(total)}
    to = {"none": "none", "fp16": "fp16"}.get(next(iter(kinds)), "bf16") if len(kinds) == 1 else "none"
    sources = [(np.float32(weight), _Dense.of(_split_name(codec)[0], parts, size)) for weight, codec, parts in summands]
    out = _Dense.empty(to, size)
    _in_ranges(size, lambda low, high: _sum_range(sources, out, low, high))
    return to, out.parts()


def _sum_range(sources: Sequence[tuple[np.float32, _Dense]], out: _Dense, low: int, high: int) -> None:
    scratch, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    same = all(weight == sources[0][0] for weight, _ in sources)
    for at in range(low, high, CHUNK):
        to = min(at + CHUNK, high)
        sum_ = out.words[at:to] if out.kind == "none" else total[: to - at]
        for index, (weight, source) in enumerate(sources):
            if source.kind == "none":
                part = source.words[at:to]
            else:
                part = scratch[: to - at]
                source.read(part, at)
            if same:
                np.add(sum_, part, out=sum_) if index else np.copyto(sum_, part)
            else:
                weighted = np.multiply(part, weight, out=scratch[: to - at])
                np.add(sum_, weighted, out=sum_) if index else np.copyto(sum_, weighted)
        if same and sources[0][0] != 1:
            sum_ *= sources[0][0]
        if out.kind != "none":
            out.write(sum_, at)


def _finite(tensor: Tensor) -> bool:
    """A sum is finite when all of its summands are, but for an overflow, which is no better."""
    if tensor.dtype not in ("float32", "float16", "bfloat16"):
        return True
    if tensor.dtype == "bfloat16":
        words = np.frombuffer(tensor.buffer(), np.int16)
        return all(  # the largest exponent, whatever the sign, is what NaN and infinity have
            int((words[at : at + CHUNK] & 0x7FFF).max()) < 0x7F80 for at in range(0, len(words), CHUNK)
        )
    flat = np.asarray(tensor).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.isfinite(flat[at : at + CHUNK].sum(dtype=np.float32)) or np.isfinite(flat[at : at + CHUNK]).all()
            for at in range(0, len(flat), CHUNK)
        )


def _sparse(parts: Parts, size: int) -> tuple[npt.NDArray[np.uint32], Vector]:
    indices, values = parts.get("indices"), parts.get("values")
    if (
        indices is None or values is None or indices.dtype != "uint32" or values.dtype != "float32"
        or indices.shape != values.shape or indices.ndim != 1
    ):  # fmt: skip
        raise ValueError(f"expected as many uint32 indices as float32 values, not {indices!r} and {values!r}")
    where = np.asarray(indices)
    if len(where) and int(where.max()) >= size:
        raise ValueError(f"index {int(where.max())} is outside of {size} values")
    return where, np.asarray(values)


def _add_sparse(parts: Parts, vector: Vector) -> None:
    indices, values = _sparse(parts, len(vector))
    vector[indices] += values  # they are unique


def _merge_sparse(summands: Sequence[tuple[float, str, Parts]], size: int) -> dict[str, Tensor]:
    found = [(np.float32(weight), *_sparse(parts, size)) for weight, _, parts in summands]
    union = np.unique(np.concatenate([indices for _, indices, _ in found]))
    total = np.zeros(len(union), np.float32)
    for weight, indices, values in found:
        total[np.searchsorted(union, indices)] += weight * values
    return {"indices": Tensor(union), "values": Tensor(total)}


def _gaps(shapes: Mapping[int, tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The ranges that no matrix covers."""
    gaps, at = [], 0
    for begin in sorted(shapes):
        if begin > at:
            gaps.append((at, begin))
        at = begin + shapes[begin][0] * shapes[begin][1]
    if at < size:
        gaps.append((at, size))
    return gaps


def _matrices(parts: Parts, size: int) -> dict[int, tuple[Vector, Vector]]:
    """Offset → factors p [m, r], q [n, r]. Raises ValueError when they do not fit into `size` values."""
    found: dict[int, tuple[Vector, Vector]] = {}
    end = 0
    for at in sorted(int(name[1:]) for name in parts if name[:1] == "p" and name[1:].isdecimal()):
        p, q = parts[f"p{at}"], parts.get(f"q{at}")
        if q is None or p.dtype != "float32" or q.dtype != "float32" or p.ndim != 2 or q.ndim != 2:
            raise ValueError(f"expected float32 factors p [m, r] and q [n, r] at {at}, not {p!r} and {q!r}")
        if p.shape[1] != q.shape[1] or at < end or at + p.shape[0] * q.shape[0] > size:
            raise ValueError(f"factors {list(p.shape)} and {list(q.shape)} do not fit at {at} of {size} values")
        end = at + p.shape[0] * q.shape[0]
        found[at] = np.asarray(p), np.asarray(q)
    rest = parts.get("rest")
    wanted = size - sum(len(p) * len(q) for p, q in found.values())
    if rest is None or rest.dtype != "float32" or rest.shape != (wanted,):
        raise ValueError(f"expected the rest as float32 [{wanted}], not {rest!r}")
    return found


def _add_factors(parts: Parts, vector: Vector) -> None:
    matrices = _matrices(parts, len(vector))
    shapes = {at: (len(p), len(q)) for at, (p, q) in matrices.items()}
    for at, (p, q) in matrices.items():
        vector[at : at + len(p) * len(q)] += (p @ q.T).reshape(-1)
    rest, used = np.asarray(parts["rest"]), 0
    for low, high in _gaps(shapes, len(vector)):
        vector[low:high] += rest[used : used + high - low]
        used += high - low


def _merge_factors(summands: Sequence[tuple[float, str, Parts]], size: int) -> dict[str, Tensor]:
    """A sum of products is one product: the factors side by side."""
    all_ = [(np.float32(weight), _matrices(parts, size), np.asarray(parts["rest"])) for weight, _, parts in summands]
    if len({tuple((at, len(p), len(q)) for at, (p, q) in found.items()) for _, found, _ in all_}) != 1:
        raise ValueError("the factors are of different matrices")
    merged: dict[str, Tensor] = {}
    for at in all_[0][1]:
        merged[f"p{at}"] = Tensor(np.hstack([weight * found[at][0] for weight, found, _ in all_]))
        merged[f"q{at}"] = Tensor(np.hstack([found[at][1] for _, found, _ in all_]))
    rest = np.zeros(len(all_[0][2]), np.float32)
    for weight, _, part in all_:
        rest += weight * part
    merged["rest"] = Tensor(rest)
    return merged


def _in_ranges(size: int, work: Any) -> None:
    """The whole range in one go, or, where that pays, by two threads: a chunk is never shared."""
    if size < SPLIT:
        work(0, size)
        return
    middle = size // 2 // CHUNK * CHUNK
    half = _threads.submit(work, 0, middle)
    work(middle, size)
    half.result()

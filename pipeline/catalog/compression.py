"""Lossy compression of float32 vectors, for sums that travel: what is lost now is added to the next vector.

    encoder = Encoder("int8", size=vector.size)
    parts = encoder.encode(vector)            name → Tensor; `encoder.error` remembers what the parts do not say
    decode("int8", parts, vector.size)        float32 [size]
    codec, parts, bad = merge([(0.5, "int8", parts), (0.5, "int8", others)], size)   the weighted sum, ready to travel

    none         4 bytes a value; exact
    bf16  fp16   2 bytes; fp16 has three bits more, and saturates at 65,504, which the next vector may say again
    int8         1 byte, and a float32 scale a block of 1,024 (symmetric, absolute maximum)
    topk:F       the share F (default 0.01) of largest magnitude, 8 bytes each; the threshold comes from a sample
    powersgd:R   matrices as products of rank R (default 2); what is no matrix, or too small to gain, as it is

Error feedback: Seide et al. 2014, Karimireddy et al. 2019. Top-k by a sampled threshold: Lin et al. 2018 (DGC).
PowerSGD: Vogels et al. 2019, with one difference: every worker sends both of its own factors, so one exchange does,
and a sum is the factors side by side.

Everything goes through the vector in chunks that stay in a core's cache, so a codec costs a pass or two over memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError
from ..tensors import Tensor

__all__ = ["CODECS", "Encoder", "check_codec", "decode", "merge", "nbytes_of"]

Vector = npt.NDArray[np.float32]
Parts = Mapping[str, Tensor]
Matrices = Mapping[int, tuple[int, int]]
"""Offset in the vector → rows, columns."""

CODECS = ("none", "bf16", "fp16", "int8", "topk", "powersgd")
CHUNK = 1 << 16
"""Values worked on at a time: 256 KiB."""
BLOCK = 1024
"""Values that share a scale."""
SAMPLE = 1 << 14
"""Values that a threshold is taken from."""
LARGEST = 1e36
"""What a lossy codec takes for finite is below: its sums and scales are then finite, too."""
LARGEST_HALF = np.float32(65504)
SMALLEST_NORMAL_HALF = 113 << 23
"""2^-14: the bits of its float32."""
MAGIC = (13 << 23) + (1 << 22)
"""Added to the bits of a power of two: 1.5 · 2^13 times as much."""
SMALLEST = np.float32(1e-30)
"""A block whose values are all below is sent as zeros: its scale would not be a normal number."""

DENSE = {
    "none": ("float32", np.float32), "bf16": ("bfloat16", np.uint16), "fp16": ("float16", np.uint16),
    "int8": ("int8", np.int8),
}  # fmt: skip
"""Codec → dtype on the wire, and of the words numpy sees."""


def check_codec(name: str, mode: str = "sync") -> str:
    """Return `name`, or raise ConfigurationError saying which there are, or that the mode sends nothing to compress."""
    _split_name(name)
    if mode == "hogwild" and name != "none":
        raise ConfigurationError(f"mode hogwild sends nothing that {name} could compress; use none")
    return name


def _split_name(name: str) -> tuple[str, float]:
    kind, colon, option = name.partition(":")
    defaults = {"topk": 0.01, "powersgd": 2.0}
    try:
        value = float(option) if colon else defaults.get(kind, 0.0)
    except ValueError:
        value = -1.0
    fits = {"topk": 0 < value <= 1, "powersgd": 1 <= value < 1 << 16 and value == int(value)}.get(kind, not colon)
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

    shapes: what powersgd takes for a matrix: offset → (rows, columns); the other codecs do not care

    Raises ConfigurationError for an unknown codec, ValueError for matrices that overlap or do not fit.
    """

    def __init__(self, codec: str, size: int, shapes: Matrices | None = None) -> None:
        self.codec = codec
        self.kind, option = _split_name(codec)
        if size < 1:
            raise ValueError(f"a vector has at least one value, not {size}")
        self.size = size
        self.error: Vector | None = None if self.kind == "none" else np.zeros(size, np.float32)
        """What former parts left out."""
        self._share = option
        self._turn = 0
        self._matrices = _worthwhile(shapes or {}, int(option), size) if self.kind == "powersgd" else {}
        self._random = np.random.default_rng(0)
        self._right = {
            at: self._random.standard_normal((columns, int(option)), np.float32)
            for at, (_, columns) in self._matrices.items()
        }
        """Offset → q [columns, rank] that the next product starts from."""

    def encode(self, vector: Vector) -> dict[str, Tensor]:
        """float32 [size] → parts. The vector is not changed; with codec none it is not copied either.

        A vector that it does not accept makes parts in which `merge` finds it, and is not remembered.
        """
        if vector.dtype != np.float32 or vector.shape != (self.size,):
            raise ValueError(f"expected float32 [{self.size}], not {vector.dtype} {list(vector.shape)}")
        if self.error is None:
            return {"values": Tensor(vector)}
        if not self.accepts(vector):
            return self._nothing()
        if self.kind == "topk":
            return self._largest(self.error, vector)
        if self.kind == "powersgd":
            return self._factors(self.error, vector)
        return self._rounded(self.error, vector)

    def accepts(self, vector: Vector) -> bool:
        """No NaN, no infinity; with a lossy codec also nothing of 1e36 or more, whose rounding could be infinite."""
        if self.error is None:
            return _finite(vector)
        chunks = (vector[at : at + CHUNK] for at in range(0, len(vector), CHUNK))
        return all(chunk.max() < LARGEST and chunk.min() > -LARGEST for chunk in chunks)

    def _rounded(self, error: Vector, vector: Vector) -> dict[str, Tensor]:
        out, scratch = _Dense.empty(self.kind, self.size), _scratch()
        for at in range(0, self.size, CHUNK):
            part = error[at : at + CHUNK]
            part += vector[at : at + CHUNK]
            part -= out.write(part, at, scratch)
            if self.kind == "fp16":  # no more than the next vector can say: a spike is not sent for ever
                np.clip(part, -LARGEST_HALF, LARGEST_HALF, out=part)
        return out.parts()

    def _largest(self, error: Vector, vector: Vector) -> dict[str, Tensor]:
        error += vector
        wanted = max(1, round(self._share * self.size))
        threshold = self._threshold(error)
        found, scratch = [], _scratch()[0]
        for at in range(0, self.size, CHUNK):
            part = error[at : at + CHUNK]
            found.append(np.flatnonzero(np.abs(part, out=scratch[: len(part)]) >= threshold) + at)
        indices = np.concatenate(found)
        if len(indices) > 2 * wanted:  # the sample was no likeness of the whole
            magnitudes = np.abs(error[indices])
            indices = np.sort(indices[np.argpartition(magnitudes, -wanted)[-wanted:]])
        values = error[indices]
        error[indices] = 0
        return {"indices": Tensor(indices.astype(np.uint32)), "values": Tensor(values)}

    def _threshold(self, error: Vector) -> float:
        """Of every n-th magnitude, beginning elsewhere each time."""
        step = max(1, self.size // SAMPLE)
        sample = np.abs(error[self._turn % step :: step])
        self._turn += 1
        rank = max(0, min(len(sample) - 1, round(len(sample) * (1 - self._share))))
        return max(float(np.partition(sample, rank)[rank]), float(np.finfo(np.float32).tiny))

    def _factors(self, error: Vector, vector: Vector) -> dict[str, Tensor]:
        """One step of subspace iteration: p = orthonormal(M q), q = Mᵀ p, M ≈ p qᵀ."""
        parts: dict[str, Tensor] = {}
        rest = []
        for low, high in _gaps(self._matrices, self.size):
            error[low:high] += vector[low:high]
            rest.append(error[low:high].copy())
            error[low:high] = 0
        for at, (rows, columns) in self._matrices.items():
            matrix, new = (flat[at : at + rows * columns].reshape(rows, columns) for flat in (error, vector))
            p, q = self._step(matrix, new, self._right[at])
            if not (_finite(p.reshape(-1)) and _finite(q.reshape(-1))):
                matrix[:] = 0  # else it would hold NaN for ever
            self._right[at] = self._start(q)
            parts[f"p{at}"], parts[f"q{at}"] = Tensor(p), Tensor(q)
        parts["rest"] = Tensor(np.concatenate(rest) if rest else np.empty(0, np.float32))
        return parts

    def _step(self, matrix: Vector, new: Vector, start: Vector) -> tuple[Vector, Vector]:
        """Adds `new` to the matrix, and takes off it what the returned factors say."""
        blocks = _row_blocks(*matrix.shape)
        products = np.empty((len(matrix), start.shape[1]), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # of what is large enough, the product is not finite
            for rows in blocks:
                matrix[rows] += new[rows]
                np.matmul(matrix[rows], start, out=products[rows])
            p = np.ascontiguousarray(np.linalg.qr(products)[0], np.float32)
            across = np.zeros((p.shape[1], matrix.shape[1]), np.float32)
            for rows in blocks:
                across += p[rows].T @ matrix[rows]
            for rows in blocks:
                matrix[rows] -= p[rows] @ across
        return p, np.ascontiguousarray(across.T)

    def _start(self, q: Vector) -> Vector:
        """The next q: this one's directions at length 1, so that nothing under- or overflows, and a random direction
        for one that vanished: it would never find anything again."""
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.linalg.norm(q, axis=0)
        alive = (lengths > SMALLEST) & np.isfinite(lengths)
        random = self._random.standard_normal(q.shape, np.float32)
        start: Vector = np.where(alive, q / np.where(alive, lengths, 1), random)
        return start

    def _nothing(self) -> dict[str, Tensor]:
        """Parts of this codec that hold NaN."""
        nan = np.float32("nan")
        if self.kind == "topk":
            return {"indices": Tensor(np.zeros(1, np.uint32)), "values": Tensor(np.full(1, nan))}
        if self.kind == "powersgd":
            left = {f"p{at}": (rows, self._right[at].shape[1]) for at, (rows, _) in self._matrices.items()}
            right = {f"q{at}": q.shape for at, q in self._right.items()}
            rest = {"rest": (self.size - sum(rows * columns for rows, columns in self._matrices.values()),)}
            return {name: Tensor(np.full(shape, nan)) for name, shape in (left | right | rest).items()}
        out = _Dense.empty(self.kind, self.size)
        if out.scales is not None:
            out.scales[:] = nan
            out.words[:] = 0
        else:
            out.words[:] = 0x7FC0 if self.kind == "bf16" else 0x7E00
        return out.parts()


def decode(codec: str, parts: Parts, size: int, out: Vector | None = None) -> Vector:
    """Parts → float32 [size], into `out` where given. Codec none gives a read-only view of the parts themselves.

    Raises ValueError when the parts are not what `codec` makes of `size` values.
    """
    kind, _ = _split_name(codec)
    if kind == "none" and out is None:
        whole: Vector = _Dense.of(kind, parts, size).words
        return whole
    vector: Vector = np.empty(size, np.float32) if out is None else out
    if kind == "topk":
        indices, values = _sparse(parts, size)
        vector[:] = 0
        vector[indices] = values
    elif kind == "powersgd":
        _multiply(parts, vector)
    else:
        dense = _Dense.of(kind, parts, size)
        for at in range(0, size, CHUNK):
            dense.read(vector[at : at + CHUNK], at)
    return vector


def merge(summands: Sequence[tuple[float, str, Parts]], size: int) -> tuple[str, dict[str, Tensor], list[int]]:
    """Σ weight · parts, in the order given, as codec and parts; and which summands held NaN or infinity, left out.

    The weights of what is left are scaled to their former sum. Exact values stay exact; bf16 and int8 come back as
    bf16, fp16 as fp16, a mixture as float32; topk stays as compressed as it came, and powersgd where all took the same
    matrices as products. Same summands, same bits. Raises ValueError when parts are not their codec's, or a weight is
    not above 0.
    """
    for weight, _, _ in summands:
        if not 0 < weight < math.inf:
            raise ValueError(f"a weight is a finite number above 0, not {weight}")
    # a scale is looked at first: which NaN it is might be lost where it is rounded again
    bad = [at for at, (_, _, parts) in enumerate(summands) if "scales" in parts and not _all_finite(parts)]
    left = [at for at in range(len(summands)) if at not in bad]
    while left:
        scale = math.fsum(weight for weight, _, _ in summands) / math.fsum(summands[at][0] for at in left)
        codec, parts = _merged([(scale * summands[at][0], *summands[at][1:]) for at in left], size)
        if _all_finite(parts):
            return codec, parts, sorted(bad)
        culprits = [at for at in left if not _all_finite(summands[at][2])] or left  # else they overflow
        bad.extend(culprits)
        left = [at for at in left if at not in culprits]
    return "none", {}, sorted(bad)


def _merged(summands: Sequence[tuple[float, str, Parts]], size: int) -> tuple[str, dict[str, Tensor]]:
    kinds = {_split_name(codec)[0] for _, codec, _ in summands}
    if kinds == {"topk"}:
        return "topk", _merge_sparse(summands, size)
    if kinds == {"powersgd"} and len({_matrices_of(parts) for _, _, parts in summands}) == 1:
        return "powersgd", _merge_factors(summands, size)
    if kinds & {"topk", "powersgd"}:
        total = np.zeros(size, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for weight, codec, parts in summands:
                total += np.float32(weight) * decode(codec, parts, size)
        return "none", {"values": Tensor(total)}
    to = {"none": "none", "fp16": "fp16"}.get(next(iter(kinds)), "bf16") if len(kinds) == 1 else "none"
    return to, _merge_dense(summands, to, size)


# -- every value, rounded ------------------------------------------------------------------------------------------


class _Dense:
    """The parts of a codec that keeps every value, readable and writable by range."""

    def __init__(self, kind: str, words: npt.NDArray[Any], scales: Vector | None = None) -> None:
        self.kind = kind
        self.words = words
        self.scales = scales

    @classmethod
    def empty(cls, kind: str, size: int) -> _Dense:
        scales = np.empty(_blocks(size), np.float32) if kind == "int8" else None
        return cls(kind, np.empty(size, DENSE[kind][1]), scales)

    @classmethod
    def of(cls, kind: str, parts: Parts, size: int) -> _Dense:
        """Raises ValueError when the parts are not such a codec's."""
        dtype = DENSE[kind][0]
        _expect(parts, {"values", "scales"} if kind == "int8" else {"values"})
        values = _checked(parts["values"], "values", dtype, (size,))
        words = np.frombuffer(values.buffer(), DENSE[kind][1])
        if kind != "int8":
            return cls(kind, words)
        return cls(kind, words, np.asarray(_checked(parts["scales"], "scales", "float32", (_blocks(size),))))

    def parts(self) -> dict[str, Tensor]:
        values = Tensor.from_buffer(self.words.view(np.uint8).data, DENSE[self.kind][0], self.words.shape)
        return {"values": values} if self.scales is None else {"values": values, "scales": Tensor(self.scales)}

    def write(self, values: Vector, at: int, scratch: Vector) -> Vector:
        """`at` is a multiple of the block. Returns what the parts now say, in scratch[0]."""
        said = scratch[0, : len(values)]
        words = self.words[at : at + len(values)]
        if self.kind == "bf16":
            bits = said.view(np.uint32)
            np.add(values.view(np.uint32), 0x8000, out=bits)  # to the nearest, ties away from zero
            bits >>= 16
            words[:] = bits
            bits <<= 16
        elif self.kind == "fp16":
            _to_half(values, words, scratch)
        else:
            whole = len(values) // BLOCK * BLOCK
            for low, high, length in ((0, whole, BLOCK), (whole, len(values), len(values) - whole)):
                if high > low:
                    blocks, into = (flat[low:high].reshape(-1, length) for flat in (values, said))
                    self._quantize(blocks, words[low:high], into, (at + low) // BLOCK)
        return said

    def _quantize(self, blocks: Vector, words: npt.NDArray[np.int8], said: Vector, first: int) -> None:
        assert self.scales is not None
        scales = self.scales[first : first + len(blocks)]
        np.maximum(blocks.max(1), -blocks.min(1), out=scales)
        scales[scales < SMALLEST] = 0
        scales *= np.float32(1 / 127)
        factors = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
        np.multiply(blocks, factors[:, None], out=said)
        np.rint(said, out=said)
        words[:] = said.reshape(-1)
        said *= scales[:, None]

    def read(self, out: Vector, at: int) -> None:
        words = self.words[at : at + len(out)]
        if self.kind == "bf16":
            bits = out.view(np.uint32)
            bits[:] = words
            bits <<= 16
            return
        if self.kind == "fp16":
            np.take(_halves(), words, out=out, mode="clip")
            return
        out[:] = words
        if self.scales is not None:
            whole = len(out) // BLOCK * BLOCK
            first = at // BLOCK
            blocks = out[:whole].reshape(-1, BLOCK)
            blocks *= self.scales[first : first + len(blocks), None]
            if whole < len(out):
                out[whole:] *= self.scales[first + len(blocks)]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _to_half(values: Vector, words: npt.NDArray[np.uint16], scratch: Vector) -> None:
    """Rounds to float16, saturating: its bits into `words`, its values into scratch[0]. With a NaN all become NaN.

    numpy's own conversion takes 70 ns for a value below 6e-5, which is where gradients lie. Here, 1.5 · 2^13 times the
    value's power of two is added and taken off: what is left is a multiple of the float16's last bit.
    """
    said, magic, count = scratch[:, : len(values)]
    np.clip(values, -LARGEST_HALF, LARGEST_HALF, out=said)
    if not _finite(said):
        words[:], said[:] = 0x7E00, np.float32("nan")
        return
    bits, power, digits = said.view(np.int32), magic.view(np.int32), count.view(np.int32)
    np.bitwise_and(bits, 0x7F800000, out=power)
    np.maximum(power, SMALLEST_NORMAL_HALF, out=power)
    power += MAGIC
    said += magic
    np.subtract(bits, power, out=digits)
    said -= magic
    np.abs(digits, out=digits)
    power -= MAGIC + SMALLEST_NORMAL_HALF
    power >>= 13
    digits += power
    np.right_shift(values.view(np.int32), 16, out=power)
    power &= 0x8000
    digits |= power
    words[:] = digits


@cache
def _halves() -> Vector:
    """The value of every float16, by its bits: to look it up is quicker than numpy's conversion."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _merge_dense(summands: Sequence[tuple[float, str, Parts]], to: str, size: int) -> dict[str, Tensor]:
    sources = [(np.float32(weight), _Dense.of(_split_name(codec)[0], parts, size)) for weight, codec, parts in summands]
    same = all(weight == sources[0][0] for weight, _ in sources)
    out = _Dense.empty(to, size)
    scratch, total = _scratch(), np.empty(CHUNK, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN and infinity, which are looked for afterwards
        for at in range(0, size, CHUNK):
            to_ = min(at + CHUNK, size)
            sum_ = out.words[at:to_] if to == "none" else total[: to_ - at]
            for index, (weight, source) in enumerate(sources):
                if source.kind == "none":
                    part = source.words[at:to_]
                else:
                    part = scratch[0, : to_ - at]
                    source.read(part, at)
                if not same:
                    part = np.multiply(part, weight, out=scratch[0, : to_ - at])
                if index:
                    sum_ += part
                else:
                    np.copyto(sum_, part)
            if same and sources[0][0] != 1:
                sum_ *= sources[0][0]
            if to != "none":
                out.write(sum_, at, scratch)
    return out.parts()


# -- the largest values --------------------------------------------------------------------------------------------


def _sparse(parts: Parts, size: int) -> tuple[npt.NDArray[np.uint32], Vector]:
    """Raises ValueError unless the indices ascend within `size` and there is a value for each."""
    _expect(parts, {"indices", "values"})
    shape = parts["indices"].shape[:1]
    indices = np.asarray(_checked(parts["indices"], "indices", "uint32", shape))
    values = np.asarray(_checked(parts["values"], "values", "float32", shape))
    if len(indices) and int(indices[-1]) >= size:
        raise ValueError(f"index {int(indices[-1])} is outside of {size} values")
    if not (indices[1:] > indices[:-1]).all():
        raise ValueError("expected indices in ascending order, each once")
    return indices, values


def _merge_sparse(summands: Sequence[tuple[float, str, Parts]], size: int) -> dict[str, Tensor]:
    found = [(np.float32(weight), *_sparse(parts, size)) for weight, _, parts in summands]
    union = np.unique(np.concatenate([indices for _, indices, _ in found]))
    total = np.zeros(len(union), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for weight, indices, values in found:
            total[np.searchsorted(union, indices)] += weight * values
    return {"indices": Tensor(union), "values": Tensor(total)}


# -- products of low rank ------------------------------------------------------------------------------------------


def _worthwhile(matrices: Matrices, rank: int, size: int) -> dict[int, tuple[int, int]]:
    """Those that are smaller as factors, by offset. Raises ValueError when they overlap or do not fit."""
    end = 0
    for at, (rows, columns) in sorted(matrices.items()):
        if at < end or rows < 1 or columns < 1 or at + rows * columns > size:
            raise ValueError(f"a matrix of {rows} × {columns} at {at} overlaps another or does not fit {size} values")
        end = at + rows * columns
    return {at: (m, n) for at, (m, n) in sorted(matrices.items()) if rank * (m + n) < m * n}


def _gaps(matrices: Matrices, size: int) -> list[tuple[int, int]]:
    """The ranges that no matrix covers."""
    gaps, at = [], 0
    for begin in sorted(matrices):
        if begin > at:
            gaps.append((at, begin))
        at = begin + matrices[begin][0] * matrices[begin][1]
    if at < size:
        gaps.append((at, size))
    return gaps


def _row_blocks(rows: int, columns: int) -> list[slice]:
    """About a chunk each."""
    step = max(1, CHUNK // columns)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def _products(parts: Parts, size: int) -> dict[int, tuple[Vector, Vector]]:
    """Offset → factors p [m, r], q [n, r]. Raises ValueError when they do not fit into `size` values."""
    offsets = sorted(int(name[1:]) for name in parts if name[:1] == "p" and name[1:].isascii() and name[1:].isdigit())
    _expect(parts, {"rest"} | {f"{side}{at}" for at in offsets for side in "pq"})
    found: dict[int, tuple[Vector, Vector]] = {}
    end = 0
    for at in offsets:
        p, q = parts[f"p{at}"], parts[f"q{at}"]
        if p.dtype != "float32" or q.dtype != "float32" or p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[1]:
            raise ValueError(f"expected float32 factors p [m, r] and q [n, r] at {at}, not {p!r} and {q!r}")
        if not p.shape[0] or not q.shape[0] or at < end or at + p.shape[0] * q.shape[0] > size:
            raise ValueError(f"factors {list(p.shape)} and {list(q.shape)} do not fit at {at} of {size} values")
        end = at + p.shape[0] * q.shape[0]
        found[at] = np.asarray(p), np.asarray(q)
    _checked(parts["rest"], "rest", "float32", (size - sum(len(p) * len(q) for p, q in found.values()),))
    return found


def _multiply(parts: Parts, out: Vector) -> None:
    found = _products(parts, len(out))
    for at, (p, q) in found.items():
        matrix = out[at : at + len(p) * len(q)].reshape(len(p), len(q))
        for rows in _row_blocks(*matrix.shape):
            np.matmul(p[rows], q.T, out=matrix[rows])
    rest, used = np.asarray(parts["rest"]), 0
    for low, high in _gaps({at: (len(p), len(q)) for at, (p, q) in found.items()}, len(out)):
        out[low:high] = rest[used : used + high - low]
        used += high - low


def _matrices_of(parts: Parts) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What tells apart who took other matrices as products: with another rank, others are worth it."""
    return frozenset((name, tensor.shape[:1]) for name, tensor in parts.items() if name != "rest")


def _merge_factors(summands: Sequence[tuple[float, str, Parts]], size: int) -> dict[str, Tensor]:
    """A sum of products of the same matrices is one product: the factors side by side."""
    all_ = [(np.float32(weight), _products(parts, size), np.asarray(parts["rest"])) for weight, _, parts in summands]
    merged: dict[str, Tensor] = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for at in all_[0][1]:
            merged[f"p{at}"] = Tensor(np.hstack([weight * found[at][0] for weight, found, _ in all_]))
            merged[f"q{at}"] = Tensor(np.hstack([found[at][1] for _, found, _ in all_]))
        rest = np.zeros(len(all_[0][2]), np.float32)
        for weight, _, part in all_:
            rest += weight * part
    merged["rest"] = Tensor(rest)
    return merged


# -- checks --------------------------------------------------------------------------------------------------------


def _expect(parts: Parts, names: set[str]) -> None:
    if set(parts) != names:
        raise ValueError(f"expected parts {', '.join(sorted(names))}, not {', '.join(sorted(parts)) or 'none'}")


def _checked(tensor: Tensor, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"expected {name} of {dtype} {list(shape)}, not {tensor!r}")
    return tensor


def _scratch() -> Vector:
    """Room for three chunks: to allocate it anew for each costs more than to work in it."""
    return np.empty((3, CHUNK), np.float32)


def _all_finite(parts: Parts) -> bool:
    return all(
        _finite_words(tensor, 0x7F80 if tensor.dtype == "bfloat16" else 0x7C00)
        if tensor.dtype in ("bfloat16", "float16")
        else tensor.dtype != "float32" or _finite(np.asarray(tensor).reshape(-1))
        for tensor in parts.values()
    )


def _finite(flat: Vector) -> bool:
    """No NaN, no infinity."""
    chunks = (flat[at : at + CHUNK] for at in range(0, len(flat), CHUNK))
    return all(math.isfinite(float(chunk.max()) - float(chunk.min())) for chunk in chunks)


def _finite_words(tensor: Tensor, exponent: int) -> bool:
    """The same of 16-bit floats, by their bits: who is not finite has the largest exponent, after either sign."""
    words = np.frombuffer(tensor.buffer(), np.uint16)
    return not len(words) or bool(words.view(np.int16).max() < exponent and words.max() < exponent | 0x8000)


def clipped(codec: str, parts: Mapping[str, Tensor], size: int, most: float) -> tuple[str, dict[str, Tensor]]:
    """Scaled to a norm of `most` where it is larger; what is scaled travels exact."""
    vector = decode(codec, parts, size)
    norm = float(np.linalg.norm(vector))
    if norm <= most:
        return codec, dict(parts)
    return "none", {"values": Tensor(vector * np.float32(most / norm))}

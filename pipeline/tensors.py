"""Tensors as values: numpy or torch in; read-only and zero-copy out, for both.

A `Tensor` is an immutable view of raw bytes with a dtype and a shape. `np.asarray(t)` and
`torch.as_tensor(t)` share its memory (DLPack). Neither may write to it: to change it, copy it, with `np.array(t)` or
`torch.tensor(t)`. numpy refuses; torch has no read-only tensors, but what it writes stays in this process, and retries
and dead letters carry what was published. bfloat16, which numpy lacks, is kept as raw 16-bit words: torch gets bfloat16
itself, numpy an exact float32 copy.

Wire forms of a tensor inside JSON:
- `{"$tensor": [dtype, shape, offset]}`: raw little-endian bytes at `offset` of the frame's buffers.
- `{"dtype": …, "shape": …, "data": base64}`: self-contained, what people and other languages see.
- nested lists (or a bare number): accepted on input, and by events' fields; read as numpy would (integers as int64),
  but floats as float32; what is beyond its range is refused.
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

__all__ = ["DTYPES", "Buffers", "Tensor", "TensorBytes"]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
    ).split()
} | {"bfloat16": np.dtype("<u2")}
"""Wire name → numpy dtype of the raw words (bfloat16 travels as 16-bit words)."""

_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "bfloat16"}
"""What numpy's own `dtype.name` works out anew each time."""

MAX_DIMENSIONS = 32
ALIGNMENT = 64


class Tensor:
    """An immutable tensor: `dtype` (str), `shape` (tuple of int), `nbytes`.

    Accepts a numpy array, a torch tensor (moved to the CPU), another Tensor, or anything `np.asarray` takes.
    The input's memory is shared, not copied, when it is contiguous: do not change it before it is published. To change
    a tensor that was received, copy it: `np.array(x)`, `torch.tensor(x)`.
    Two tensors are equal when dtype, shape and every byte are.

    Raises TypeError for what cannot travel: dtypes (object, str, …), more than 32 dimensions, sparse tensors.
    """

    __slots__ = ("_array", "_kept", "dtype")

    dtype: str
    _array: npt.NDArray[Any]
    _kept: npt.NDArray[Any]
    """What is compared and sent on: `_array`, or a copy from before torch could write to that."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, Tensor):
            array, dtype = value._array, value.dtype
        elif isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ())):
            array, dtype = _from_torch(value)
        else:
            array = np.asarray(value)
            dtype = _NAMES.get(array.dtype) or array.dtype.name
        if dtype not in DTYPES:
            raise TypeError(f"a tensor of dtype {dtype!r} cannot travel; use one of {', '.join(DTYPES)}")
        if array.ndim > MAX_DIMENSIONS:
            raise TypeError(f"a tensor of {array.ndim} dimensions cannot travel; use at most {MAX_DIMENSIONS}")
        self._init(np.asarray(array, dtype=DTYPES[dtype], order="C"), dtype)

    def _init(self, array: npt.NDArray[Any], dtype: str) -> None:
        """`array`: C order, of the wire's dtype."""
        flags = array.flags
        if flags.writeable:
            array = array.view()
            array.flags.writeable = False
        self._array = self._kept = array
        self.dtype = dtype

    @classmethod
    def from_buffer(cls, buffer: memoryview | bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor over `buffer`, without copying. Raises ValueError when sizes disagree or dtype is unknown."""
        if dtype not in DTYPES:
            raise ValueError(f"unknown tensor dtype {dtype!r}; known: {', '.join(DTYPES)}")
        count = _count(shape)
        if len(buffer) != count * DTYPES[dtype].itemsize:
            raise ValueError(
                f"a {dtype} tensor of shape {list(shape)} has {count * DTYPES[dtype].itemsize} bytes, not {len(buffer)}"
            )
        self = cls.__new__(cls)
        self._init(np.ndarray(shape, DTYPES[dtype], buffer) if count else np.empty(shape, DTYPES[dtype]), dtype)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def buffer(self) -> memoryview:
        """The raw little-endian bytes, C order, without copying."""
        return self._kept.reshape(-1).view(np.uint8).data if self.nbytes else memoryview(b"")

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = _widen(self._array) if self.dtype == "bfloat16" else self._array
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options: Any) -> Any:
        array = self._lend()
        if self.dtype == "bfloat16":
            torch = sys.modules.get("torch")
            if torch is None:
                raise BufferError("numpy has no bfloat16: import torch before exporting this tensor by DLPack")
            return torch.from_dlpack(array).view(torch.bfloat16).__dlpack__(**options)
        return array.__dlpack__(**options)

    def _lend(self) -> npt.NDArray[Any]:
        """For torch, which has no read-only tensors: in shared memory it would crash where it writes, and of a frame's
        bytes retries and dead letters are made."""
        memory: Any = self._array
        while isinstance(memory, (np.ndarray, memoryview)):
            memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
        if isinstance(memory, bytes) and self._kept is self._array:
            self._kept = self._array.copy()
        return memory.apart(self._array) if hasattr(memory, "apart") else self._array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def tolist(self) -> Any:
        return np.asarray(self).tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.dtype == other.dtype and self.shape == other.shape and self.buffer() == other.buffer()

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, self.buffer().tobytes()))

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, shape={list(self.shape)})"

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[bytes, str, tuple[int, ...]]]:
        return Tensor.from_buffer, (self.buffer().tobytes(), self.dtype, self.shape)

    def to_json(self) -> dict[str, Any]:
        """The self-contained JSON form: dtype, shape and base64 data."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "data": base64.b64encode(self.buffer()).decode("ascii"),
        }

    @classmethod
    def from_json(cls, value: Any) -> Tensor:
        """Read the self-contained JSON form, nested lists, or a number. Raises ValueError saying what is wrong."""
        if isinstance(value, dict):
            if set(value) != {"dtype", "shape", "data"}:
                raise ValueError('a tensor in JSON is nested lists or {"dtype": …, "shape": […], "data": base64}')
            try:
                data = base64.b64decode(value["data"], validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise ValueError(f"a tensor's data must be base64: {error}") from None
            return cls.from_buffer(data, _dtype(value["dtype"]), _shape(value["shape"]))
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError("a tensor given as nested lists must be rectangular") from None
        if array.dtype == np.float64 or array.size == 0:
            try:
                with np.errstate(over="raise"):
                    array = array.astype(np.float32)
            except FloatingPointError:
                raise ValueError('a number is too big for float32: use {"dtype": "float64", …}, or an array') from None
        if array.dtype.name not in DTYPES:
            raise ValueError("a tensor given as nested lists must hold only numbers or only booleans")
        return cls(array)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            _validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_serialize, info_arg=True),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "title": "Tensor",
            "format": "tensor",
            "description": "nested lists, or dtype, shape and base64 data (little-endian, C order)",
            "anyOf": [
                {"type": "array"},
                {"type": "number"},
                {
                    "type": "object",
                    "properties": {
                        "dtype": {"enum": list(DTYPES)},
                        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                        "data": {"type": "string", "contentEncoding": "base64"},
                    },
                    "required": ["dtype", "shape", "data"],
                    "additionalProperties": False,
                },
            ],
        }


@dataclass(slots=True)
class Buffers:
    """Collects tensors while a frame's JSON is written; pass as pydantic's serialization context."""

    parts: list[memoryview] = field(default_factory=list)
    nbytes: int = 0
    largest: int = 0
    """Bytes of the biggest tensor."""

    def add(self, tensor: Tensor) -> dict[str, Any]:
        offset = self.nbytes
        buffer = tensor.buffer()
        padding = -len(buffer) % ALIGNMENT
        self.parts.append(buffer)
        if padding:
            self.parts.append(memoryview(bytes(padding)))
        self.nbytes += len(buffer) + padding
        self.largest = max(self.largest, len(buffer))
        return {"$tensor": [tensor.dtype, list(tensor.shape), offset]}


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """The buffers of a frame being read; pass as pydantic's validation context."""

    view: memoryview

    def tensor(self, reference: Any) -> Tensor:
        """The tensor a `$tensor` reference names. Raises ValueError when it does not lie within the frame."""
        if not (isinstance(reference, list) and len(reference) == 3):
            raise ValueError("a $tensor reference is [dtype, shape, offset]")
        dtype, shape, offset = _dtype(reference[0]), _shape(reference[1]), reference[2]
        size = _count(shape) * DTYPES[dtype].itemsize
        if type(offset) is not int or offset < 0 or offset + size > len(self.view):
            raise ValueError(f"tensor bytes {offset}…+{size} lie outside the frame's {len(self.view)} bytes")
        return Tensor.from_buffer(self.view[offset : offset + size], dtype, shape)


def _validate(value: Any, info: ValidationInfo) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict) and "$tensor" in value:
        if not isinstance(info.context, TensorBytes):
            raise ValueError("a $tensor reference outside a frame with buffers")
        return info.context.tensor(value["$tensor"])
    if info.mode == "json" or isinstance(value, (dict, list, tuple, int, float)):
        return Tensor.from_json(value)
    try:
        return Tensor(value)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _serialize(tensor: Tensor, info: SerializationInfo) -> Any:
    if not info.mode_is_json():
        return tensor
    if isinstance(info.context, Buffers):
        return info.context.add(tensor)
    return tensor.to_json()


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"unknown tensor dtype {value!r}; known: {', '.join(DTYPES)}")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**48 for n in value)
    ):
        raise ValueError(f"a tensor's shape is a list of at most {MAX_DIMENSIONS} sizes, got {str(value)[:80]}")
    return tuple(value)


def _count(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _from_torch(value: Any) -> tuple[npt.NDArray[Any], str]:
    try:
        value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    except RuntimeError as error:  # sparse, meta, quantized
        raise TypeError(f"a torch tensor that cannot travel: {error}; make it a dense one with values") from None
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype == "bfloat16":
        value = value.view(sys.modules["torch"].int16)
        return value.numpy().view(np.uint16), dtype
    if dtype not in DTYPES:
        raise TypeError(f"a tensor of dtype {dtype!r} cannot travel; use one of {', '.join(DTYPES)}")
    return value.numpy(), dtype


def _widen(words: npt.NDArray[Any]) -> npt.NDArray[Any]:
    wide = np.asarray(words.astype(np.uint32) << 16).view(np.float32)
    wide.flags.writeable = False
    return wide

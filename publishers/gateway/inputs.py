"""What a body says a model is to be asked: a picture, an array, or JSON."""

from __future__ import annotations

import io
import json
import math
import tokenize
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import parse_form
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from pipeline.catalog import ModelStatus

from .images import BadImage, decode

__all__ = ["BadInput", "needs_thread", "read_input"]

PICTURES = ("image/jpeg", "image/png", "image/webp")
MOST_HEADER = 10_000
MOST_JSON = 4 << 20
"""Bytes: parsing holds up every other request, in whatever thread it runs."""


class BadInput(Exception):
    """Raised with the status that answers it, and what was expected."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def needs_thread(kind: str) -> bool:
    """Decoding a picture takes milliseconds; the event loop has other requests."""
    return kind.startswith(("image/", "multipart/"))


def read_input(kind: str, content_type: str, body: bytes, model: ModelStatus) -> npt.NDArray[Any]:
    """The model's input. `kind` is the content type without its parameters. Raises BadInput."""
    if kind in ("application/octet-stream", ""):
        return _raw(body, model)
    if kind == "application/x-npy":
        return _npy(body)
    if kind in PICTURES:
        return _picture(body, model)
    if kind == "multipart/form-data":
        return _form(content_type, body, model)
    if kind == "application/json":
        return _json(body, model)
    if kind in ("application/x-safetensors", "application/vnd.safetensors"):
        return _safetensors(body)
    raise BadInput(
        415,
        f"content type {kind!r}: use {', '.join(PICTURES)}, multipart/form-data (field image), application/x-npy, "
        "application/x-safetensors, application/octet-stream or application/json",
    )


def _raw(body: bytes, model: ModelStatus) -> npt.NDArray[Any]:
    """Little-endian elements of the model's declared shape."""
    dtype = np.dtype(model.dtype).newbyteorder("<")
    if None in model.shape:
        raise BadInput(
            415, f"model {model.model!r} takes inputs of any size: send application/x-npy, which says theirs"
        )
    shape = [size or 0 for size in model.shape]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise BadInput(
            422, f"{len(body)} bytes; {model.dtype} of shape {shape} has {math.prod(shape) * dtype.itemsize}"
        )
    return np.frombuffer(body, dtype).reshape(shape)


def _npy(body: bytes) -> npt.NDArray[Any]:
    try:
        version = np.lib.format.read_magic(file := io.BytesIO(body))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file, max_header_size=MOST_HEADER)
    except (
        ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        raise BadInput(400, f"not an .npy file: {error}") from None
    if dtype.hasobject or dtype.kind not in "biufc":
        raise BadInput(422, f"arrays of dtype {dtype} are not accepted: numbers and booleans are")
    count = math.prod(shape)
    if len(body) - file.tell() != count * dtype.itemsize:
        raise BadInput(400, f"{len(body) - file.tell()} bytes of data; {dtype} of shape {list(shape)} has others")
    try:
        return np.frombuffer(body, dtype, count, file.tell()).reshape(shape, order="F" if fortran else "C")
    except (ValueError, OverflowError) as error:
        raise BadInput(400, f"not an .npy file: shape {list(shape)}: {error}") from None


def _safetensors(body: bytes) -> npt.NDArray[Any]:
    try:
        tensors = load_safetensors(body)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadInput(400, f"not a safetensors file: {error}") from None
    if len(tensors) != 1:
        raise BadInput(422, f"{len(tensors)} tensors; one is expected")
    return next(iter(tensors.values()))


def _picture(body: bytes, model: ModelStatus) -> npt.NDArray[Any]:
    if model.dtype != "uint8" or len(model.shape) != 3 or model.shape[2] != 3:
        raise BadInput(415, f"model {model.model!r} takes {model.dtype} of shape {model.shape}, not pictures")
    height, width = model.shape[0] or 224, model.shape[1] or 224
    try:
        return decode(body, height, width)
    except BadImage as error:
        raise BadInput(422, str(error)) from None


def _form(content_type: str, body: bytes, model: ModelStatus) -> npt.NDArray[Any]:
    """The file in field `image`."""
    found: list[bytes] = []

    def take(file: Any) -> None:
        if file.field_name == b"image":
            file.file_object.seek(0)
            found.append(file.file_object.read())

    try:
        parse_form(
            {"Content-Type": content_type.encode("latin-1"), "Content-Length": str(len(body)).encode()},
            io.BytesIO(body), None, take,
        )  # fmt: skip
    except (FormParserError, MultipartParseError, ValueError) as error:
        raise BadInput(400, f"not a form: {error}") from None
    if len(found) != 1:
        raise BadInput(422, f"the form has {len(found)} files in field 'image'; one is expected")
    return _picture(found[0], model)


def _json(body: bytes, model: ModelStatus) -> npt.NDArray[Any]:
    """{"inputs": nested lists} (or "pixels", or "data")."""
    if len(body) > MOST_JSON:
        raise BadInput(
            413, f"{len(body):,} bytes of JSON; the limit is {MOST_JSON:,}: send such an array as application/x-npy"
        )
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadInput(400, f"not JSON: {error}") from None
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in ("inputs", "pixels", "data"):
        raise BadInput(422, 'expected {"inputs": nested lists of numbers}')
    try:
        array = np.asarray(next(iter(value.values())))
    except ValueError:
        raise BadInput(422, "inputs: the lists are not rectangular") from None
    if array.dtype.kind not in "biuf":
        raise BadInput(422, "inputs: expected numbers")
    dtype = np.dtype(model.dtype)
    inexact = dtype.kind in "fc"
    with np.errstate(invalid="ignore", over="ignore"):
        cast = array.astype(dtype)
        fits = np.isfinite(cast) if inexact else cast == array
    if fits.all():
        return cast
    if inexact:
        fits |= ~np.isfinite(array)
    if places := np.argwhere(~fits).tolist():
        found = array[tuple(places[0])]
        raise BadInput(422, f"inputs: {found} at {places[0]}; model {model.model!r} takes {_range(dtype)}")
    return cast


def _range(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return f"{dtype}: whole numbers from {np.iinfo(dtype).min} to {np.iinfo(dtype).max}"
    return f"{dtype}: true, false, 1 or 0" if dtype.kind == "b" else f"numbers that {dtype} can hold"

"""Rows of files and lines of JSON as Record events, read piece by piece: a file need not fit into memory."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import Tensor
from pipeline.catalog import Record
from pipeline.errors import ConfigurationError
from pipeline.tensors import DTYPES

__all__ = ["FORMATS", "Value", "read_rows", "record_of"]

Value = bool | int | float | str | None

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""Not 01234, which is a postcode, nor the digits of an account number that no integer column would hold."""
_DECIMAL = re.compile(r"-?(?=[0-9]*[.]|[0-9]+[eE])(0|[1-9][0-9]*)?(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?(?<=[0-9])")


def read_rows(path: Path) -> Iterator[Record]:
    """The rows of a CSV or Parquet file as values by column, of a NPY file as one tensor a row.

    Raises ConfigurationError, before the first row, when the file is missing, of another kind, or damaged.
    """
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(FORMATS)
        raise ConfigurationError(
            f"{path}: files of kind {path.suffix or '(none)'!r} are not supported; use one of {known}"
        )
    if not path.is_file():
        raise ConfigurationError(f"{path}: {'is a directory' if path.is_dir() else 'there is no such file'}")
    return reader(path)


def record_of(source: str, row: int, values: Any) -> Record:
    """A JSON object as a Record. Raises ValueError saying what does not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"a record is a JSON object, not {type(values).__name__}")
    for name, value in values.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(
                f"{name}: a record's values are numbers, texts, booleans or null, not {type(value).__name__}"
            )
    return Record(source=source, row=row, values=values)


def _csv(path: Path) -> Iterator[Record]:
    # newline="": the csv module looks after line ends, those inside quotes too
    file = path.open(newline="", encoding="utf-8-sig")
    try:
        rows = csv.reader(file)
        header = next(rows, [])
        if not header:
            raise ConfigurationError(f"{path}: the first line of a CSV file names its columns; it is empty")
        if len(set(header)) != len(header):
            raise ConfigurationError(f"{path}: two columns have the same name: {', '.join(header)}")
    except BaseException as error:
        file.close()
        if isinstance(error, (UnicodeDecodeError, csv.Error)):
            raise ConfigurationError(f"{path}: not a CSV file in UTF-8: {error}") from None
        raise

    def records() -> Iterator[Record]:
        with file:
            number = 0
            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ConfigurationError(
                        f"{path}, line {rows.line_num}: {len(cells)} cells where the header names {len(header)} columns"
                    )
                values = {name: _value(cell) for name, cell in zip(header, cells, strict=True)}
                yield Record(source=path.name, row=number, values=values)
                number += 1

    return records()


def _value(cell: str) -> Value:
    """What a cell of a CSV file says: nothing, true or false, a number, or else a text."""
    if cell == "":
        return None
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if _INTEGER.fullmatch(cell):
        return int(cell)
    return float(cell) if _DECIMAL.fullmatch(cell) else cell


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigurationError(f"{path}: Parquet files need pyarrow; pip install 'redis-ml-pipeline[data]'") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ConfigurationError(f"{path}: not a Parquet file: {error}") from None

    def records() -> Iterator[Record]:
        with file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    plain = {name: _plain(value) for name, value in values.items()}
                    yield Record(source=path.name, row=number, values=plain)
                    number += 1

    return records()


def _plain(value: Any) -> Value:
    """What JSON has no word for (times, decimals, nested values) travels as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def _npy(path: Path) -> Iterator[Record]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigurationError(f"{path}: not a NPY file of numbers: {error}") from None
    if array.dtype.name not in DTYPES:
        raise ConfigurationError(f"{path}: rows of dtype {array.dtype} cannot travel; use one of {', '.join(DTYPES)}")
    if array.ndim == 0 or math.prod(array.shape) == 0:
        raise ConfigurationError(f"{path}: an array of shape {list(array.shape)} has no rows to publish")
    # A copy of each row: the file may change or go before the event is written.
    return (Record(source=path.name, row=number, tensor=Tensor(np.array(row))) for number, row in enumerate(array))


FORMATS = {".csv": _csv, ".parquet": _parquet, ".npy": _npy}

"""Map-reduce, and work in independent parts: what is asked of workers and what they answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from pydantic import Field, JsonValue

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = ["Task", "TaskResult", "Value", "map_tasks", "reduce_tasks"]


class Value(Event):
    """What functions take and give: JSON, an array, or a dictionary of both."""

    data: JsonValue = None
    tensors: dict[str, Tensor] = Field(default_factory=dict)
    """A dictionary's arrays by name; where `data` is no dictionary, "" is a value that is an array itself. NaN and
    infinity, which JSON lacks, are arrays without dimensions."""

    @classmethod
    def of(cls, value: Any) -> Value:
        """Raises ValueError for what is neither, and for NaN or infinity deep inside. Arrays are not copied."""
        if _is_array(value):
            return cls(tensors={"": Tensor(value)})
        if not isinstance(value, Mapping):
            return cls(data=_plain(value))
        tensors = {name: Tensor(item) for name, item in value.items() if _is_array(item)}
        return cls(data=_plain({name: item for name, item in value.items() if name not in tensors}), tensors=tensors)

    def get(self) -> Any:
        """The value, with arrays as read-only numpy arrays, and those without dimensions as numbers."""
        arrays = {name: np.asarray(tensor) for name, tensor in self.tensors.items()}
        items = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        if isinstance(self.data, dict):
            return {**self.data, **items}
        return items.get("", self.data)


class Task(Event):
    """One part of a job. A map takes one value, a reduce all values of a key."""

    job: str
    part: int = Field(ge=0)
    key: str | None = None
    values: list[Value]
    """In the order of the parts they are from."""
    backup: int = Field(default=0, ge=0)
    """0 first; n: the n-th time it is published, as the others take too long."""


class TaskResult(Event):
    """The answer to a task; the first one counts."""

    values: dict[str, Value]
    """By key; of a reduce, and of a map without one, the only key is ""."""
    seconds: float
    """The function took."""


@cache
def map_tasks(name: str) -> Channel[Task]:
    """The parts that the function `name` is asked to do."""
    return Channel(f"mapreduce.{name}.map", Task, reply=TaskResult, frame=1, keep=60.0)


@cache
def reduce_tasks(name: str) -> Channel[Task]:
    """The keys whose values are to be made one."""
    return Channel(f"mapreduce.{name}.reduce", Task, reply=TaskResult, frame=1, keep=60.0)


def _is_array(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return not math.isfinite(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return True
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numel")


def _plain(value: Any) -> Any:
    """What JSON has, of it and of numpy's numbers."""
    try:
        text = json.dumps(value, allow_nan=False, default=_number)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value is JSON, an array, or a dictionary of both: {error}") from None
    return json.loads(text)


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is none of them")

"""Events: the immutable payloads that travel on channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from .errors import ConfigurationError

__all__ = ["Event", "check_schema"]


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas below one."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for part in parts:
        if isinstance(part, dict) and "type" in part:
            yield part
        yield from _nodes(part)


class Event(BaseModel):
    """Base of all payloads: frozen, extra fields refused, NaN and infinity kept, bytes as base64 in JSON.

    Subclass it with annotated fields, `Tensor` among them. Events compare by value, tensors included. Nest events, not
    instances of their subclasses, whose own fields would be lost: they are refused.

    NaN and infinity are JSON strings; where a string would not be read as a number (strict floats, unions, Any), the
    bare words NaN, Infinity and -Infinity.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        arbitrary_types_allowed=False,
        revalidate_instances="subclass-instances",
        validate_default=True,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        model: Any = handler.resolve_ref_schema(schema)
        config = model.get("config", {})
        strict = config.get("strict") or any(node.get("strict") for node in _nodes(model) if node["type"] == "float")
        if strict and config.get("ser_json_inf_nan") == "strings":
            config["ser_json_inf_nan"] = "constants"
        return schema


def check_schema(where: str, schema: Any) -> None:
    """Raise ConfigurationError when what is written of a model would not be read, or not all of it."""
    for node in _nodes(schema):
        if node["type"] != "model" or node["schema"]["type"] != "model-fields":
            continue
        said, fields = f"{where}: {node['cls'].__name__}", node["schema"]
        for name, field in fields["fields"].items():
            alias, written = field.get("validation_alias", name), field.get("serialization_alias", name)
            read = [[alias]] if isinstance(alias, str) else alias if isinstance(alias[0], list) else [alias]
            if field.get("serialization_exclude"):
                raise ConfigurationError(f"{said}.{name} is excluded, so its value would be lost: keep it elsewhere")
            if written != name and [written] not in read:
                raise ConfigurationError(
                    f"{said}.{name} is written as {written!r} and read as {alias!r}: give it one alias= for both"
                )
        if fields["computed_fields"] and node["config"].get("extra_fields_behavior", "ignore") != "ignore":
            name = fields["computed_fields"][0]["property_name"]
            raise ConfigurationError(f"{said}.{name} is computed, so who reads it would refuse it: make it a property")

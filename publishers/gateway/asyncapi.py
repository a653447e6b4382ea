"""The registered channels as an AsyncAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from pipeline.registry import Record
from pipeline.settings import redact

__all__ = ["document"]


def document(records: Mapping[str, Record], url: str) -> dict[str, Any]:
    """AsyncAPI 3.0: a channel each, with its event type's JSON schema."""
    scheme, _, rest = redact(url).partition("://")
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Channels", "version": "1"},
        "defaultContentType": "application/json",
        "servers": {"redis": {"host": rest.rpartition("@")[2].partition("/")[0], "protocol": scheme}},
        "channels": {
            name: {
                "address": name,
                "messages": {record.type: {"name": record.type, "payload": _payload(name, record)}},
                "x-durable": record.durable,
                "x-reply": record.reply,
            }
            for name, record in sorted(records.items())
        },
    }


def _payload(name: str, record: Record) -> Any:
    """The schema with its references to its own parts as references within the document."""
    root = f"#/channels/{_escaped(name)}/messages/{_escaped(record.type)}/payload"

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(item) for item in part]
        if not isinstance(part, dict):
            return part
        found = {key: moved(value) for key, value in part.items()}
        reference = found.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            found["$ref"] = root + reference[1:]
        return found

    return moved(record.schema)


def _escaped(name: str) -> str:
    """As a step of a JSON pointer in a URI."""
    return quote(name.replace("~", "~0").replace("/", "~1"), safe="")

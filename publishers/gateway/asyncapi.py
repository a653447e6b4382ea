"""The registered channels as an AsyncAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
                "messages": {record.type: {"$ref": f"#/components/messages/{record.type}"}},
                "x-durable": record.durable,
                "x-reply": record.reply,
            }
            for name, record in sorted(records.items())
        },
        "components": {
            "messages": {record.type: {"name": record.type, "payload": record.schema} for record in records.values()}
        },
    }

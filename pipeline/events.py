"""Events: the immutable payloads that travel on channels."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Event"]


class Event(BaseModel):
    """Base of all payloads: frozen, extra fields refused, NaN and infinity kept, bytes as base64 in JSON.

    Subclass it with annotated fields, `Tensor` among them. Events compare by value, tensors included.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        arbitrary_types_allowed=False,
        validate_default=False,
        protected_namespaces=(),
    )

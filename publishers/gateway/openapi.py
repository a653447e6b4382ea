"""What /openapi.json says of predictions, which do not go through FastAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .digits import PATH as DIGITS
from .digits import DigitRequest
from .inputs import PICTURES

__all__ = ["Documented"]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY: dict[str, Any] = {
    **dict.fromkeys((*PICTURES, "application/x-npy", "application/x-safetensors", "application/octet-stream"), _BINARY),
    "multipart/form-data": {
        "schema": {"type": "object", "required": ["image"], "properties": {"image": _BINARY["schema"]}}
    },
    "application/json": {
        "schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "array", "items": {}}}}
    },
}
_SCORE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "probability": {"type": ["number", "null"], "description": "null: the model said NaN, or infinity."},
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["success", "model", "version"],
    "properties": {
        "success": {"const": True},
        "model": {"type": "string"},
        "version": {"type": "integer"},
        "predictions": {"type": "array", "items": _SCORE},
        "batch": {"type": "integer"},
        "output": {"description": "Nested lists of numbers, of models that do not classify."},
    },
}
_DIGIT_BODY = {"application/json": {"schema": DigitRequest.model_json_schema()}}
_DIGIT = {"type": "object", "properties": {**_SCORE["properties"], "label": {"type": "integer"}}}
_DIGIT_ANSWER = {
    "type": "object",
    "required": ["success", "model", "version", "predictions"],
    "properties": {
        **{name: _ANSWER["properties"][name] for name in ("success", "model", "version")},
        "predictions": {"type": "array", "items": _DIGIT},
    },
}
_REFUSAL = {
    "type": "object",
    "required": ["success", "error"],
    "properties": {"success": {"const": False}, "error": {"type": "string"}},
}
_REFUSALS = {
    400: "The body or a header cannot be read.",
    404: "No worker serves the model.",
    408: "The body came too slowly.",
    413: "The body is too big.",
    415: "The model does not take such a body.",
    422: "The model does not take such an input.",
    429: "Too much is under way; see retry-after.",
    500: "The gateway or the worker failed on it.",
    503: "No worker serves the model yet, or Redis does not answer.",
    504: "No answer within the deadline.",
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_TOP = {
    "name": "top", "in": "query", "description": "How many predictions.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
}  # fmt: skip
_DEADLINE = {
    "name": "x-deadline", "in": "header", "description": "Seconds after which an answer is of no use.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
}  # fmt: skip


def _operation(
    summary: str, *parameters: dict[str, Any], body: dict[str, Any] = _BODY, answer: dict[str, Any] = _ANSWER
) -> dict[str, Any]:
    refusals = {
        str(status): {"description": reason, "content": {"application/json": {"schema": _REFUSAL}}}
        for status, reason in _REFUSALS.items()
    }
    said = {"description": "What the model says.", "content": {"application/json": {"schema": answer}}}
    return {
        "post": {
            "summary": summary,
            "parameters": [*parameters, _DEADLINE],
            "requestBody": {"required": True, "content": body},
            "responses": {"200": said, **refusals},
        }
    }


class Documented(FastAPI):
    """An app that describes predictions beside its own routes."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["paths"]["/predict"] = _operation("Ask the picture model, or the first that is served", _TOP)
        document["paths"][DIGITS] = _operation(
            "Classify one handwritten digit; the ten labels, the likeliest first",
            body=_DIGIT_BODY, answer=_DIGIT_ANSWER,
        )  # fmt: skip
        document["paths"]["/models/{name}/predict"] = _operation("Ask a served model", _NAME, _TOP)
        return document

"""The gateway's OpenAPI document."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from gateway.http.requests import ApiRequest, ChatRequest, CompletionRequest

_REFERENCE = "#/components/schemas/{model}"
_BEARER = {"key": {"type": "http", "scheme": "bearer"}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    "400": "a value is not allowed",
    "401": "no valid key",
    "403": "the key may not do this",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "422": "a field is unknown",
    "429": "a quota is used up",
    "503": "too many requests, or the engine failed; see Retry-After",
}


def describe_operation(kind: type[ApiRequest]) -> dict[str, Any]:
    """The part of the document about one route that takes such a request."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    refusals = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    }
    return {
        "security": [{"key": []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "the answer, or its events if `stream` is true"},
            **refusals,
        },
    }


def describe(app: FastAPI) -> None:
    """Add the schemas of the bodies to the document.

    FastAPI does not know them: the gateway reads bodies itself, so that all errors have one shape.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds = [(kind, "validation") for kind in (ChatRequest, CompletionRequest)]
            _, bodies = models_json_schema(kinds, ref_template=_REFERENCE)  # type: ignore[arg-type]
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            components["securitySchemes"] = _BEARER
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]

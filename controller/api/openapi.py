"""The OpenAPI document (3.1), made from the table of routes, so that it can't say anything else than the server does."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from controller import __version__
from controller.api.routing import Route

__all__ = ["document"]

_PARAMETER = re.compile(r"\{(\w+)\}")
_ERROR = {
    "description": "Refused; `check` names what did not hold.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error", "check"],
                "properties": {"error": {"type": "string"}, "check": {"type": "string"}},
            }
        }
    },
}


def _refusals(route: Route) -> list[int]:
    """Return the statuses with which a route may refuse: what its fields bring with them, and its own."""
    found = {503, *route.refusals}  # the database is needed by all, and by who asks whether it is there
    if route.action:
        found |= {401, 403}
    if route.body is not None:
        found |= {400, 408, 413, 415}
    if route.query:
        found.add(400)
    if "{" in route.path:
        found |= {400, 404}
    return sorted(found)


def document(routes: list[Route], url: str) -> dict[str, Any]:
    """Describe the routes."""
    types = [kind for route in routes for kind in (route.body, route.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = iter(schemas)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": f"{route.method.lower()}{re.sub(r'[^a-z0-9]+', '_', route.path)}",
            "parameters": [
                *(
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    for name in _PARAMETER.findall(route.path)
                ),
                *({"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()),
            ],
            "security": [{"certificate": []}, {"token": []}] if route.action else [],
        }
        if route.action:
            operation["x-edgewarden-action"] = route.action
        if route.body is not None:
            content = {"application/json": {"schema": next(schema_of)}}
            operation["requestBody"] = {"required": True, "content": content}
        answer: dict[str, Any] = {"description": "Done."}
        if route.answer is not None:
            answer["content"] = {"application/json": {"schema": next(schema_of)}}
        operation["responses"] = {str(route.status): answer, **{str(status): _ERROR for status in _refusals(route)}}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "EdgeWarden controller", "version": __version__},
        "servers": [{"url": url}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"certificate": {"type": "mutualTLS"}, "token": {"type": "http", "scheme": "bearer"}},
        },
    }

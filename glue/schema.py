"""The JSON schema of recipes, made from the signatures of everything registered; for completion in editors."""

from __future__ import annotations

from typing import Any

from glue.family import HOMES, Family, Method, Of, families, marks


def recipe_schema() -> dict[str, Any]:
    """A JSON schema (2020-12) that every valid recipe satisfies."""
    definitions = {key: _choices(families(key)) for key in HOMES if key not in ("steps", "kinds")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "glue recipe", "type": "object",
        "required": ["steps"], "additionalProperties": False, "$defs": definitions,
        "properties": {
            "about": {"type": "string"}, "seed": {"type": "integer"},
            "include": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "steps": {"type": "array", "minItems": 1, "items": {"anyOf": [_line(step) for step in families("steps")]}},
            "board": {"type": "object"}, "full": {"type": "object"}}}


def _choices(family: Family) -> dict[str, Any]:
    words = {"enum": [method.name for method in family]}
    full = [{"type": "object", "additionalProperties": False, "required": [method.name],
             "properties": {method.name: {**_parameters(method), "description": method.doc.split("\n\n")[0]}}}
            for method in family]
    return {"anyOf": [words, *full]}


def _line(step: Method) -> dict[str, Any]:
    shape = _parameters(step)
    shape["properties"] |= {"as": {"type": "string"}, "step": {"const": step.name}, "each": {"type": "string"},
                            "seed": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}}
    required = [name for name in shape.get("required", []) if name != "members"]
    return {**shape, "required": ["as", "step", *required], "description": step.doc.split("\n\n")[0]}


def _parameters(method: Method) -> dict[str, Any]:
    shape = method.schema.model_json_schema(by_alias=True)
    for name, info in method.parameters.items():
        for mark in marks(info):
            if isinstance(mark, Of):
                shape["properties"][name] = {"$ref": f"#/$defs/{mark.family}"}
    return {"type": "object", "additionalProperties": False, "properties": shape.get("properties", {}),
            "required": shape.get("required", [])}

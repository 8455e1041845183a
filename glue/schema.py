"""The JSON schema of recipes, made from the signatures of everything registered; for completion in editors."""

from __future__ import annotations

from typing import Any

from glue.family import HOMES, Family, Method, Of, families, marks
from glue.recipe import SEEDS, WIDE


def recipe_schema() -> dict[str, Any]:
    """A JSON schema (2020-12) that every valid recipe satisfies."""
    definitions = {key: _choices(families(key)) for key in HOMES if key not in ("steps", "kinds")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "glue recipe", "type": "object",
        "required": ["steps"], "additionalProperties": False, "$defs": definitions,
        "properties": {
            "about": {"type": "string"}, "seed": SEED, **{word: {"type": ["string", "integer"]} for word in WIDE},
            "include": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "steps": {"type": "array", "minItems": 1, "items": {"anyOf": [_line(step) for step in families("steps")]}},
            "board": _object({"table": {"type": "string"}, "headline": {"type": "string"},
                              "claims": {"type": "array", "items": {"anyOf": CLAIMS}}}, ["table"]),
            "full": _object({"seeds": {"type": "array", "items": SEED}}, [])}}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


SEED = {"type": "integer", "minimum": SEEDS.start, "maximum": SEEDS[-1]}
CLAIMS = [_object({one: {"type": "string"}, other: {"type": "string"}}, [one, other])
          for one, other in (("better", "than"), ("refused", "by"))]


def _choices(family: Family) -> dict[str, Any]:
    words = {"enum": [method.name for method in family]}
    full = [_object({method.name: {**_parameters(method), "description": method.doc.split("\n\n")[0]}}, [method.name])
            for method in family]
    return {"anyOf": [words, *full]}


def _line(step: Method) -> dict[str, Any]:
    shape = _parameters(step)
    shape["properties"] |= {"as": {"type": "string"}, "step": {"const": step.name}, "seed": SEED,
                            "tags": {"type": "array", "items": {"type": "string"}}}
    shape["required"] = ["as", "step", *(name for name in shape["required"] if name != "members")]
    shape["description"] = step.doc.split("\n\n")[0]
    if "members" in step.parameters:
        shape["properties"]["each"] = {"type": "string"}
        either = [{"required": ["members"]}, {"required": ["each"]}]
        shape |= {"oneOf": either} if step.parameters["members"].is_required() else {"not": {"allOf": either}}
    return shape


def _parameters(method: Method) -> dict[str, Any]:
    shape = method.schema.model_json_schema(by_alias=True)
    for name, info in method.parameters.items():
        for mark in marks(info):
            if isinstance(mark, Of):
                shape["properties"][name] = {"$ref": f"#/$defs/{mark.family}"}
    return _object(shape.get("properties", {}), shape.get("required", []))

"""Is a value valid against a JSON schema? As far as filling one needs to know.

``pattern``, ``patternProperties`` and ``format`` are taken to hold: a pattern of a client's is never run (pattern_text.py
says why), and a format is an annotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.providers.schema_walk import DEPTH_MAX, DeadEnd, Schema, Walk, number


def conforms(value: Any, schema: Schema, walk: Walk, *, depth: int = 0) -> bool:
    """Raises: Unfillable when the walk has no more steps."""
    walk.step()
    if isinstance(schema, bool):
        return schema
    if depth > DEPTH_MAX:
        return False
    try:
        return _combinations_hold(value, schema, walk, depth + 1) and _own_keywords_hold(value, schema, walk, depth + 1)
    except (DeadEnd, TypeError, AttributeError):  # the schema itself is not one
        return False


def same(one: Any, other: Any, walk: Walk) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not."""
    walk.step()
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(a, b, walk) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], walk) for key in one)
    return bool(one == other)


def _combinations_hold(value: Any, schema: Mapping[str, Any], walk: Walk, depth: int) -> bool:
    def holds(part: Schema) -> bool:
        return conforms(value, part, walk, depth=depth)

    return (
        all(holds(walk.resolve(schema[key])) for key in ("$ref", "$dynamicRef") if key in schema)
        and all(holds(part) for part in schema.get("allOf", ()))
        and ("anyOf" not in schema or any(holds(part) for part in schema["anyOf"]))
        and ("oneOf" not in schema or sum(holds(part) for part in schema["oneOf"]) == 1)
        and ("not" not in schema or not holds(schema["not"]))
        and ("if" not in schema or holds(schema.get("then" if holds(schema["if"]) else "else", True)))
    )


def _own_keywords_hold(value: Any, schema: Mapping[str, Any], walk: Walk, depth: int) -> bool:
    return (
        ("type" not in schema or _has_type(value, schema["type"]))
        and ("enum" not in schema or any(same(value, choice, walk) for choice in schema["enum"]))
        and ("const" not in schema or same(value, schema["const"], walk))
        and _bounds_hold(value, schema, walk, depth)
    )


def _bounds_hold(value: Any, schema: Mapping[str, Any], walk: Walk, depth: int) -> bool:
    match value:
        case bool() | None:
            return True
        case int() | float():
            return _number_holds(value, schema)
        case str():
            return _count_holds(len(value), schema, "Length")
        case list():
            return _count_holds(len(value), schema, "Items") and _items_hold(value, schema, walk, depth)
        case _:
            return _count_holds(len(value), schema, "Properties") and _properties_hold(value, schema, walk, depth)


_NAMES: dict[type, tuple[str, ...]] = {
    bool: ("boolean",),
    type(None): ("null",),
    int: ("integer", "number"),
    float: ("number",),
    str: ("string",),
    list: ("array",),
    dict: ("object",),
}


def _has_type(value: Any, types: str | Sequence[str]) -> bool:
    stated = [types] if isinstance(types, str) else types
    whole = isinstance(value, float) and value.is_integer() and "integer" in stated
    return whole or any(name in stated for name in _NAMES[type(value)])


def _number_holds(value: float, schema: Mapping[str, Any]) -> bool:
    exact = number(value)
    if "minimum" in schema and exact < number(schema["minimum"]):
        return False
    if "maximum" in schema and exact > number(schema["maximum"]):
        return False
    if "exclusiveMinimum" in schema and exact <= number(schema["exclusiveMinimum"]):
        return False
    if "exclusiveMaximum" in schema and exact >= number(schema["exclusiveMaximum"]):
        return False
    step = number(schema.get("multipleOf", 0))
    return step <= 0 or (exact / step).denominator == 1


def _count_holds(size: int, schema: Mapping[str, Any], what: str) -> bool:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    return bool(size >= least and (most is None or size <= most))


def _items_hold(value: list[Any], schema: Mapping[str, Any], walk: Walk, depth: int) -> bool:
    prefix = schema.get("prefixItems", ())
    rest = schema.get("items", True)
    if isinstance(rest, list):  # as drafts up to 2019-09 wrote it
        prefix, rest = rest, schema.get("additionalItems", True)
    for place, item in enumerate(value):
        if not conforms(item, prefix[place] if place < len(prefix) else rest, walk, depth=depth):
            return False
    pairs = ((value[i], value[j]) for i in range(len(value)) for j in range(i))
    if schema.get("uniqueItems") is True and any(same(one, other, walk) for one, other in pairs):
        return False
    if "contains" in schema:
        found = sum(conforms(item, schema["contains"], walk, depth=depth) for item in value)
        return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", found))
    return True


def _properties_hold(value: dict[str, Any], schema: Mapping[str, Any], walk: Walk, depth: int) -> bool:
    walk.step(len(schema.get("required", ())))
    if any(name not in value for name in schema.get("required", ())):
        return False
    for name, others in schema.get("dependentRequired", {}).items():
        if name in value and any(other not in value for other in others):
            return False
    known = schema.get("properties", {})
    extra = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    names = schema.get("propertyNames", True)
    return all(
        conforms(name, names, walk, depth=depth)
        and conforms(item, known.get(name, extra) if isinstance(known, dict) else extra, walk, depth=depth)
        for name, item in value.items()
    )

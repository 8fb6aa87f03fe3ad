"""Reading a JSON schema that somebody else wrote: references, combinations and a bound on the work.

A schema of a few lines can describe a value without end, or take exponential time to decide. Everything that walks one
takes its steps from one `Walk`, which has only so many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

Schema = Mapping[str, Any] | bool
Plain = dict[str, Any]  # a schema without references and combinations
Branches = Sequence[Schema]  # one of them has to hold

STEPS_MAX = 20_000
DEPTH_MAX = 40

_COMBINING = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"})


class DeadEnd(Exception):
    """No value here; another branch may have one."""


class Unfillable(Exception):
    """No value can be found for the schema."""


class Walk:
    """One reading of the schema *root*, with its bound of steps."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._left = STEPS_MAX

    def step(self, count: int = 1) -> None:
        """Raises: Unfillable when there are no more steps."""
        self._left -= count
        if self._left < 0:
            raise Unfillable("the schema is too large or too deep to be filled")

    @property
    def tired(self) -> bool:
        """Half of the steps are used: only what must be is worth a step now."""
        return self._left < STEPS_MAX // 2

    def resolve(self, reference: object) -> Schema:
        """The schema at *reference*, a JSON pointer within the root or a name given by ``$anchor``.

        Raises: DeadEnd if there is none.
        """
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise DeadEnd(f"{reference!r} is not within the schema")
        if reference[1:2] not in ("", "/"):
            return self._anchored(reference[1:])
        found: Any = self._root
        for part in reference[2:].split("/") if len(reference) > 1 else ():
            self.step()
            found = _member(found, part.replace("%25", "%").replace("~1", "/").replace("~0", "~"))
        return _as_schema(found)

    def _anchored(self, name: str) -> Schema:
        for container in ("$defs", "definitions"):
            inside = self._root.get(container, {}) if isinstance(self._root, Mapping) else {}
            for candidate in _mapping(inside).values():
                self.step()
                if isinstance(candidate, Mapping) and name in (
                    candidate.get("$anchor"),
                    candidate.get("$dynamicAnchor"),
                ):
                    return candidate
        raise DeadEnd(f"no schema is named {name!r}")

    def flatten(self, schema: Schema, *, depth: int = 0) -> tuple[Plain, list[Branches]]:
        """*schema* as one plain schema and the branches of which one each must hold too.

        Raises: DeadEnd if nothing is valid against it.
        """
        if schema is True:
            return {}, []
        if schema is False or depth > DEPTH_MAX:
            raise DeadEnd("nothing is valid here")
        members = _mapping(schema)
        self.step(1 + len(members))
        plain: Plain = {key: value for key, value in members.items() if key not in _COMBINING}
        branches: list[Branches] = []
        for part in self._parts(members):
            inner, more = self.flatten(part, depth=depth + 1)
            plain = self.merge(plain, inner)
            branches += more
        branches += [_list(members[key]) for key in ("anyOf", "oneOf") if members.get(key)]
        if "if" in members:
            branches.append([{"allOf": [members["if"], members.get("then", True)]}, members.get("else", True)])
        return plain, branches

    def _parts(self, members: Mapping[str, Any]) -> Iterator[Schema]:
        for key in ("$ref", "$dynamicRef"):
            if key in members:
                yield self.resolve(members[key])
        yield from _list(members.get("allOf", ()))

    def merge(self, one: Plain, other: Plain) -> Plain:
        """What is valid against both. Where both only describe (a default, a title), *one* wins."""
        self.step(1 + len(one) + len(other))
        both = {**other, **one}
        for key in one.keys() & other.keys():
            self.step(_entries(one[key]) * _entries(other[key]) if key == "enum" else _entries(other[key]))
            both[key] = _merged(key, one[key], other[key])
        properties = {**_mapping(other.get("properties", {})), **_mapping(one.get("properties", {}))}
        self.step(len(properties))
        for name in properties:
            properties[name] = _all_of([_property(schema, name) for schema in (one, other)])
        if properties:
            both["properties"] = properties
        return both


def _property(schema: Plain, name: str) -> Schema:
    own = _mapping(schema.get("properties", {}))
    return _as_schema(own[name] if name in own else schema.get("additionalProperties", True))


def _all_of(schemas: list[Schema]) -> Schema:
    telling = [schema for schema in schemas if schema is not True and schema != {}]
    if len(telling) > 1 and telling[0] == telling[1]:
        return telling[0]
    return {"allOf": telling} if len(telling) > 1 else telling[0] if telling else True


def _merged(key: str, one: Any, other: Any) -> Any:
    rule = _BOTH.get(key)
    return one if rule is None else rule(one, other)


def _lower(one: Any, other: Any) -> Fraction:
    return min(number(one), number(other))


def _higher(one: Any, other: Any) -> Fraction:
    return max(number(one), number(other))


def _either(one: Any, other: Any) -> list[Any]:
    return list(dict.fromkeys([*_list(one), *_list(other)]))


def _shared(one: Any, other: Any) -> list[Any]:
    return [value for value in _list(one) if value in _list(other)]


def _both_schemas(one: Any, other: Any) -> Any:
    if isinstance(one, list) or isinstance(other, list):
        return one
    return False if one is False or other is False else _all_of([one, other])


def _by_place(one: Any, other: Any) -> list[Schema]:
    longer, shorter = sorted((_list(one), _list(other)), key=len, reverse=True)
    return [_all_of([schema, *shorter[place : place + 1]]) for place, schema in enumerate(longer)]


def _types_of_both(one: Any, other: Any) -> list[str]:
    ours, theirs = (set(_list(types) if isinstance(types, list) else [types]) for types in (one, other))
    both = ours & theirs
    if ("integer" in ours and "number" in theirs) or ("number" in ours and "integer" in theirs):
        both.add("integer")
    if not both:
        raise DeadEnd("two types that exclude each other")
    return sorted(both)


def number(value: Any) -> Fraction:
    """*value* exactly as it is written in JSON.

    Raises: DeadEnd if it is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise DeadEnd(f"{value!r} is not a number")
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)


def bound(plain: Plain, key: str, otherwise: int) -> int:
    """The number of characters, items or properties that *key* states."""
    return int(number(plain[key])) if key in plain else otherwise


def common_multiple(one: Fraction, other: Fraction) -> Fraction:
    denominator = lcm(one.denominator, other.denominator)
    return Fraction(lcm(int(one * denominator), int(other * denominator)), denominator)


_BOTH: dict[str, Callable[[Any, Any], Any]] = {
    "type": _types_of_both,
    "required": _either,
    "enum": _shared,
    "minimum": _higher,
    "exclusiveMinimum": _higher,
    "minLength": _higher,
    "minItems": _higher,
    "minProperties": _higher,
    "minContains": _higher,
    "maximum": _lower,
    "exclusiveMaximum": _lower,
    "maxLength": _lower,
    "maxItems": _lower,
    "maxProperties": _lower,
    "maxContains": _lower,
    "multipleOf": lambda one, other: common_multiple(number(one), number(other)),
    "additionalProperties": _both_schemas,
    "items": _both_schemas,
    "contains": _both_schemas,
    "propertyNames": _both_schemas,
    "prefixItems": _by_place,
}


def _entries(value: Any) -> int:
    return len(value) if isinstance(value, list | Mapping) else 1


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DeadEnd(f"{type(value).__name__} where an object is expected")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise DeadEnd(f"{type(value).__name__} where an array is expected")
    return list(value)


def _as_schema(value: Any) -> Schema:
    return value if isinstance(value, bool) else _mapping(value)


def _member(container: Any, name: str) -> Any:
    if isinstance(container, Mapping) and name in container:
        return container[name]
    if isinstance(container, list) and name.isdecimal() and int(name) < len(container):
        return container[int(name)]
    raise DeadEnd(f"nothing is at {name!r}")

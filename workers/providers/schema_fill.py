"""A value that is valid against a JSON schema: what `echo` answers with where a model would have thought of one.

Always the same value for the same schema. Defaults and examples come first, strings are named after their property,
optional properties are filled too, down to `OPTIONAL_DEPTH`. ``patternProperties``, ``dependentSchemas`` and the
``unevaluated…`` keywords are not read. Source: JSON Schema 2020-12, and ``definitions`` and tuples as older drafts write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from workers.providers.schema_check import conforms, same
from workers.providers.schema_scalars import number_for, string
from workers.providers.schema_walk import (
    Branches,
    DeadEnd,
    Plain,
    Schema,
    Unfillable,
    Walk,
    bound,
)

OPTIONAL_DEPTH = 4  # below this, only what is required is filled
NESTING_MAX = 50
ITEMS_MAX = 1000
VARIANTS = 4  # how many values are tried where the first one is excluded by something else in the schema
CHARS_MAX = 1024 * 1024  # of all strings in a value together

_TYPES = ("object", "string", "integer", "number", "array", "boolean", "null")
_TELLING = {  # keywords by the type that they speak of
    "object": ("properties", "required", "additionalProperties", "minProperties", "propertyNames"),
    "array": ("items", "prefixItems", "minItems", "contains", "uniqueItems"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("pattern", "format", "minLength", "maxLength"),
}


def fill(schema: Schema, *, name: str = "value") -> Any:
    """A value that is valid against *schema*; *name* is what a string without further rules says.

    Raises: Unfillable if there is none, or finding one takes too long.
    """
    try:
        return _Filler(schema).value(schema, _Place(name=name))
    except DeadEnd as error:
        raise Unfillable(f"no value is valid against the schema: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where in the value we are. Different variants are different values where the schema leaves room."""

    name: str
    depth: int = 0  # of the value
    nesting: int = 0  # of the calls: a schema may branch for ever without getting anywhere
    variant: int = 0

    def inside(self, name: str, *, variant: int | None = None) -> _Place:
        return _Place(
            name=name,
            depth=self.depth + 1,
            nesting=self.nesting + 1,
            variant=self.variant if variant is None else variant,
        )


class _Filler:
    def __init__(self, root: Schema) -> None:
        self._walk = Walk(root)
        self._chars_left = CHARS_MAX

    def value(self, schema: Schema, place: _Place) -> Any:
        """Raises: DeadEnd if there is none here, Unfillable when the work is over its bound."""
        self._walk.step()
        plain, branches = self._walk.flatten(schema)
        for candidate in self._candidates(plain, branches, place):
            if conforms(candidate, schema, self._walk):
                return candidate
        raise DeadEnd(f"nothing fits {place.name!r}")

    def _candidates(self, plain: Plain, branches: list[Branches], place: _Place) -> Iterator[Any]:
        if place.nesting > NESTING_MAX:
            return
        if not branches:
            yield from self._plain_candidates(plain, place)
            return
        for branch in self._in_order(branches[0], place):
            try:
                inner, more = self._walk.flatten(branch)
                merged = self._walk.merge(plain, inner)
            except DeadEnd:
                continue
            further = replace(place, nesting=place.nesting + 1)
            yield from self._candidates(merged, [*more, *branches[1:]], further)

    def _in_order(self, branches: Branches, place: _Place) -> list[Schema]:
        """As written; far down, those first that end there."""
        self._walk.step(len(branches))
        return sorted(branches, key=_size) if self._minimal(place) else list(branches)

    def _minimal(self, place: _Place) -> bool:
        return place.depth >= OPTIONAL_DEPTH or self._walk.tired

    def _plain_candidates(self, plain: Plain, place: _Place) -> Iterator[Any]:
        if "const" in plain:
            yield plain["const"]
            return
        if isinstance(plain.get("enum"), list):
            choices = plain["enum"]
            start = place.variant % max(1, len(choices))
            self._walk.step(len(choices))
            yield from choices[start:] + choices[:start]
            return
        if place.variant == 0:
            if "default" in plain:
                yield plain["default"]
            if isinstance(plain.get("examples"), list):
                yield from plain["examples"]
        for type_ in _types(plain):
            for variant in range(place.variant, place.variant + VARIANTS):
                try:
                    yield self._made(type_, plain, replace(place, variant=variant))
                except (
                    DeadEnd,
                    TypeError,
                    AttributeError,
                    ValueError,
                    OverflowError,
                ):  # or the schema itself isn't one
                    break

    def _made(self, type_: str, plain: Plain, place: _Place) -> Any:
        match type_:
            case "object":
                return self._object(plain, place)
            case "array":
                return self._array(plain, place)
            case "string":
                text = string(plain, name=place.name, variant=place.variant)
                self._chars_left -= len(text)
                if self._chars_left < 0:
                    raise Unfillable("the schema asks for too much text")
                return text
            case "integer" | "number":
                return number_for(plain, whole=type_ == "integer", variant=place.variant)
            case "boolean":
                return place.variant % 2 == 0
            case "null":
                return None
            case _:
                raise DeadEnd(f"{type_!r} is not a type")

    def _object(self, plain: Plain, place: _Place) -> dict[str, Any]:
        required = dict.fromkeys(plain.get("required", ()))  # a set that keeps the order
        extra = plain.get("additionalProperties", True)
        most = bound(plain, "maxProperties", ITEMS_MAX)
        for first, others in plain.get("dependentRequired", {}).items():
            required |= dict.fromkeys(others) if first in required else {}
        made: dict[str, Any] = {}
        for name, schema in plain.get("properties", {}).items():
            if name in required:
                made[name] = self.value(schema, place.inside(name))
            elif not self._minimal(place) and len(made) < most:
                self._try_into(made, name, schema, place)
        for name in required:
            if name not in made:
                made[name] = self.value(extra, place.inside(name))
        for name in [name for name in made if name not in required][::-1]:
            if len(made) > most:
                del made[name]
        self._grow(made, plain, place)
        return made

    def _grow(self, made: dict[str, Any], plain: Plain, place: _Place) -> None:
        """Up to ``minProperties``: first with properties that were left out, then with names of our own."""
        least = bound(plain, "minProperties", 0)
        if least > ITEMS_MAX:
            raise DeadEnd("too many properties")
        for name, schema in plain.get("properties", {}).items():
            if len(made) < least and name not in made:
                self._try_into(made, name, schema, place)
        for variant in range(2 * least):
            if len(made) >= least:
                return
            name = self.value(plain.get("propertyNames", True), place.inside("key", variant=variant))
            self._try_into(made, str(name), plain.get("additionalProperties", True), place)

    def _try_into(self, made: dict[str, Any], name: str, schema: Schema, place: _Place) -> None:
        try:
            made[name] = self.value(schema, place.inside(name))
        except DeadEnd:
            return

    def _array(self, plain: Plain, place: _Place) -> list[Any]:
        prefix, rest = plain.get("prefixItems", []), plain.get("items", True)
        if isinstance(rest, list):  # as drafts up to 2019-09 wrote it
            prefix, rest = rest, plain.get("additionalItems", True)
        least, most = bound(plain, "minItems", 0), bound(plain, "maxItems", ITEMS_MAX)
        if least > ITEMS_MAX:
            raise DeadEnd("too many items")
        wanted = len(prefix) if prefix or rest is True or self._minimal(place) else 1
        unique = plain.get("uniqueItems") is True
        made: list[Any] = []
        for schema in _wanted_items(plain):
            self._add(made, schema if rest is True else {"allOf": [schema, rest]}, place, unique=unique)
        for index in range(len(made), min(most, max(wanted, least))):
            try:
                self._add(made, prefix[index] if index < len(prefix) else rest, place, unique=unique)
            except DeadEnd:
                if index < least:
                    raise
                break
        return made

    def _add(self, made: list[Any], schema: Schema, place: _Place, *, unique: bool) -> None:
        if not unique:
            made.append(self.value(schema, place.inside(place.name)))
            return
        first = place.variant + len(made)
        for variant in range(first, first + len(made) + VARIANTS):
            item = self.value(schema, place.inside(place.name, variant=variant))
            if not any(same(item, before, self._walk) for before in made):
                made.append(item)
                return
        raise DeadEnd("no more different items")


def _wanted_items(plain: Plain) -> list[Schema]:
    """What ``contains`` asks for. With a tuple before it, it's left to the tuple to have it."""
    if "contains" not in plain or "prefixItems" in plain:
        return []
    least = bound(plain, "minContains", 1)
    if least > ITEMS_MAX:
        raise DeadEnd("too many items")
    return [plain["contains"]] * least


def _types(plain: Plain) -> list[str]:
    """The types to try, the likeliest first."""
    stated = plain.get("type")
    if isinstance(stated, str):
        return [stated]
    if isinstance(stated, list):
        return sorted((name for name in stated if isinstance(name, str)), key=lambda name: name == "null")
    told = [type_ for type_, keywords in _TELLING.items() if any(keyword in plain for keyword in keywords)]
    return [*told, *(type_ for type_ in ("string", *_TYPES) if type_ not in told)]


def _size(schema: Schema) -> int:
    """How far a branch may lead: nothing is shorter than null, and a reference or an object than a plain value longer."""
    if isinstance(schema, bool):
        return 1
    if schema.get("type") == "null" or "const" in schema or "enum" in schema:
        return 0
    return (
        3
        if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys()
        else 2
        if schema.get("type") in ("object", "array")
        else 1
    )

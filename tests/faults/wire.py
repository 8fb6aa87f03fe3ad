"""What processes of different releases say to each other: each message as an example, and the schema that its reader goes by.

A release records both, once, when it is made (`python -m tests.faults.wire NAME`), and the tests of the next one hold themselves
against them: it must read what the last one wrote, and write what the last one reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Raw, inspect

from schemas.codec import encode
from schemas.frames import AnyFrame
from schemas.jobs import Command, Job, Presence

FOLDER = Path(__file__).with_name("wire")
RELEASE = FOLDER / "RELEASE"  # the name of the last release, and its commit
READ_AS = {"job": Job, "frame": AnyFrame, "command": Command, "presence": Presence}
VARIANTS = 4  # of each message, so that each value of an enumeration is in one of them
SCALARS: dict[Any, tuple[str, Callable[[int], Any]]] = {  # JSON's name, and an example
    inspect.StrType: ("string", "text-{}".format),
    inspect.BoolType: ("boolean", lambda number: number % 2 == 0),
    inspect.IntType: ("integer", lambda number: 1 + number),
    inspect.FloatType: ("number", lambda number: 1.5 + number),
}


class Recorded(msgspec.Struct, frozen=True):
    """What one release said. *messages* are by how they are read, then by their kind."""

    messages: dict[str, dict[str, list[Raw]]]
    schemas: dict[str, dict[str, Any]]


def release() -> tuple[str, str]:
    name, commit = RELEASE.read_text(encoding="ascii").split()
    return name, commit


def recorded(name: str) -> Recorded:
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=Recorded)


def present() -> Recorded:
    """What this release says."""
    messages = {
        read_as: {_kind(struct): _variants(struct) for struct in _structs(type_)} for read_as, type_ in READ_AS.items()
    }
    return Recorded(messages, {read_as: _schema(inspect.type_info(type_)) for read_as, type_ in READ_AS.items()})


def _structs(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) or (type_,)


def _kind(struct: Any) -> str:
    return str(struct.__struct_config__.tag or struct.__name__.lower())


def _variants(struct: Any) -> list[Raw]:
    """With every member told, in each of some values; and with none told that has a default."""
    full = [encode(_example(inspect.type_info(struct), number)) for number in range(VARIANTS)]
    least = encode(_example(inspect.type_info(struct), 0, least=True))
    return [Raw(each) for each in dict.fromkeys([*full, least])]


def _example(type_: Any, number: int, *, least: bool = False) -> Any:
    made: Any
    match type_:
        case inspect.StructType(cls=cls, fields=fields):
            told = [field for field in fields if field.required or not least]
            made = cls(**{field.name: _example(field.type, number) for field in told})
        case inspect.UnionType(types=types):
            made = _example(next(each for each in types if not isinstance(each, inspect.NoneType)), number)
        case inspect.VarTupleType(item_type=item):
            made = (_example(item, number),)
        case inspect.EnumType(cls=cls):
            made = _nth(cls, number)
        case inspect.RawType():
            made = Raw(b'{"any":[1]}')
        case _:
            made = SCALARS[type(type_)][1](number)
    return made


def _schema(type_: Any) -> dict[str, Any]:
    """As JSON Schema, for what a decoder takes: members that it doesn't know are ignored."""
    made: dict[str, Any]
    match type_:
        case inspect.StructType(fields=fields, tag=tag, tag_field=tag_field):
            made = {"type": "object", "properties": {field.encode_name: _schema(field.type) for field in fields}}
            made["required"] = [field.encode_name for field in fields if field.required]
            if tag_field is not None:
                made["properties"][tag_field] = {"const": tag}
                made["required"].append(tag_field)
        case inspect.UnionType(types=types):
            made = {"anyOf": [_schema(each) for each in types]}
        case inspect.VarTupleType(item_type=item):
            made = {"type": "array", "items": _schema(item)}
        case inspect.EnumType(cls=cls):
            made = {"enum": [each.value for each in cls]}
        case inspect.NoneType():
            made = {"type": "null"}
        case inspect.RawType():
            made = {}
        case _:
            made = {"type": SCALARS[type(type_)][0]}
    return made


def _nth(cls: EnumMeta, number: int) -> Any:
    values = list(cls)
    return values[number % len(values)]


if __name__ == "__main__":
    (FOLDER / f"{sys.argv[1]}.json").write_bytes(msgspec.json.format(encode(present()), indent=1) + b"\n")

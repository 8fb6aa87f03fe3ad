"""The rules that every message type keeps: see the house style on messages and settings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import msgspec
import pytest

import schemas
from schemas import admin, providers, routing, settings
from schemas.control import ControlEvent
from schemas.events import Event
from schemas.frames import Frame
from schemas.jobs import Announce, Cancel, Resend, Take

MODULES = [importlib.import_module(f"schemas.{module.name}") for module in pkgutil.iter_modules(schemas.__path__)]
STRUCTS = sorted(
    {
        value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not msgspec.Struct
        if not name.startswith("_") and value.__module__.startswith("schemas.")
    },
    key=lambda struct: (struct.__module__, struct.__name__),
)
TYPED_BY_PEOPLE = {
    settings.__name__,
    admin.__name__,
    providers.__name__,
    routing.__name__,
}  # where a typing mistake must not pass for a setting


def ids(struct: type) -> str:
    return f"{struct.__module__}.{struct.__name__}"


@pytest.mark.parametrize("struct", STRUCTS, ids=ids)
def test_a_message_cannot_be_changed(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.frozen


@pytest.mark.parametrize("struct", STRUCTS, ids=ids)
def test_a_message_is_made_by_the_names_of_its_fields(struct: type[msgspec.Struct]) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(struct).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("struct", [s for s in STRUCTS if s.__module__ not in TYPED_BY_PEOPLE], ids=ids)
def test_a_message_that_travels_ignores_what_it_does_not_know(struct: type[msgspec.Struct]) -> None:
    assert not struct.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize(
    "struct",
    [s for s in STRUCTS if s.__module__ == settings.__name__] + [admin.CreateKey, admin.RotateKey],
    ids=ids,
)
def test_what_a_person_writes_is_refused_if_it_is_not_known(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize(("base", "tag_field"), [(Event, "kind"), (ControlEvent, "kind"), (Frame, "t")], ids=str)
def test_kinds_are_tagged_by_a_name_of_their_own(base: type[msgspec.Struct], tag_field: str) -> None:
    kinds = base.__subclasses__()
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert {kind.__struct_config__.tag_field for kind in kinds} == {tag_field}
    assert len(set(tags)) == len(kinds)
    assert not set(tags) & {kind.__name__ for kind in kinds}  # an explicit name outlives the renaming of a class


def test_commands_are_tagged_by_a_name_of_their_own() -> None:
    assert [command.__struct_config__.tag for command in (Cancel, Resend, Announce, Take)] == [
        "cancel",
        "resend",
        "announce",
        "take",
    ]

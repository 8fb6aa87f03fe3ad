"""How to draw what the schemas are made of."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NotRequired, Required

import msgspec
from hypothesis import strategies as st
from typing_extensions import get_type_hints, is_typeddict

from schemas.jobs import Lane
from schemas.money import Price, Usage

# Text that JSON and subjects can carry: all of Unicode but lone surrogates.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16)
tokens = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=1, max_size=30)
lanes = st.sampled_from(Lane)
counts = st.integers(0, 2**53)
prices = st.integers(0, 10**12)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
raws = json_values.map(lambda value: msgspec.Raw(msgspec.json.encode(value)))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Usage whose classes are truly parts of their totals."""
    fresh, cached, audio_in, plain, reasoning, audio_out = draw(st.tuples(*[st.integers(0, 10**9)] * 6))
    return Usage(
        prompt_tokens=fresh + cached + audio_in,
        completion_tokens=plain + reasoning + audio_out,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
        audio_prompt_tokens=audio_in,
        audio_completion_tokens=audio_out,
    )


wild_usages = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, counts))
price_lists = st.builds(
    Price,
    input=prices,
    output=prices,
    cached_input=st.none() | prices,
    reasoning=st.none() | prices,
    audio_input=st.none() | prices,
    audio_output=st.none() | prices,
)


def of_struct(struct: type[msgspec.Struct], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances of *struct*, with every field drawn by its type."""
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    hints = typing.get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        drawn[field.name] = given[field.name] if field.name in given else _of_field(hints[field.name])
    return st.builds(struct, **drawn)


def _of_field(type_: Any) -> st.SearchStrategy[Any]:
    type_ = getattr(type_, "__supertype__", type_)
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is tuple:
        return st.lists(_of_field(arguments[0]), max_size=3).map(tuple)
    if arguments:  # a union
        return st.one_of([_of_field(argument) for argument in arguments])
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return of_struct(type_)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: text,
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        type(None): st.none(),
        msgspec.Raw: raws,
    }
    return simple[type_] if type_ in simple else st.sampled_from(type_)  # else an enum


def of_sdk_type(type_: Any, given: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """JSON values of a type that the official SDK documents; *given* overrides fields by name."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if is_typeddict(type_):
        return _of_typed_dict(type_, given)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(text, of_sdk_type(arguments[1], given), max_size=2)
    if origin in (list, Iterable) or getattr(origin, "__name__", "") == "SequenceNotStr":
        return st.lists(of_sdk_type(arguments[0], given), max_size=2)
    if arguments:  # a union
        return st.one_of([of_sdk_type(argument, given) for argument in arguments])
    simple: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
        str: lambda: text,
        int: lambda: st.integers(-(2**53), 2**53),
        float: lambda: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2),
        bool: st.booleans,
        type(None): st.none,
        object: lambda: json_values,
    }
    return simple[type_]()


def _of_typed_dict(type_: Any, given: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for name, hint in get_type_hints(type_, include_extras=True).items():
        marker: Any = typing.get_origin(hint)
        inner = typing.get_args(hint)[0] if marker is Required or marker is NotRequired else hint
        kind = required if marker is Required else optional
        kind[name] = given[name] if name in given else of_sdk_type(inner, given)
    return st.fixed_dictionaries(required, optional=optional)

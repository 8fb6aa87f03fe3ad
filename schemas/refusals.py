"""What msgspec says about a body, as a `BadRequest` that a person can act on.

msgspec's errors have no structure besides their text, so this file reads it; ADR 0030 says why that is bearable: a text that
is not known here still reaches the client, only less polished, and the tests pin the known ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from schemas.errors import BadRequest

MESSAGE_MAX_CHARS = 500  # a refusal quotes the client's value, which may be long

ANY_KEY = "[...]"  # how msgspec writes some key of a mapping

Values = Mapping[str, tuple[str, ...]]
NO_VALUES: Values = {}

_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<wanted>[^`]*)`(?:, got `(?P<got>[^`]*)`)?")
_BOUND = re.compile(r"Expected `(?P<kind>[^`]*)` (?P<bound>.+)")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")
_VALUE = re.compile(r"Invalid (?:enum )?value (?P<value>.*)", re.DOTALL)

_NOUNS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def broken(error: msgspec.DecodeError) -> BadRequest:
    """For a body that is not JSON; msgspec names the byte."""
    where = str(error).removeprefix("JSON is malformed: ")
    return BadRequest(_bounded(f"The JSON body of the request could not be parsed: {where}."))


def refusal(error: msgspec.ValidationError, *, at: str = "", values: Values = NO_VALUES) -> BadRequest:
    """For JSON that is not what the API takes.

    *at* is where the decoded piece stands in the body; *values* are the values that a member of a name may have.
    """
    place = _PLACE.fullmatch(str(error))
    what, path = (place["what"], place["path"] or "") if place else (str(error), "")
    param = (at + path).removeprefix(".")
    if missing := _MISSING.fullmatch(what):
        param = f"{param}.{missing['field']}".removeprefix(".")
        return BadRequest(_bounded(f"Missing required parameter: '{param}'."), param=param)
    if unknown := _UNKNOWN.fullmatch(what):
        param = f"{param}.{unknown['field']}".removeprefix(".")
        return BadRequest(_bounded(f"Unknown parameter: '{param}'."), param=param)
    subject = "the request body"
    if param:  # msgspec doesn't say which key of a mapping it means, only that it is one
        subject = f"a value in '{_whole(param)}'" if ANY_KEY in param else f"'{param}'"
    allowed = values.get(param.rpartition(".")[2], ())
    return BadRequest(_bounded(_sentence(what, subject, allowed)), param=_whole(param) or None)


def _sentence(what: str, subject: str, allowed: tuple[str, ...]) -> str:
    if kind := _TYPE.fullmatch(what):
        wanted = " or ".join(_noun(word) for word in kind["wanted"].split(" | ") if word != "null")
        got = f", but got {_noun(kind['got'])} instead" if kind["got"] else ""
        return f"Invalid type for {subject}: expected {wanted or 'null'}{got}."
    if bound := _BOUND.fullmatch(what):
        return f"Invalid value for {subject}: expected {_noun(bound['kind'])} {bound['bound']}."
    if value := _VALUE.fullmatch(what):
        supported = f" Supported values are: {', '.join(map(repr, allowed))}." if allowed else ""
        return f"Invalid value for {subject}: {value['value']}.{supported}"
    return f"Invalid value for {subject}: {what}."


def _whole(param: str) -> str:
    """*param* up to the mapping that has the bad value."""
    return param.partition(ANY_KEY)[0]


def _noun(word: str) -> str:
    return _NOUNS.get(word, f"`{word}`")


def _bounded(text: str) -> str:
    return text if len(text) <= MESSAGE_MAX_CHARS else text[: MESSAGE_MAX_CHARS - 1] + "…"

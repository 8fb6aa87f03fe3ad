from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.providers.pattern_text import text_matching


@pytest.mark.parametrize(
    "pattern",
    [
        "^[A-Z]{3}-\\d{4}$",
        "^(\\+\\d{1,3})?\\d{7,10}$",
        "^[^@\\s]+@[^@\\s]+\\.[a-z]{2,}$",
        "a|b|",
        "^(?:red|green)(?P<shade>-dark)?$",
        "^\\S+\\s\\w*\\W?$",
        "[\\]\\-x]{2}[a-]",
        "^x*?y+?z??$",
        "\\u0041\\x42\\t",
        ".{3}",
        "^#(?:[0-9a-fA-F]{3}){1,2}$",
        "(?<year>\\d{4})",
    ],
)
def test_text_matches_its_pattern(pattern: str) -> None:
    text = text_matching(pattern)
    assert text is not None
    assert re.search(pattern.replace("(?<year>", "(?P<year>"), text)


def test_text_grows_to_the_length_that_is_asked_for() -> None:
    assert len(text_matching("^[a-z]+$", 30) or "") == 30
    assert len(text_matching("^[a-z]{2,5}$", 30) or "") == 5
    assert len(text_matching("^(ab)*c$", 9) or "") >= 9


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=x)y",
        "(a)\\1",
        "\\bword",
        "[z-a]",
        "(",
        "a{99999}",
        "[^\\S\\s]",
        "*a",
        "(" * 50 + ")" * 50,
        "\\p{L}",
        "[a",
        "a{2",
        "\\",
    ],
)
def test_text_is_none_where_the_pattern_is_beyond_us(pattern: str) -> None:
    assert text_matching(pattern) is None


@given(st.text("ab.*+?|()[]{}^$\\d1,-", max_size=25))
@settings(max_examples=300, deadline=None)
def test_any_pattern_is_read_without_an_error(pattern: str) -> None:
    text_matching(pattern, 3)

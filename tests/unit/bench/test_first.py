"""What counts as the first token, and who is asked when."""

from __future__ import annotations

import pytest

from bench.first import CONTENT, Client, by_turns


@pytest.mark.parametrize(
    ("chunk", "counts"),
    [
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
        (b'data: {"choices":[{"delta":{"content":"a"}}]}', True),
        (b'data: {"choices":[{"delta":{"content":"\\""}}]}', True),
        (b'data: {"choices":[],"usage":{}}', False),
    ],
)
def test_a_role_alone_is_no_token(chunk: bytes, counts: bool) -> None:
    assert bool(CONTENT.search(chunk)) is counts


class Told(Client):
    def __init__(self, name: str, asked: list[tuple[str, int]]) -> None:
        self.name, self.asked = name, asked

    def first_token_s(self, number: int) -> float:
        self.asked.append((self.name, number))
        return 0.001


def test_the_entrants_take_turns_and_no_two_prompts_are_alike() -> None:
    asked: list[tuple[str, int]] = []
    took_ms = by_turns([Told("a", asked), Told("b", asked)], 3)
    assert [name for name, _ in asked] == ["a", "b", "b", "a", "a", "b"]
    assert len({number for _, number in asked}) == 6
    assert took_ms == [[1.0] * 3] * 2

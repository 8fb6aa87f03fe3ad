"""What counts as the first word of an answer."""

from __future__ import annotations

import msgspec
import pytest

from ingress.speech import says_something


def chunk(delta: object, **choice: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode({"choices": [{"index": 0, "delta": delta, **choice}]}))


@pytest.mark.parametrize(
    "silent",
    [
        chunk({"role": "assistant", "content": ""}),
        chunk({"role": "assistant", "content": None, "refusal": None, "tool_calls": []}),
        chunk({}),
        chunk(None),
        chunk({"role": "assistant", "reasoning_content": ""}, finish_reason=None, logprobs=None),
        msgspec.Raw(b'{"choices":[]}'),
        msgspec.Raw(b'{"choices":[],"prompt_filter_results":[{"prompt_index":0}]}'),
    ],
)
def test_a_role_and_nothing_else_is_no_word(silent: msgspec.Raw) -> None:
    assert not says_something(silent)


@pytest.mark.parametrize(
    "spoken",
    [
        chunk({"content": "a"}),
        chunk({"content": " "}),
        chunk({"reasoning_content": "hm"}),
        chunk({"refusal": "no"}),
        chunk({"tool_calls": [{"index": 0, "id": "x"}]}),
        chunk({"something_new": {"a": 1}}),
        chunk({}, finish_reason="stop"),
        msgspec.Raw(b'{"choices":7}'),
        msgspec.Raw(b"not json"),
        msgspec.Raw(b'{"choices":[{"delta":{}},{"delta":{"content":"second"}}]}'),
    ],
)
def test_content_of_any_kind_is_a_word_and_so_is_an_end(spoken: msgspec.Raw) -> None:
    assert says_something(spoken)

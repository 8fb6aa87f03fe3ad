"""What the engine refuses reaches the client as the error it is, with the engine's own words."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.vllm.asking import ask
from tests.vllm.tiny_model import HELLO

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"max_tokens": 10**6}, "max_tokens=1000000 cannot be greater than max_model_len"),
    "long prompt": ({"messages": [{"role": "user", "content": "x " * 20_000}]}, "maximum context length"),
    "greedy n": ({"n": 2}, "n must be 1 when using greedy sampling"),
}
refused = pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@refused
@streamed
def test_refusal_has_the_engines_words(client: OpenAI, changes: dict[str, Any], words: str, *, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**ask(HELLO, **changes), stream=stream)
    assert caught.value.status_code == 400
    assert caught.value.type


@streamed
def test_refusal_after_the_engines_200_is_an_error_too(client: OpenAI, *, stream: bool) -> None:
    """vLLM finds a bad schema only once it streams: its error comes inside an answer with status 200."""
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.APIError, match="json schema"):
        list(client.chat.completions.create(**ask(HELLO, response_format=schema), stream=stream))


@streamed
def test_model_that_nobody_serves_is_not_found(client: OpenAI, *, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match="nope") as caught:
        client.chat.completions.create(**ask(HELLO, model="nope"), stream=stream)
    assert caught.value.code == "model_not_found"


def test_models_lists_the_engines_model(client: OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").object == "model"

"""An engine's end as its log tells it. The lines are vLLM's (0.32), shortened."""

from __future__ import annotations

import pytest

from workers.engine.advice import LINE_MAX_CHARS, advice, cause

TOO_SMALL = """\
(EngineCore pid=7) ERROR 11-21 12:16:02 [core.py:1510] ValueError: To serve at least one request with the model's max seq len \
(8192), (0.5 GiB KV cache is needed, which is larger than the available KV cache memory (0.2 GiB).
Traceback (most recent call last):
  File "utils.py", line 12, in wait_for_engine_startup
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
ENDS = {
    "doesn't fit": TOO_SMALL,
    "doesn't fit ": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB",
    "no GPU": "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`",
    "HF_TOKEN": "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1)",
    "look at its name": "OSError: nobody/nothing is not a local folder and is not a valid model identifier listed on 'https://hf.co/models'",
    "can't be fetched": "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
    "config.json": "   - For Hugging Face models: ensure the presence of a 'config.json'.",
    "flags": "usage: vllm [-h] [-v]\nvllm: error: unrecognized arguments: --no-such-flag=1",
    "disk": "OSError: [Errno 28] No space left on device",
    "socket": "OSError: [Errno 98] Address already in use",
}


@pytest.mark.parametrize(("words", "log"), ENDS.items(), ids=ENDS.keys())
def test_a_known_end_has_an_advice(words: str, log: str) -> None:
    assert words.strip() in (advice(log) or "")


def test_an_unknown_end_has_none() -> None:
    assert advice("INFO Starting to load model\nSegmentation fault") is None
    assert cause("INFO Starting to load model\nSegmentation fault") is None


def test_the_cause_is_the_error_and_not_the_word_that_there_was_one() -> None:
    told = cause(TOO_SMALL)
    assert told is not None
    assert "ValueError: To serve at least one request" in told
    assert cause(ENDS["flags"]) == "vllm: error: unrecognized arguments: --no-such-flag=1"
    assert len(cause("ValueError: " + "x" * 1000) or "") == LINE_MAX_CHARS

"""Bodies that the API takes: every documented field, every role and every part at least once."""

from __future__ import annotations

from typing import Any

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}

EVERY_FIELD: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B",
    "messages": [HELLO],
    "audio": {"format": "wav", "voice": {"id": "voice-1"}},
    "frequency_penalty": -2,
    "function_call": {"name": "look_up"},
    "functions": [{"name": "look_up", "description": "d", "parameters": {"type": "object"}}],
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 10,
    "max_tokens": 20,
    "metadata": {"trace": "abc"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m", "policy": {"input": {"mode": "score"}, "output": None}},
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": [{"type": "text", "text": "t"}]},
    "presence_penalty": 0.5,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "xhigh",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "strict": True}},
    "safety_identifier": "s",
    "seed": -9007199254740991,
    "service_tier": "flex",
    "stop": ["\n", "END"],
    "store": False,
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "temperature": 0,
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
    "tools": [TOOL, {"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}}],
    "top_logprobs": 5,
    "top_p": 0.1,
    "user": "u",
    "verbosity": "low",
    "web_search_options": {
        "search_context_size": "low",
        "user_location": {"type": "approximate", "approximate": {"city": "Graz", "country": "AT"}},
    },
    "provider": {
        "order": ["a"],
        "allow_fallbacks": True,
        "max_price": {"prompt": 0.1, "completion": "0.6"},
        "sort": "price",
    },
    "models": ["n"],
}

CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": "be brief", "name": "d"},
    {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "look", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "mp3"}},
            {"type": "file", "file": {"file_data": "AA==", "filename": "a.pdf"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": {"id": "audio-1"},
        "function_call": {"name": "f", "arguments": "{}"},
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{not json"}},
            {"id": "2", "type": "custom", "custom": {"name": "c", "input": "i"}},
        ],
    },
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]},
    {"role": "function", "name": "f", "content": None},
]

"""The official SDK as tests use it: it never tries again by itself."""

from __future__ import annotations

import ssl

import openai

TLS = (
    ssl.create_default_context()
)  # one for all: each client would read the world's certificates anew, 20 ms of a processor


def sdk(base_url: str, key: str, *, timeout_s: float = 20.0) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(verify=TLS)
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout_s, http_client=http)

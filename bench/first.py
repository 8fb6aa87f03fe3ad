"""The time to the first token of one stream at a time, at several entrants by turns, request by request.

What the machine does meanwhile it does to all of them alike; and no entrant is warmer than the other. The first token is the first
chunk with content: a role alone is none, whoever says it.

    BENCH_API_KEYS=none,sk-… python -m bench.first --url http://127.0.0.1:8000/v1 --url http://127.0.0.1:8001/v1 --model m
"""

import os
import re
import socket
import time
from urllib.parse import urlsplit

import click
import msgspec

from bench.wire import number_bytes, request_bytes, usage_problem

KEYS_VARIABLE = "BENCH_API_KEYS"
ANSWER_WAIT_S = 30.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024
READ_BYTES = 64 * 1024
CONTENT = re.compile(rb'"content":"[^"]')


class Client:
    """One keep-alive connection to one entrant."""

    def __init__(self, url: str, api_key: str, *, model: str, tokens: int) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        path = parts.path.rstrip("/") + "/chat/completions"
        self._tokens = tokens
        self._request = request_bytes(f"{host}:{port}", path, api_key=api_key, model=model, stream=True, tokens=tokens)
        self._socket = socket.create_connection((host, port), timeout=ANSWER_WAIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def first_token_s(self, number: int) -> float:
        """Of one whole stream. Raises: ClickException if it is not right, OSError."""
        begun_s, first_s, answer = time.perf_counter(), 0.0, bytearray()
        self._socket.sendall(self._request + number_bytes(number))
        while not answer.endswith(b"0\r\n\r\n"):
            data = self._socket.recv(READ_BYTES)
            answer += data
            if not first_s and CONTENT.search(answer):
                first_s = time.perf_counter()
            if not data or len(answer) > ANSWER_BYTES_MAX:
                raise click.ClickException("a stream ended early, or not at all")
        problem = usage_problem(answer, answer.find(b"\r\n\r\n") + 4, self._tokens)
        if problem or not first_s:
            raise click.ClickException(problem or "a stream without content")
        return first_s - begun_s


def by_turns(clients: list[Client], rounds: int) -> list[list[float]]:
    """Milliseconds, by client; who goes first changes each time."""
    took_ms: list[list[float]] = [[] for _ in clients]
    for number in range(rounds):
        order = range(len(clients)) if number % 2 == 0 else reversed(range(len(clients)))
        for at in order:
            took_ms[at].append(clients[at].first_token_s(number * len(clients) + at) * 1000)
    return took_ms


@click.command(help=__doc__.split("\n\n", 1)[0], epilog=f"The keys are read from {KEYS_VARIABLE}, in the same order.")
@click.option("--url", "urls", multiple=True, required=True, help="Base URL, ending in /v1; of each entrant.")
@click.option("--model", required=True)
@click.option("--tokens", default=16, show_default=True, help="Of each stream.")
@click.option("--requests", default=100, show_default=True, help="At each entrant.")
def main(*, urls: tuple[str, ...], model: str, tokens: int, requests: int) -> None:
    keys = os.environ.get(KEYS_VARIABLE, "").split(",")
    clients = [Client(url, key, model=model, tokens=tokens) for url, key in zip(urls, keys, strict=True)]
    print(msgspec.json.encode(by_turns(clients, requests)).decode())


if __name__ == "__main__":
    main()

"""The bytes of a request, and what is wrong with the bytes of an answer: pure, and cheap for answers that are right."""

from bench.provider import WORD

TOKEN = b" " + WORD.encode()
NUMBER_BYTES = 16  # the twelve digits that make every prompt another one, and the brackets after them


def request_bytes(
    authority: str, path: str, *, api_key: str, model: str, stream: bool, tokens: int | None = None
) -> bytes:
    """A request up to the number at the end of its prompt, which `number_bytes` adds.

    With *tokens* the answer has exactly so many, from an engine that knows ``ignore_eos``, and tells its usage.
    """
    system = "You are a helpful assistant that answers in a few short sentences."
    flags = '"stream":true,' if stream else ""
    if tokens is not None:
        flags += '"ignore_eos":true,"temperature":0,'
        flags += '"stream_options":{"include_usage":true},' if stream else ""
    body = (
        f'{{"model":"{model}",{flags}"max_tokens":{tokens or 64},"messages":[{{"role":"system","content":"{system}"}},'
        f'{{"role":"user","content":"Tell me of the water that comes down the pipe to turbine number '
    ).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {authority}\r\nauthorization: Bearer {api_key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body) + NUMBER_BYTES}\r\n\r\n"
    )
    return head.encode() + body


def number_bytes(number: int) -> bytes:
    """What completes a request: its number and the end of its body, NUMBER_BYTES long."""
    return b'%012d"}]}' % number


def whole_problem(buffer: bytearray, body_at: int, chunks: int) -> str | None:
    """None while the answer is incomplete, empty when it is right, else what is wrong with it."""
    head = bytes(buffer[:body_at]).lower()
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        until = body_at + int(head[at + 17 : head.index(b"\r\n", at + 17)])
        if len(buffer) < until:
            return None
    elif not buffer.endswith(b"0\r\n\r\n"):
        return None
    if not head.startswith(b"http/1.1 200"):
        return status_of(buffer)
    body = bytes(buffer[body_at:]) if at >= 0 else without_chunks(buffer, body_at)
    if body.count(TOKEN) != chunks:
        return f"{body.count(TOKEN)} tokens instead of {chunks}"
    return "" if b'"usage"' in body else "no usage"


def stream_problem(buffer: bytearray, body_at: int, chunks: int) -> str:
    """Empty when the stream is right: all tokens, one chunk each, a finish chunk and [DONE]; else what is wrong with it."""
    if not buffer.startswith(b"HTTP/1.1 200"):
        return status_of(buffer)
    if right_stream(buffer, chunks):
        return ""
    body = without_chunks(buffer, body_at)  # an event may lie across two HTTP chunks
    if right_stream(body, chunks):
        return ""
    tokens, events = body.count(TOKEN), body.count(b"data: {")
    return f"a stream of {tokens} tokens in {events} events, {'with' if b'data: [DONE]' in body else 'without'} [DONE]"


def usage_problem(buffer: bytearray, body_at: int, tokens: int) -> str:
    """Empty when a stream of a real engine is right: [DONE], and usage that says *tokens*; else what is wrong with it."""
    if not buffer.startswith(b"HTTP/1.1 200"):
        return status_of(buffer)
    body = without_chunks(buffer, body_at)
    if b"data: [DONE]" in body and b'"completion_tokens":%d' % tokens in body and b'"error"' not in body:
        return ""
    return f"a stream without [DONE], or not of {tokens} tokens"


def right_stream(body: bytes | bytearray, chunks: int) -> bool:
    return body.count(TOKEN) == chunks and body.count(b"data: {") > chunks and body.count(b"data: [DONE]") == 1


def without_chunks(buffer: bytearray, body_at: int) -> bytes:
    """The body of a chunked answer, up to where its framing is broken if it is."""
    parts: list[bytes] = []
    at = body_at
    while True:
        end = buffer.find(b"\r\n", at)
        size = chunk_size(bytes(buffer[at:end])) if end >= 0 else 0
        if not size:
            return b"".join(parts)
        parts.append(bytes(buffer[end + 2 : end + 2 + size]))
        at = end + 4 + size


def chunk_size(line: bytes) -> int:
    """The size that a chunk's first line names; 0 for the last chunk and for what is no such line."""
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        return 0


def status_of(buffer: bytearray) -> str:
    return f"status {bytes(buffer[9:12]).decode('ascii', 'replace')}"

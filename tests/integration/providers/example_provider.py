"""A server that answers in lines of JSON: {"text": "…"} for each token, the last with "end", "prompt" and "tokens", too."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import closing

import msgspec

from schemas.errors import ProviderFailed, ProviderNonsense
from schemas.jobs import Job
from schemas.money import Usage
from schemas.settings import RouteSettings, WorkerSettings
from workers.providers.base import Chunk, Provider
from workers.providers.openai_faults import complaint, refusal
from workers.providers.patience import Patience
from workers.providers.upstream import Upstream


class Line(msgspec.Struct):
    text: str
    prompt: int = 0
    tokens: int = 0
    end: str | None = None  # in the last line


class Lines(Provider):
    name = "lines"

    def __init__(self, route: RouteSettings, settings: WorkerSettings) -> None:
        self._upstream = Upstream(route.base_url or "", {}, max_concurrency=route.slots, settings=settings)
        self._settings = settings

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        patience = Patience.with_job(job.timeouts, self._settings, clock=asyncio.get_running_loop().time)
        answer = await self._upstream.ask("POST", "/generate", body=bytes(job.body), patience=patience)
        with closing(answer):  # also when the client leaves: then the server stops
            if answer.status != 200:
                raise refusal(answer.status, complaint(await answer.read_some(4096, patience)))
            said, rest, member = "", b"", "delta" if job.stream else "message"
            while data := await answer.read(patience):
                patience.renew()
                *lines, rest = (rest + data).split(b"\n")
                for told in [msgspec.json.decode(line, type=Line) for line in lines]:
                    said = told.text if job.stream else said + told.text
                    usage = Usage(prompt_tokens=told.prompt, completion_tokens=told.tokens) if told.end else None
                    if job.stream or told.end:
                        choice = {"index": 0, member: {"role": "assistant", "content": said}, "finish_reason": told.end}
                        members = msgspec.json.encode({"choices": [choice]})
                        yield Chunk(members, tokens=len(told.text) > 0, finish_reason=told.end, usage=usage)
                    if told.end:
                        return
                if len(said) + len(rest) > self._settings.max_response_bytes:
                    raise ProviderNonsense
        raise ProviderFailed("The answer ended early.")

    async def aclose(self) -> None:
        await self._upstream.aclose()

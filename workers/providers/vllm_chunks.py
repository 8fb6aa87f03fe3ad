"""What vLLM says beyond the API: token ids, taken out of the chunks before they go on; pure."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.structs import replace

from schemas.errors import ProviderFailed, ProviderNonsense
from workers.providers.base import Chunk
from workers.providers.openai_chunks import Around, ChunkReader

_IDS = b'token_ids"'  # of the choices, and of the prompt
_LAST_IDS = re.compile(rb',"token_ids":(\[[\d,]*\])\}\]$')  # of the last choice: a text can't have bare quotes
_FINISH = b'"finish_reason":'  # once in each choice
_NULL = Raw(b"null")

_choices = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_ids = msgspec.json.Decoder(tuple[Annotated[int, Meta(ge=0, lt=2**32)], ...] | None).decode
_encode = msgspec.json.encode


class _Request(Struct):
    n: int | None = None


_request = msgspec.json.Decoder(_Request).decode


class VllmChunkReader(ChunkReader):
    """Reads as its parent does, and moves the token ids from the JSON into the chunk.

    They are kept for an answer with one choice: only that one could be continued. They are counted for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prompt_told = False
        self._one_choice: bool | None = None

    def _chunk(self, members: dict[str, Raw], data: bytes, *, streamed: bool, said: Raw | None = None) -> Chunk | None:
        prompt_ids: tuple[int, ...] = ()
        ids_by_choice: list[tuple[int, ...] | None] = []
        if _IDS in data and "choices" in members:
            said = members["choices"]
            try:
                prompt_ids = _ids(members.pop("prompt_token_ids", _NULL)) or ()
                members["choices"], ids_by_choice = _without_ids(bytes(members["choices"]))
            except msgspec.MsgspecError as error:
                raise ProviderNonsense("The engine sent token ids that are none.") from error
        chunk = super()._chunk(members, data, streamed=streamed, said=said)
        if chunk is None:
            return None
        counted = [ids for ids in ids_by_choice if ids is not None]
        changes: dict[str, Any] = {}
        if counted and len(counted) == len(ids_by_choice):
            changes["tokens"] = sum(len(ids) for ids in counted)  # not estimated
        if self._is_one_choice():
            if prompt_ids and not self._prompt_told:
                self._prompt_told = True
                changes["prompt_token_ids"] = prompt_ids
            if len(counted) == 1:
                changes["token_ids"] = counted[0]
        return replace(chunk, **changes) if changes else chunk

    def _again(self, raw: bytes, around: Around) -> Chunk | None:
        if _IDS not in raw:
            return super()._again(raw, around)
        try:
            found = _without_last_ids(raw)
        except msgspec.MsgspecError:  # ids that are none: `_chunk` says so
            return None
        if found is None:
            return None
        rest, ids = found
        chunk = super()._again(rest, around)
        if chunk is None:
            return None
        token_ids = ids if self._is_one_choice() else ()
        return Chunk(chunk.members, len(ids), chunk.finish_reason, upstream_id=chunk.upstream_id, token_ids=token_ids)

    def check_complete(self) -> None:
        """VLLM says of every choice why it finished, so a stream without that was cut off, ``[DONE]`` or not.

        Raises: as its parent's.
        """
        super().check_complete()
        if not self.finished:
            raise ProviderFailed("The engine's answer ended early.")

    def _is_one_choice(self) -> bool:
        """In a stream, each choice of several comes in chunks of its own: only the request tells."""
        if self._one_choice is None:
            try:
                self._one_choice = (_request(self.habits.request).n or 1) == 1
            except msgspec.MsgspecError:
                self._one_choice = True
        return self._one_choice


def _without_ids(choices: bytes) -> tuple[Raw, list[tuple[int, ...] | None]]:
    """The choices without their token ids, and these. Raises: MsgspecError."""
    if (found := _without_last_ids(choices)) is not None:
        rest, last = found
        return Raw(rest), [last]
    each = _choices(choices)
    ids = [_ids(choice.pop("token_ids", _NULL)) for choice in each]
    return Raw(_encode(each)), ids


def _without_last_ids(choices: bytes) -> tuple[bytes, tuple[int, ...]] | None:
    """As `_without_ids`, for the only choice: hardly any chunk has more, and vLLM says the ids last. None if it is otherwise.

    They are cut off, and the rest is not touched. Raises: MsgspecError.
    """
    last = _LAST_IDS.search(choices)
    if last is None or choices.count(_FINISH) != 1 or _IDS in (rest := choices[: last.start()]):
        return None
    return rest + b"}]", _ids(last[1]) or ()

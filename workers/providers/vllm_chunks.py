"""What vLLM says beyond the API: token ids, taken out of the chunks before they go on; pure."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from schemas.errors import ProviderNonsense
from workers.providers.base import Chunk
from workers.providers.openai_chunks import ChunkReader

_IDS = b'token_ids"'  # of the choices, and of the prompt

_choices = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_ids = msgspec.json.Decoder(tuple[int, ...] | None).decode
_encode = msgspec.json.encode


class VllmChunkReader(ChunkReader):
    """Reads as its parent does, and moves the token ids from the JSON into the chunk.

    They are kept for an answer with one choice: only that one could be continued.
    """

    def _chunk(self, members: dict[str, Raw], data: bytes, *, streamed: bool) -> Chunk | None:
        prompt_ids: tuple[int, ...] = ()
        ids_by_choice: list[tuple[int, ...]] = []
        if _IDS in data:
            try:
                prompt_ids = _ids(members.pop("prompt_token_ids", Raw(b"null"))) or ()
                choices = _choices(members.get("choices", Raw(b"[]")))
                ids_by_choice = [_ids(choice.pop("token_ids", Raw(b"null"))) or () for choice in choices]
            except msgspec.MsgspecError as error:
                raise ProviderNonsense("The engine sent token ids that are none.") from error
            members["choices"] = Raw(_encode(choices))
        chunk = super()._chunk(members, data, streamed=streamed)
        if chunk is None or not (prompt_ids or any(ids_by_choice)):
            return chunk
        return msgspec.structs.replace(
            chunk,
            tokens=sum(len(ids) for ids in ids_by_choice),  # counted, not estimated
            token_ids=ids_by_choice[0] if len(ids_by_choice) == 1 else (),
            prompt_token_ids=prompt_ids,
        )

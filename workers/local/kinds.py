"""The kinds of model servers that are known, each told by its own API, and what they serve.

An address is first asked for ``/v1/models``, which all of them have. What that shows decides who is asked for proof: a
question that a server doesn't know is an error in its owner's log, so no server is asked all of them.
Sources: docs/adr/0040-local-servers.md
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from schemas import subjects
from workers.local.asker import Asker, Said

MODELS_MAX = 100  # of one server; further ones are not served
SHOWN_MAX = 10 * MODELS_MAX
A_PATH_BEGINS = ("/", "./", "../", "~", "\\")

OLLAMA_SLOTS = (
    2  # it works on one at a time unless told otherwise (OLLAMA_NUM_PARALLEL): one more is at hand when that is done
)
OLLAMA_SLOTS_MAX = 64
LM_STUDIO_SLOTS = 4  # its default for Max Concurrent Predictions
LLAMA_CPP_SLOTS = 4  # where it doesn't say, as a router of several models
VLLM_SLOTS = 256  # its default for --max-num-seqs


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A model for chat. *name* is the server's own, *size* in bytes if told, *loaded* whether it is in memory now."""

    name: str
    size: int | None = None
    loaded: bool = False

    @property
    def public(self) -> str:
        """What clients call it: the same, but of a path only the file's name. The owner's folders are nobody's business."""
        if not self.name.startswith(A_PATH_BEGINS) and self.name[1:3] not in (":\\", ":/"):
            return self.name
        last = self.name.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return last.removesuffix(".gguf") or self.name


Models = tuple[LocalModel, ...]


class Kind(Protocol):
    """One kind of server. It keeps what it has learned of the one that it stands for."""

    name: str
    slots: int
    version: str

    def __init__(self, asker: Asker) -> None: ...

    async def proves(self) -> bool:
        """Whether the server at the address is one of this kind, as it seems to be. Raises: Fault."""
        ...

    async def models(self) -> Models | None:
        """What it serves for chat now; None if it is no such server any more. Asked every few seconds. Raises: Fault."""
        ...

    async def with_loaded(self, models: Models) -> Models:
        """The same, each with whether it is in memory. Raises: Fault."""
        ...


class Ollama:
    name = "ollama"

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._shown: dict[tuple[str, str], object] = {}  # capabilities by name and digest
        self.slots = _ollama_slots(os.environ.get("OLLAMA_NUM_PARALLEL", ""))
        self.version = ""

    async def proves(self) -> bool:
        self.version = _text((await self._asker.get("/api/version")).members.get("version"))
        return bool(self.version) and await self.models() is not None

    async def models(self) -> Models | None:
        """Without those that it would only pass on to ollama.com: that would be its owner's account."""
        members = (await self._asker.get("/api/tags")).members
        if "models" not in members:
            return None
        listed = [entry for entry in _objects(members["models"]) if not entry.get("remote_host")]
        found = [
            LocalModel(name=_text(entry.get("name")), size=_number(entry.get("size")))
            for entry in listed[:MODELS_MAX]
            if _servable(_text(entry.get("name"))) and await self._is_for_chat(entry)
        ]
        return tuple(found)

    async def with_loaded(self, models: Models) -> Models:
        members = (await self._asker.get("/api/ps")).members
        loaded = {entry.get("name") for entry in _objects(members.get("models"))}
        return _marked(models, loaded)

    async def _is_for_chat(self, entry: dict[str, Any]) -> bool:
        """Newer versions list what a model can do; older ones are asked once for each. Neither loads it."""
        capabilities = entry.get("capabilities")
        if capabilities is None:
            key = _text(entry.get("name")), _text(entry.get("digest"))
            if key not in self._shown:
                if len(self._shown) >= SHOWN_MAX:
                    self._shown.clear()
                shown = await self._asker.post("/api/show", {"model": entry["name"]})
                self._shown[key] = shown.members.get("capabilities")
            capabilities = self._shown[key]
        if isinstance(capabilities, list):
            return "completion" in capabilities
        details = entry.get("details")
        return not isinstance(details, dict) or "bert" not in _text(details.get("family"))


class LmStudio:
    name = "lmstudio"
    slots = LM_STUDIO_SLOTS
    version = ""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._names: tuple[str, ...] = ()
        self._types: dict[str, str] = {}

    async def proves(self) -> bool:
        entries = (await self._asker.get("/api/v0/models")).members.get("data")
        return isinstance(entries, list) and all("state" in entry and "type" in entry for entry in _objects(entries))

    async def models(self) -> Models | None:
        """What it would answer for: all that it has, or, where it may not load them itself, those that are loaded."""
        members = (await self._asker.get("/v1/models")).members
        if "data" not in members:
            return None
        names = tuple(name for entry in _objects(members["data"]) if _servable(name := _text(entry.get("id"))))
        if names != self._names:
            self._types = {_text(entry.get("id")): _text(entry.get("type")) for entry in await self._described()}
            self._names = names
        chat = [name for name in names if not self._types.get(name, _guessed_type(name)).startswith("embedding")]
        return tuple(LocalModel(name=name) for name in chat[:MODELS_MAX])

    async def with_loaded(self, models: Models) -> Models:
        return _marked(models, {entry.get("id") for entry in await self._described() if entry.get("state") == "loaded"})

    async def _described(self) -> list[dict[str, Any]]:
        return _objects((await self._asker.get("/api/v0/models")).members.get("data"))


class LlamaCpp:
    name = "llamacpp"
    version = ""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.slots = LLAMA_CPP_SLOTS

    async def proves(self) -> bool:
        """It has shown itself by now. Its properties may be kept behind a key, or not be there while it loads."""
        properties = (await self._asker.get("/props")).members
        self.slots = _number(properties.get("total_slots")) or LLAMA_CPP_SLOTS
        self.version = _text(properties.get("build_info"))
        return True

    async def models(self) -> Models | None:
        """One, or in its router mode all that it would load."""
        said = await self._asker.get("/v1/models")
        if said.status == 503:
            return ()  # it is loading its model
        if "data" not in said.members:
            return None
        entries = [entry for entry in _objects(said.members["data"]) if _servable(_text(entry.get("id")))]
        return tuple(
            LocalModel(name=_text(entry["id"]), size=_size(entry), loaded=_status(entry) in ("", "loaded", "sleeping"))
            for entry in entries[:MODELS_MAX]
            if _writes_text(entry)
        )

    async def with_loaded(self, models: Models) -> Models:
        return models


class Vllm:
    name = "vllm"
    slots = VLLM_SLOTS

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.version = ""

    async def proves(self) -> bool:
        self.version = _text((await self._asker.get("/version")).members.get("version"))
        return bool(self.version)

    async def models(self) -> Models | None:
        members = (await self._asker.get("/v1/models")).members
        if "data" not in members:
            return None
        names = [name for entry in _objects(members["data"]) if _servable(name := _text(entry.get("id")))]
        return tuple(LocalModel(name=name, loaded=True) for name in names[:MODELS_MAX])

    async def with_loaded(self, models: Models) -> Models:
        return models


OWNERS: dict[str, type[Kind]] = {"llamacpp": LlamaCpp, "vllm": Vllm, "organization_owner": LmStudio}
USUAL_PORTS: dict[int, type[Kind]] = {11434: Ollama, 1234: LmStudio, 8080: LlamaCpp, 8000: Vllm}


class Stranger(Exception):
    """Somebody listens, but no model server that is known. *why* is for the operator; None: it isn't worth a word."""

    def __init__(self, why: str | None = None) -> None:
        super().__init__(why)
        self.why = why


async def recognise(asker: Asker) -> Kind:
    """Which kind of server is at the address.

    Raises: ProviderUnreachable if nobody listens there, another Fault if it can't be told now, Stranger.
    """
    listed = await asker.get("/v1/models")
    if listed.status in (401, 403):
        if await _is_penstock(asker):
            raise Stranger
        raise Stranger("it asks for a key; to use it, configure a route with its address and key")
    candidates = _candidates(listed, port=int(asker.address.rpartition(":")[2]))
    for kind in candidates:
        found = kind(asker)
        if await found.proves():
            return found
    raise Stranger(
        "it speaks OpenAI's API but is none of those that are known; to use it, configure a route"
        if candidates
        else None
    )


def _candidates(listed: Said, *, port: int) -> list[type[Kind]]:
    """Who the server may be that says *listed* to ``/v1/models``. Empty lists show nothing: then the port counts."""
    if listed.server == "llama.cpp":
        return [LlamaCpp]
    if not _is_list(listed):
        return []
    owners = {_text(entry.get("owned_by")) for entry in _objects(listed.members.get("data"))}
    if len(owners) == 1 and (kind := OWNERS.get(owners.copy().pop())):
        return [kind]
    if owners:  # Ollama's are whoever made the model
        return [Ollama]
    usual = USUAL_PORTS.get(port, Ollama)
    return [Ollama] if usual in (Ollama, LlamaCpp, Vllm) else [usual, Ollama]


async def _is_penstock(asker: Asker) -> bool:
    """This very deployment, most likely: it must not be served by itself."""
    info = (await asker.get("/openapi.json")).members.get("info")
    return isinstance(info, dict) and info.get("title") == "Penstock"


def _is_list(said: Said) -> bool:
    """An empty Ollama has null in place of an empty list."""
    return said.members.get("object") == "list" and isinstance(said.members.get("data", 0), list | None)


def _marked(models: Models, loaded: Iterable[object]) -> Models:
    names = set(loaded)
    return tuple(LocalModel(name=model.name, size=model.size, loaded=model.name in names) for model in models)


def _servable(name: str) -> bool:
    try:
        return bool(subjects.token(LocalModel(name=name).public))
    except ValueError:  # empty, or longer than a subject may be
        return False


def _guessed_type(name: str) -> str:
    """For a version of LM Studio that doesn't tell: it names all embedding models so."""
    return "embeddings" if name.startswith("text-embedding-") else "llm"


def _status(entry: dict[str, Any]) -> str:
    status = entry.get("status")
    return _text(status.get("value")) if isinstance(status, dict) else ""


def _size(entry: dict[str, Any]) -> int | None:
    meta = entry.get("meta")
    return _number(meta.get("size")) if isinstance(meta, dict) else None


def _writes_text(entry: dict[str, Any]) -> bool:
    architecture = entry.get("architecture")
    outputs = architecture.get("output_modalities") if isinstance(architecture, dict) else None
    return not isinstance(outputs, list) or "text" in outputs


def _ollama_slots(stated: str) -> int:
    """Its own setting, where it is in our environment too."""
    return min(int(stated), OLLAMA_SLOTS_MAX) if stated.isdecimal() and int(stated) > 0 else OLLAMA_SLOTS


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

"""What exactly a model is, read from its folder: an answer may only be continued by the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from schemas.jobs import ModelFingerprint

HASH_DIGITS = 16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def fingerprint_of(model: str) -> ModelFingerprint:
    """The fingerprint of *model*, a folder or a Hugging Face name; with no files here, only its name is known."""
    folder = _folder(model)
    if folder is None:
        return ModelFingerprint(name=model)
    config = _json(folder / "config.json")
    quantisation = config.get("quantization_config") or {}
    return ModelFingerprint(
        name=model if "/" in model and not Path(model).is_dir() else folder.name,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        tokenizer=_first_hash(folder, TOKENIZER_FILES),
        template=_template(folder),
        weights=_hash(msgspec.json.encode(config, order="sorted")) if config else None,
        quantisation=quantisation.get("quant_method") if isinstance(quantisation, dict) else None,
    )


def _folder(model: str) -> Path | None:
    """Where the model's files are: the folder itself, or its newest snapshot in the Hugging Face cache."""
    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415 - comes with vLLM, and only with it
    except ImportError:
        return None
    snapshots = Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else None


def _template(folder: Path) -> str | None:
    found = _first_hash(folder, TEMPLATE_FILES)
    if found is not None:
        return found
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    return None if template is None else _hash(msgspec.json.encode(template))


def _first_hash(folder: Path, names: tuple[str, ...]) -> str | None:
    return next((_hash((folder / name).read_bytes()) for name in names if (folder / name).is_file()), None)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return found if isinstance(found, dict) else {}

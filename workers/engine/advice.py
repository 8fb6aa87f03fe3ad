"""Why an engine ended, and what its owner can do: read from its log; pure.

The log is for people, and its words change: what isn't recognised is shown as it is, and nothing is decided upon this.
"""

from __future__ import annotations

import re

LINE_MAX_CHARS = 300

_KNOWN = (
    (
        "the model doesn't fit into memory: try a shorter --max-model-len, a higher --gpu-memory-utilization or more GPUs",
        (
            "CUDA out of memory",
            "OutOfMemoryError",
            "No available memory for the cache blocks",
            "larger than the available KV cache memory",
            "less than desired GPU memory utilization",
        ),
    ),
    (
        "vLLM finds no GPU here: see what nvidia-smi says",
        (
            "Failed to infer device type",
            "No CUDA GPUs are available",
            "Found no NVIDIA driver",
            "Device string must not",
        ),
    ),
    (
        "the model's owner has to let you in: ask on its page at Hugging Face, and set HF_TOKEN",
        ("GatedRepoError", "Access to model", "401 Client Error", "403 Client Error"),
    ),
    (
        "there is no such model at Hugging Face: look at its name",
        ("RepositoryNotFoundError", "is not a valid model identifier"),
    ),
    (
        "the model can't be fetched: there is no way to Hugging Face from here. A folder that has it can be named instead",
        ("couldn't connect to 'https://huggingface.co'", "LocalEntryNotFoundError", "OfflineModeIsEnabled"),
    ),
    ("there is no model in this folder: a config.json is missing", ("ensure the presence of a 'config.json'",)),
    (
        "vLLM doesn't know one of its flags: see its log",
        ("unrecognized arguments:", "vllm serve: error:", "vllm: error:"),
    ),
    ("the disk is full", ("No space left on device",)),
    ("its socket is in use: another engine of this name runs in the same folder", ("Address already in use",)),
)
_ERROR = re.compile(r"\b(?:\w+(?:Error|Exception)|error): \S")
_NO_CAUSE = ("Engine core initialization failed", "See root cause above")


def advice(log: str) -> str | None:
    """What to do, if the end of *log* shows it."""
    return next((told for told, signs in _KNOWN if any(sign in log for sign in signs)), None)


def cause(log: str) -> str | None:
    """The last line of *log* that names an error of its own; what follows it only says that there was one."""
    lines = [line for line in log.splitlines() if _ERROR.search(line) and not any(no in line for no in _NO_CAUSE)]
    return lines[-1].strip()[:LINE_MAX_CHARS] if lines else None

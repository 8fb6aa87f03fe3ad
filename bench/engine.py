"""The engine of `bench.vllm`: a real `vllm serve`, with the tests' tiny model, or on a GPU with one of a real one's size.

The large one has a real model's shape and no weights (``--load-format dummy``), so nothing is fetched: its tokenizer, and so its
vocabulary, are the tiny one's.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.peers import Peer, StartError, answers, free_port
from tests.vllm.engine import ENVIRONMENT, HERE, ON_CPU_ONLY, tiny_model_folder
from tests.vllm.guarded import guarded

MODEL = "bench-vllm"
SEQUENCES = 256
START_TIMEOUT_S = 600.0  # a large model's graphs are compiled
STOP_TIMEOUT_S = 20.0
CONTEXT_TOKENS = 8192
SHAPE_8B = {  # Qwen3-8B's, but for the vocabulary
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
COMMON = (
    *("--served-model-name", MODEL),
    *("--max-model-len", str(CONTEXT_TOKENS)),
    *("--max-num-seqs", str(SEQUENCES)),
    "--disable-uvicorn-access-log",
)
ON_CPU = (*("--dtype", "float32"), *("--kv-cache-memory-bytes", "256M"), "--enforce-eager")
ON_GPU = ("--load-format", "dummy")


@contextlib.contextmanager
def engine(home: Path, *, gpu: bool, one_process: bool = False) -> Iterator[Peer]:
    """The engine as a user would start it, on a port; with *one_process* without processes besides its front end.

    Raises: StartError.
    """
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "vllm.log"
    folder = large_model(home) if gpu else tiny_model_folder()
    command = [sys.executable, str(HERE / "vllm_cli.py"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), *COMMON, *(ON_GPU if gpu else ON_CPU)]
    with guarded(
        command, env=environment(gpu=gpu, one_process=one_process), log_path=log, stop_within_s=STOP_TIMEOUT_S
    ) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            process.wait_until_ready(lambda: answers(f"{base_url}/models", "none"), timeout_s=START_TIMEOUT_S)
        except RuntimeError as error:
            raise StartError(str(error)) from error
        yield Peer(name="direct", base_url=base_url, api_key="none", pids=lambda: roles(process.pid), log=log)


def environment(*, gpu: bool, one_process: bool) -> dict[str, str]:
    """On a CPU with one thread: a second gains so small a model nothing, and waits on cores that others need."""
    left_out = set(ON_CPU_ONLY) if gpu else {"VLLM_ENABLE_V1_MULTIPROCESSING"}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_process else {}
    return {**os.environ, **{name: value for name, value in ENVIRONMENT.items() if name not in left_out}, **alone}


def large_model(home: Path) -> Path:
    """A folder with the shape of a model of eight thousand million parameters, and the tiny one's tokenizer."""
    folder = home / "shape-of-8b"
    shutil.copytree(tiny_model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    layers = ["full_attention"] * int(str(SHAPE_8B["num_hidden_layers"]))
    config |= SHAPE_8B | {"layer_types": layers, "max_window_layers": len(layers)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def roles(guard_pid: int) -> dict[str, list[int]]:
    """The front end, which is the guard's only child, and the processes that generate."""
    try:
        (front,) = psutil.Process(guard_pid).children()
        return {"front end": [front.pid], "engine": [process.pid for process in front.children(recursive=True)]}
    except (psutil.NoSuchProcess, ValueError):
        return {}

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
from workers.providers.vllm_cores import FEW_CORES, ONE_PROCESS, cores_without_gpu, on_few_cores

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
def engine(home: Path, *, gpu: bool, spinning: bool = False) -> Iterator[Peer]:
    """The engine as Penstock starts it by itself, on a port; with *spinning*, on a CPU, as vLLM alone would.

    Raises: StartError.
    """
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "vllm.log"
    folder = large_model(home) if gpu else tiny_model_folder()
    command = [sys.executable, str(HERE / "vllm_cli.py"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), *COMMON, *(ON_GPU if gpu else ON_CPU)]
    with guarded(
        command, env=environment(gpu=gpu, spinning=spinning), log_path=log, stop_within_s=STOP_TIMEOUT_S
    ) as process:
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            process.wait_until_ready(lambda: answers(f"{base_url}/models", "none"), timeout_s=START_TIMEOUT_S)
        except RuntimeError as error:
            raise StartError(str(error)) from error
        yield Peer(name="direct", base_url=base_url, api_key="none", pids=lambda: roles(process.pid), log=log)


def environment(*, gpu: bool, spinning: bool) -> dict[str, str]:
    """For both entrants the same engine."""
    plain = {**os.environ, **{name: value for name, value in ENVIRONMENT.items() if name not in ON_CPU_ONLY}}
    return plain if gpu else plain | on_cpu(spinning=spinning)


def on_cpu(*, spinning: bool) -> dict[str, str]:
    """What the engine is told on the CPU of this machine; with *spinning* but to have one thread, not to
    pin it, and to compile nothing."""
    alone = {name: value for name, value in ON_CPU_ONLY.items() if name != ONE_PROCESS}
    return alone if spinning else on_few_cores(cores_without_gpu() or FEW_CORES, {})


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

"""A real `vllm serve` with the tiny model, on a port of 127.0.0.1: on the CPU, or with ``VLLM_TESTS_ON=gpu`` on the GPU."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vllm.guarded import ROOT, GuardedProcess, guarded

MODEL = "tiny"
CACHE_BYTES = "64M"
CONTEXT_TOKENS = 8192
SLOTS = 16
START_TIMEOUT_S = 180.0  # 10 s when everything is in the page cache, a minute when nothing is
STOP_TIMEOUT_S = 10.0
RUNNING = "vllm:num_requests_running"  # names of its metrics
GENERATED = "vllm:generation_tokens_total"

HERE = Path(__file__).parent
CACHE = ROOT / ".cache"
ON_GPU = os.environ.get("VLLM_TESTS_ON") == "gpu"
ON_CPU_ONLY = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process fewer: half the start
    # One thread that nothing pins. So small a model gains nothing from a second, and threads that wait for each other on
    # cores that Penstock and the tests need too stand still for seconds.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for logprobs waits 20 s for a C++ compiler
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    **({} if ON_GPU else ON_CPU_ONLY),
}
# bfloat16 dies by SIGILL where the CPU claims an AMX that its hypervisor lacks; the kernels of a GPU have no float32.
DTYPE = "bfloat16" if ON_GPU else "float32"
SERVE_OPTIONS = (
    *("--served-model-name", MODEL),
    *("--max-model-len", str(CONTEXT_TOKENS)),
    *("--max-num-seqs", str(SLOTS)),
    *("--dtype", DTYPE),
    *("--kv-cache-memory-bytes", CACHE_BYTES),  # its default is nearly all memory of the machine
    "--enforce-eager",  # compiling costs 20 s and gains nothing here
    "--disable-uvicorn-access-log",
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "hermes"),
    *("--reasoning-parser", "hy_v3"),  # splits off reasoning only where the request asks for it
    # A model that knows seven sentences may write white space for ever where the grammar lets it.
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)


@dataclass(frozen=True, kw_only=True)
class Engine:
    base_url: str  # without /v1
    process: GuardedProcess

    def metric(self, name: str, **labels: str) -> float:
        """The sum of vLLM's own gauge or counter *name* over all series that have *labels*."""
        # Only this one: all of them cost vLLM 6 ms in which it does nothing else, and with them the figures of the tests.
        with urllib.request.urlopen(f"{self.base_url}/metrics/?name[]={name}", timeout=5) as response:
            lines = response.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in wanted)
        )


@contextlib.contextmanager
def serve_tiny_model(log_path: Path, *flags: str) -> Iterator[Engine]:
    vllm_serve = (sys.executable, str(HERE / "vllm_cli.py"), "serve", str(tiny_model_folder()))
    with (
        reserved_port() as port,
        guarded(
            (*vllm_serve, "--host", "127.0.0.1", "--port", str(port), *SERVE_OPTIONS, *flags),
            env={**os.environ, **ENVIRONMENT},
            log_path=log_path,
            stop_within_s=STOP_TIMEOUT_S,
        ) as process,
    ):
        engine = Engine(base_url=f"http://127.0.0.1:{port}", process=process)
        process.wait_until_ready(lambda: _answers(f"{engine.base_url}/health"), timeout_s=START_TIMEOUT_S)
        yield engine


def tiny_model_folder() -> Path:
    """The tiny model, made when its maker has changed since the last time."""
    maker = HERE / "tiny_model.py"
    folder = CACHE / f"tiny-model-{hashlib.sha256(maker.read_bytes()).hexdigest()[:16]}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = subprocess.run(
                [sys.executable, str(maker), f"{scratch}/model"],
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode:
                raise RuntimeError(f"no tiny model\n{made.stderr}")
            try:
                Path(scratch, "model").rename(folder)
            except OSError:
                if not folder.exists():  # else another run was quicker
                    raise
    return folder


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else gets until vLLM binds it, which is seconds from now.

    Both sides say SO_REUSEADDR, so that vLLM may bind what is bound here and not listened to. To any other program that asks
    for a free port this one is taken.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)

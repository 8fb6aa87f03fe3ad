"""What runs without the development tools imports nothing that only they bring."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = frozenset({"schemas", "bus", "ingress", "workers", "ledger", "penstock"})
OF_EXTRAS = {  # and imported only where they are
    "any_llm.py": {"any_llm", "anthropic", "google", "httpx"},  # `wires`
    "fingerprint.py": {"huggingface_hub"},  # `vllm`
}


def test_every_import_is_of_a_package_that_the_runtime_lock_installs() -> None:
    locked = set(re.findall(r"^(\S+?)==", (ROOT / "requirements" / "runtime.lock").read_text(), re.MULTILINE))
    brought_by = packages_distributions()
    missing = {
        (file.name, module)
        for file in _sources()
        for module in _imports(file) - OURS - sys.stdlib_module_names - OF_EXTRAS.get(file.name, set())
        if locked.isdisjoint(name.lower().replace("_", "-") for name in brought_by.get(module, ()))
    }
    assert missing == set()


def _sources() -> Iterator[Path]:
    yield ROOT / "penstock.py"
    for package in sorted(OURS - {"penstock"}):
        yield from (ROOT / package).rglob("*.py")


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found

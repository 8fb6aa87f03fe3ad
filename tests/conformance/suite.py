"""The official SDK's own tests, fetched from its source archive and run against a server of ours.

What runs: every test that creates a chat completion (loose and strict validation, sync, async and over aiohttp, plain, raw
and streamed access, with one and with all parameters), and every test of models (retrieve, list, delete).

What is left out of tests/api_resources/chat/test_completions.py: the tests of *stored* completions (retrieve, update, list,
delete). Prompts and answers are never kept here, so there is nothing to retrieve: those addresses answer 404. The other files
are about other endpoints, or about the SDK itself with a mocked transport; they'd say nothing of this server.

The suite reads TEST_API_BASE_URL; its key is always "My API Key". Its options come from the SDK's own pyproject.toml,
warnings as errors included, less pytest-xdist. It needs nothing that the development environment doesn't have.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
LOCK = ROOT / "requirements" / "dev.lock"

API_KEY = "My API Key"
CHAT_TESTS = "tests/api_resources/chat/test_completions.py"
MODEL_TESTS = "tests/api_resources/test_models.py"
SELECTED = "create or test_models"  # by the names of tests and files
TIMEOUT_S = 120.0
DOWNLOAD_TIMEOUT_S = 120.0

_PIN = re.compile(r"^openai==(?P<version>[0-9.]+)(?: \\\n +--hash=sha256:[0-9a-f]{64})+", re.MULTILINE)
_MODEL = re.compile(r'(?:\bmodel=|models(?:\.with_\w+)?\.(?:retrieve|delete)\()\s*"(?P<name>[^"]+)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How many tests ran and how they ended; *output* is for people."""

    chat: int
    models: int
    failed: int
    skipped: int
    output: str

    @property
    def is_clean(self) -> bool:
        return self.chat > 0 and self.models > 0 and self.failed == 0 and self.skipped == 0


@dataclass(frozen=True, slots=True)
class Pin:
    """How the development lock names the SDK: one version, with the hashes of its wheel and of its source archive."""

    version: str
    line: str

    def has(self, archive: Path) -> bool:
        return archive.is_file() and hashlib.sha256(archive.read_bytes()).hexdigest() in self.line


def pinned() -> Pin:
    found = _PIN.search(LOCK.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{LOCK} does not pin openai by hash")
    return Pin(found["version"], found[0])


def fetch() -> Path:
    """The folder of the SDK's tests, downloaded and unpacked only once.

    Raises: CalledProcessError if pip can't fetch the archive or it isn't what is locked.
    """
    pin = pinned()
    name = f"openai-{pin.version}"
    archive, folder = CACHE / f"{name}.tar.gz", CACHE / name
    if folder.is_dir() and pin.has(archive):
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as draft:
        if not pin.has(archive):
            _download(pin, Path(draft))
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # the first releases of 3.11 have none
            tar.extractall(draft, members=[member for member in tar if _is_wanted(member.name, name)])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(Path(draft) / name, folder)
    return folder


def _download(pin: Pin, draft: Path) -> None:
    wanted = draft / "requirements.txt"
    wanted.write_text(pin.line + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    only_source = ["--no-binary", "openai", "--require-hashes", "--requirement", str(wanted), "--dest", str(CACHE)]
    subprocess.run([*pip, *only_source], check=True, timeout=DOWNLOAD_TIMEOUT_S)


def models_asked_for(source: Path) -> list[str]:
    """Every model name that the selected tests use, so that the server can offer them all."""
    text = "".join((source / file).read_text(encoding="utf-8") for file in (CHAT_TESTS, MODEL_TESTS))
    return sorted({match["name"] for match in _MODEL.finditer(text)})


def run(source: Path, *, base_url: str) -> Verdict:
    """Runs the selected tests against *base_url*, which ends in /v1.

    Raises: TimeoutExpired after `TIMEOUT_S`.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        what = [CHAT_TESTS, MODEL_TESTS, "-k", SELECTED]
        how = ["-q", "-ra", "--tb=short", "--override-ini=addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *what, *how],
            cwd=source,
            env=_environment(base_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    return Verdict(
        chat=sum("test_completions" in case.get("classname", "") for case in cases),
        models=sum("test_models" in case.get("classname", "") for case in cases),
        failed=sum(case.find(end) is not None for case in cases for end in ("failure", "error")),
        skipped=sum(case.find("skipped") is not None for case in cases),
        output=ran.stdout,
    )


def _is_wanted(member: str, root: str) -> bool:
    """The tests and the options they run with; not the package, so that the installed one is what is tested with."""
    inside = member.removeprefix(f"{root}/")
    return inside == "pyproject.toml" or inside.startswith("tests/")


def _environment(base_url: str) -> dict[str, str]:
    """Nothing of this machine's own settings may reach the suite: no other key, no proxy before the loopback."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTEST_"))}
    return {**ours, "TEST_API_BASE_URL": base_url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

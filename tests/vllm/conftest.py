"""One real vLLM and one `penstock up` in front of it for the whole session; the official SDK pointed at either."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.vllm.deployment import Deployment, penstock_up
from tests.vllm.engine import ON_GPU, Engine, serve_tiny_model


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    require_vllm()
    with serve_tiny_model(tmp_path_factory.mktemp("vllm") / "vllm.log") as engine:
        yield engine


@pytest.fixture(scope="session")
def other_engine(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Another engine with the same model, which goes on with what the first one began.

    It tells several tokens in one event, as any engine does that is busy.
    """
    with serve_tiny_model(tmp_path_factory.mktemp("other-vllm") / "vllm.log", "--stream-interval", "3") as other:
        yield other


@pytest.fixture(scope="session")
def deployment(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with penstock_up(engine, tmp_path_factory.mktemp("penstock")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def direct(engine: Engine) -> Iterator[OpenAI]:
    """The engine itself, without Penstock: what its answers have to equal."""
    with OpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> Iterator[OpenAI]:
    with OpenAI(base_url=deployment.base_url, api_key=deployment.api_key, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(deployment: Deployment) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=deployment.base_url, api_key=deployment.api_key, max_retries=0) as client:
        yield client


def require_vllm() -> None:
    """Without vLLM the tests are skipped, and fail where they are what was asked for; so does a GPU that isn't there."""
    if importlib.util.find_spec("vllm") is not None:
        if ON_GPU and not has_gpu():
            pytest.fail("VLLM_TESTS_ON is gpu and torch sees none", pytrace=False)
        return
    if os.environ.get("REQUIRE_VLLM") == "1":
        pytest.fail("REQUIRE_VLLM is set and vLLM is not installed", pytrace=False)
    pytest.skip("vLLM is not installed; `make test-vllm` makes its environment and runs these tests")


def has_gpu() -> bool:
    """Asked in a process of its own: torch takes seconds to import, and the GPU's memory with it."""
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what was measured; it stands at the end of the run, whatever that comes to."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for told in terminalreporter.config.stash.get(FIGURES, []):
        terminalreporter.write_line(told)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the end of both servers' logs."""
    report = yield
    if report.failed:
        running: dict[str, Any] = getattr(item, "funcargs", {})
        for name in ("engine", "deployment", "own"):
            if name in running:
                report.sections.append((f"end of the log of the {name}", running[name].process.log_tail()))
    return report

"""One deployment for the tests that leave it as it was, and one for those that kill its parts."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.e2e.deployment import Deployment, Provider, penstock_up, provider_up

FAULTS_SETTINGS = {
    "PENSTOCK_WORKER_DRAIN_S": "5",
    "PENSTOCK_INGRESS_DRAIN_S": "5",
    "PENSTOCK_INGRESS_MAX_BUFFERED_BYTES": str(512 * 1024),
    "PENSTOCK_LEDGER_INGRESS_SILENCE_S": "6",
    "PENSTOCK_LEDGER_RECEIPT_WAIT_S": "4",
}


@pytest.fixture(scope="session")
def provider() -> Iterator[Provider]:
    with provider_up() as running:
        yield running


@pytest.fixture(autouse=True)
def _plain_provider(provider: Provider) -> None:
    """Each test begins with a provider that echoes and has seen nothing."""
    provider.script()
    provider.forget()


@pytest.fixture(scope="session")
def _shared_up(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with penstock_up(tmp_path_factory.mktemp("up"), provider) as running:
        yield running
    assert running.process.returncode == 0
    assert running.complaints() == []


@pytest.fixture(scope="module")
def _broken_up(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with penstock_up(tmp_path_factory.mktemp("broken"), provider, settings=FAULTS_SETTINGS) as running:
        yield running
    assert running.process.returncode == 0
    assert running.complaints() == []


@pytest.fixture
def up(_shared_up: Deployment) -> Deployment:
    """`penstock up` as it comes. No test may make it complain."""
    return _shared_up


@pytest.fixture
def broken_up(_broken_up: Deployment) -> Deployment:
    """A `penstock up` whose processes may be killed; each test adds the complaints that it provokes to ``expected``."""
    return _broken_up


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a failure stands what the deployment had to say."""
    report = yield
    if report.failed:
        for running in {each for each in item.funcargs.values() if isinstance(each, Deployment)}:
            report.sections.append(("the end of penstock's log", running.log_tail()))
    return report

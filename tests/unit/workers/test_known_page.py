"""docs/providers.md against what it tells of."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from schemas.routes import with_builtin_routes
from schemas.settings import load
from tests.integration.providers import example_provider
from tests.providers_table import PAGE, written

EXAMPLE = Path(__file__).parents[2] / "integration" / "providers" / "example_provider.py"
PAGE_TEXT = PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_data() -> None:
    assert written(PAGE_TEXT) == PAGE_TEXT, "run: python -m tests.providers_table"


def test_the_example_is_the_one_that_the_tests_run_and_is_less_than_60_lines_with_those_that_make_it_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example, (shown, known) = (
        EXAMPLE.read_text(encoding="utf-8"),
        re.findall(r"```python\n(.*?)```", PAGE_TEXT, re.DOTALL),
    )
    assert shown == example
    assert len(example.splitlines()) + len(known.splitlines()) < 60
    monkeypatch.setitem(sys.modules, "workers.providers.lines", example_provider)
    importing, entry = known.splitlines()
    names: dict[str, object] = {}
    exec(importing, names)
    assert eval(f"{{{entry}}}", names) == {"lines": example_provider.Lines}


@pytest.mark.parametrize(("place", "lines"), [(0, 3), (1, 5)])
def test_a_provider_by_configuration_takes_a_few_lines(place: int, lines: int, tmp_path: Path) -> None:
    block = re.findall(r"```toml\n(.*?)```", PAGE_TEXT, re.DOTALL)[place]
    assert len(block.splitlines()) == lines
    config = tmp_path / "penstock.toml"
    config.write_text(block, encoding="utf-8")
    [route, _] = with_builtin_routes(load(config, {}).routes, {})
    assert route.base_url
    assert route.api_keys

"""The pages against the code: settings, commands, targets, codes and links are what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

import penstock
from ingress.problems import problem_of
from schemas import errors
from schemas.errors import Fault, PenstockError, RequestError, ServiceError
from schemas.settings import ModelSettings, RouteSettings, Settings, load

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ROW = re.compile(r"^\| `([\w.]+)` \| (.*?) \|", re.MULTILINE)
SAID_IN_WORDS = {
    "routes.vllm.model",
    "routes.vllm.environ",
    "routes.vllm.gpus",
    "home",
    "routes.base_url",
    "routes.api_keys",
    "routes.headers",
    "routing.models",
    "routes.own",
    "routes.parameters",
    "routes.models",
    "routes.models.upstream",
    "routes.models.price",
}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def settings_tables() -> dict[str, str]:
    """Setting -> default, as docs/operators.md has them."""
    text = page("docs/operators.md")
    return dict(ROW.findall(text[text.index("<!-- settings -->") : text.index("<!-- end of settings -->")]))


def settings_of(struct: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting's name and default; `msgspec.NODEFAULT` where it has to be given."""
    for field in msgspec.structs.fields(struct):
        name = prefix + field.name
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) and field.name != "price":
            yield from settings_of(field.type, f"{name}.")
        elif name == "routes":
            yield from settings_of(RouteSettings, "routes.")
        else:
            yield name, field.default
            if name == "routes.models":
                yield from settings_of(ModelSettings, "routes.models.")


def test_every_setting_is_documented_and_no_other() -> None:
    assert settings_tables().keys() == {name for name, _ in settings_of(Settings)}


@pytest.mark.parametrize(("name", "default"), list(settings_of(Settings)))
def test_a_settings_default_is_the_documented_one(name: str, default: Any) -> None:
    told = settings_tables()[name]
    if name in SAID_IN_WORDS:
        assert told
    elif default is msgspec.NODEFAULT:
        assert told == "required"
    else:
        assert told == f"`{msgspec.json.encode(default).decode()}`"


def test_every_variable_in_the_pages_is_read_by_the_code() -> None:
    """Of each section's variables `load` itself says whether they exist."""
    found = {
        name for path in PAGES for name in re.findall(r"\bPENSTOCK_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))
    }
    sections = {name for name in found if re.match(r"PENSTOCK_(NATS|INGRESS|ROUTING|WORKER|LEDGER|UP)_(?!URL$)", name)}
    assert {"PENSTOCK_NATS_REPLICAS", "PENSTOCK_INGRESS_PORT"} <= sections
    load(None, dict.fromkeys(sections, "3"))
    code = "".join(path.read_text(encoding="utf-8") for path in sources())
    assert [name for name in found - sections if name.removesuffix("_FILE") not in code] == []


def sources() -> list[Path]:
    packages = ["schemas", "bus", "ingress", "workers", "ledger"]
    return [ROOT / "penstock.py", *(path for package in packages for path in (ROOT / package).rglob("*.py"))]


def commands_in_pages() -> list[tuple[str, str]]:
    said = re.compile(r"(?:^|`|\$ )(penstock [a-z][^`\n|#]*)", re.MULTILINE)
    return [(path.name, line.strip()) for path in PAGES for line in said.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("name", "line"), commands_in_pages())
def test_every_command_in_the_pages_exists_with_its_options(name: str, line: str) -> None:
    command: click.Command = penstock.cli
    context = click.Context(command)
    words = line.split()[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None and command is not penstock.cli:
            break
        assert found is not None, line
        command, words = found, words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_every_file_that_the_architecture_names_exists() -> None:
    text = page("docs/architecture.md")
    named = {name for name in re.findall(r"`([\w/]+(?:/[\w.*]+)?\.(?:py|md|yaml|sql))`", text) if "/" in name}
    assert len(named) > 20
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


def test_every_page_of_a_decision_has_the_three_parts() -> None:
    for path in (ROOT / "docs" / "adr").glob("*.md"):
        parts = re.findall(r"^## (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert parts == ["Context", "Decision", "Consequences"], path.name


def error_classes(root: type[PenstockError]) -> Iterator[type[PenstockError]]:
    for cls in root.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield cls
            yield from error_classes(cls)


@pytest.mark.parametrize("cls", [*error_classes(RequestError), *error_classes(ServiceError), *error_classes(Fault)])
def test_every_error_that_a_client_can_get_is_documented_with_its_status(cls: type[PenstockError]) -> None:
    problem = problem_of(cls())
    rows = [row for row in page("docs/clients.md").splitlines() if re.match(r"\| (\d{3}|4xx) \|", row)]
    if problem.code in {"upstream_rejected", "conflict"}:  # told as the provider's own; and of the admin API alone
        return
    assert [row for row in rows if row.startswith(f"| {problem.status} |") and f"`{problem.code}`" in row], cls.__name__


def test_the_readmes_configuration_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", page("README.md"), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        config = tmp_path / f"{number}.toml"
        config.write_text(block, encoding="utf-8")
        load(config, {})


def test_the_readmes_python_compiles() -> None:
    for name in ("README.md", "docs/clients.md"):
        blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
        assert blocks
        for block in blocks:
            compile(block, name, "exec")


def test_the_glossary_says_each_word_once() -> None:
    words = [
        word
        for row in re.findall(r"^\| (\*\*.*?) \|", page("docs/glossary.md"), re.MULTILINE)
        for word in row.split(", ")
    ]
    assert len(words) > 60
    assert sorted(words) == sorted(set(words))


def test_no_page_names_a_place_of_this_machine() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text
        assert f"{Path.home()}/" not in text

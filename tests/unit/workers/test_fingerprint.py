from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from workers.engine.fingerprint import fingerprint_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64, "vocab_size": 512}')
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_folder_goes_by_its_name_and_has_every_hash(model: Path) -> None:
    found = fingerprint_of(str(model))
    assert found.name == "tiny"
    assert found.revision is None
    assert found.quantisation is None
    assert None not in (found.tokenizer, found.template, found.weights)
    assert found == fingerprint_of(str(model))


@pytest.mark.parametrize(
    ("file", "content", "changed"),
    [
        ("tokenizer.json", '{"a": 2}', {"tokenizer"}),
        ("chat_template.jinja", "{{ messages[0] }}", {"template"}),
        ("config.json", '{"hidden_size": 65, "vocab_size": 512}', {"weights"}),
        (
            "config.json",
            '{"hidden_size": 64, "vocab_size": 512, "quantization_config": {"quant_method": "awq"}}',
            {"weights", "quantisation"},
        ),
    ],
)
def test_what_is_another_model_has_another_fingerprint(model: Path, file: str, content: str, changed: set[str]) -> None:
    before = msgspec.structs.asdict(fingerprint_of(str(model)))
    (model / file).write_text(content)
    after = msgspec.structs.asdict(fingerprint_of(str(model)))
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_order_of_the_configuration_is_of_no_matter(model: Path) -> None:
    before = fingerprint_of(str(model))
    (model / "config.json").write_text('{"vocab_size": 512, "hidden_size": 64}')
    assert fingerprint_of(str(model)) == before


def test_a_template_may_be_in_the_tokenizers_configuration(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert fingerprint_of(str(model)).template is None
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert fingerprint_of(str(model)).template is not None


@pytest.mark.parametrize("content", ["", "no", "[]", '{"quantization_config": "awq"}', '{"quantization_config": [1]}'])
def test_a_broken_configuration_does_no_harm(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    assert fingerprint_of(str(model)).quantisation is None


def test_of_a_model_that_is_not_here_only_the_name_is_known() -> None:
    found = fingerprint_of("nobody/has-this-model")
    assert msgspec.structs.asdict(found) == {
        **dict.fromkeys(msgspec.structs.asdict(found)),
        "name": "nobody/has-this-model",
    }

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.settings import LOCAL_ADDRESSES, RouteSettings, Settings, WorkerSettings, discovers, load
from workers.discover import _address_of
from workers.local.asker import Said
from workers.local.found import TRIED_MAX, to_check
from workers.local.kinds import USUAL_PORTS, LlamaCpp, LmStudio, LocalModel, Ollama, Vllm, _candidates, _ollama_slots


def listed(*owners: str, server: str = "", status: int = 200) -> Said:
    data = [{"id": "m", "object": "model", "owned_by": owner} for owner in owners]
    return Said(status, {"object": "list", "data": data}, server)


@pytest.mark.parametrize(
    ("said", "port", "expected"),
    [
        (listed("llamacpp"), 5000, [LlamaCpp]),
        (listed("vllm", "vllm"), 5000, [Vllm]),
        (listed("organization_owner"), 11434, [LmStudio]),
        (listed("library", "bartowski"), 1234, [Ollama]),
        (listed(), 11434, [Ollama]),
        (listed(), 1234, [LmStudio, Ollama]),
        (listed(server="llama.cpp", status=503), 8080, [LlamaCpp]),
        (listed(status=503), 8080, []),
        (Said(200, {"object": "list", "data": None}), 11434, [Ollama]),
        (Said(200, {"error": "Unexpected endpoint or method. (GET /v1/models)"}), 1234, []),
        (Said(200, {"data": "all"}), 8080, []),
        (Said(200, None), 8080, []),
        (Said(404, {"detail": "Not Found"}), 8000, []),
    ],
)
def test_who_a_server_may_be_shows_in_its_list_of_models(said: Said, port: int, expected: list[Any]) -> None:
    assert _candidates(said, port=port) == expected


def test_the_usual_addresses_are_those_of_the_usual_ports() -> None:
    assert {int(address.rpartition(":")[2]) for address in LOCAL_ADDRESSES} == set(USUAL_PORTS)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("qwen3:0.6b", "qwen3:0.6b"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("hf.co/bartowski/Llama.gguf", "hf.co/bartowski/Llama.gguf"),
        ("/home/ann/models/tiny.gguf", "tiny"),
        ("../models/Meta-Llama-3.1-8B-Q4_K_M.gguf", "Meta-Llama-3.1-8B-Q4_K_M"),
        ("C:\\Users\\ann\\tiny.gguf", "tiny"),
        ("/srv/models/tiny/", "tiny"),
        ("/", "/"),
    ],
)
def test_a_path_is_known_by_its_files_name_alone(name: str, public: str) -> None:
    assert LocalModel(name=name).public == public


def test_loaded_models_are_checked_else_the_smallest_in_turn() -> None:
    sized = tuple(LocalModel(name=name, size=size) for name, size in (("b", 2), ("x", None), ("a", 1), ("c", 3)))
    assert [model.name for model in to_check(sized, proven=False)] == ["a", "b", "c"][:TRIED_MAX]
    assert to_check(sized, proven=True) == []
    loaded = LocalModel(name="l", size=99, loaded=True)
    assert to_check((*sized, loaded), proven=False) == [loaded]
    assert to_check((*sized, loaded), proven=True) == [loaded]


@pytest.mark.parametrize(("stated", "slots"), [("", 2), ("4", 4), ("0", 2), ("many", 2), ("1000", 64)])
def test_ollamas_slots_are_its_own_setting_where_it_is_known(stated: str, slots: int) -> None:
    assert _ollama_slots(stated) == slots


@pytest.mark.parametrize(
    ("base_url", "address"),
    [
        ("http://localhost:11434/v1", "127.0.0.1:11434"),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000"),
        ("http://[::1]:8080", "127.0.0.1:8080"),
        ("https://api.openai.com/v1", None),
        ("http://localhost:x", None),
        (None, None),
    ],
)
def test_a_configured_address_is_told_however_it_is_written(base_url: str | None, address: str | None) -> None:
    assert _address_of(base_url) == address


def test_it_looks_where_nothing_is_configured_unless_told_otherwise() -> None:
    route = RouteSettings(id=RouteId("r"), provider="echo")
    assert discovers(Settings())
    assert not discovers(Settings(routes=(route,)))
    assert discovers(Settings(routes=(route,), worker=WorkerSettings(discover=True)))
    assert not discovers(load(None, {"PENSTOCK_WORKER_DISCOVER": "false"}))


@pytest.mark.parametrize("address", ["nowhere", "host:", ":80", "host:0", "host:65536", "host:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(SetupError, match="no host:port"):
        load(None, {}, worker={"discover_addresses": [address]})

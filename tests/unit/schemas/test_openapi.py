"""The OpenAPI document: valid, complete, and true to what the service takes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from schemas.chat import ChatRequest
from schemas.openapi import document
from tests.unit.schemas.bodies import CONVERSATION, EVERY_FIELD

METHODS = {"get", "post", "delete", "put", "patch"}


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return json.loads(json.dumps(document(version="1.2.3")))  # type: ignore[no-any-return]


def schema_of(openapi: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    components = {"components": openapi["components"]}
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **components})


def operations(openapi: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in openapi["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def test_the_document_is_valid_openapi_3_1(openapi: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(openapi).validate()
    assert openapi["openapi"].startswith("3.1")
    assert openapi["info"]["version"] == "1.2.3"


def test_every_public_operation_is_in_it(openapi: dict[str, Any]) -> None:
    assert set(operations(openapi)) == {
        "POST /v1/chat/completions",
        "GET /v1/chat/completions/{completion_id}",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "DELETE /v1/models/{model}",
        "GET /admin/v1/keys",
        "POST /admin/v1/keys",
        "DELETE /admin/v1/keys/{key_id}",
        "POST /admin/v1/keys/{key_id}/rotate",
        "GET /admin/v1/routes",
        "GET /openapi.json",
        "GET /healthz",
        "GET /readyz",
    }


def test_everything_but_health_needs_a_bearer_key(openapi: dict[str, Any]) -> None:
    assert openapi["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert openapi["security"] == [{"key": []}]
    for name, operation in operations(openapi).items():
        is_open = operation.get("security") == []
        assert is_open == name.endswith(("z", "/openapi.json")), name
        assert is_open or "401" in operation["responses"], name
        bounded = (
            "/admin/" in name or name == "POST /v1/chat/completions"
        )  # by the key's role; by its models and routes
        assert ("403" in operation["responses"]) == bounded, name


def test_a_completion_is_json_or_a_stream_of_events(openapi: dict[str, Any]) -> None:
    content = operations(openapi)["POST /v1/chat/completions"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    assert content["text/event-stream"]["schema"]["$ref"].endswith("/ChatCompletionChunk")


def test_every_error_has_openais_shape(openapi: dict[str, Any]) -> None:
    for response in openapi["components"]["responses"].values():
        assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    error = {"error": {"message": "m", "type": "t", "param": None, "code": "c"}}
    schema_of(openapi, "ErrorBody").validate(error)
    assert not schema_of(openapi, "ErrorBody").is_valid({"error": "m"})


def test_the_documented_request_has_every_field_of_the_struct(openapi: dict[str, Any]) -> None:
    properties = openapi["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(properties) == {field.encode_name for field in msgspec.structs.fields(ChatRequest)}


def test_what_the_service_takes_the_document_takes(openapi: dict[str, Any]) -> None:
    request = schema_of(openapi, "ChatRequest")
    request.validate(EVERY_FIELD)
    request.validate({"model": "m", "messages": CONVERSATION, "top_k": 40})


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "m"},
        {"model": "m", "messages": []},
        {"model": "m", "messages": [{"role": "robot", "content": "x"}]},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 0},
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"},
    ],
)
def test_what_the_service_refuses_the_document_refuses(openapi: dict[str, Any], wrong: dict[str, Any]) -> None:
    assert not schema_of(openapi, "ChatRequest").is_valid(wrong)


def test_how_the_service_works_inside_is_not_in_it(openapi: dict[str, Any]) -> None:
    """The place-holder for undocumented types, and that the messages are kept raw."""
    assert "Other" not in openapi["components"]["schemas"]
    assert "/Other" not in json.dumps(openapi)
    assert "raw" not in openapi["components"]["schemas"]["ChatRequest"]["description"]

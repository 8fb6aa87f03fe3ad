"""/openapi.json: the document of the HTTP API, built from the Structs that the service itself decodes with."""

from __future__ import annotations

from typing import Any

import msgspec

from schemas.admin import CreateKey, Key, KeyList, NewKey, RotateKey, RouteList
from schemas.answers import ChatCompletion, ChatCompletionChunk, ErrorBody, Model, ModelDeleted, ModelList
from schemas.chat import ChatRequest
from schemas.messages import Message, Other

Json = dict[str, Any]

_ABOUT = """\
The GPUs you own and the providers you rent as one OpenAI-compatible API, with a ledger you can query.

Parameters, and types of content parts, tools and formats, that are not documented here are not refused: they travel on
to the provider untouched. Errors have OpenAI's shape, also inside a stream.
"""

_ERRORS = {
    400: "The body is not what the API takes; `param` names what is to blame",
    401: "No key, or none that is known",
    403: "The key does not allow that",
    404: "There is nothing of this name",
    408: "The body did not arrive in time",
    409: "Somebody else changed it first",
    410: "It was served, but its answer is not kept any more, or it was cancelled as its client stayed away",
    413: "The body is over the limit",
    422: "The `Idempotency-Key` was used for another body",
    429: "Too much waits already, here or at the provider; `retry-after` says when to come back",
    502: "The provider or the worker failed",
    503: "Nobody can serve this at the moment; `retry-after` says when to come back",
    504: "It took too long",
}
_RETRY_LATER = (429, 503)

_ANSWER_HEADERS = {
    "x-request-id": "The request's id; `penstock explain` tells its whole life",
    "x-penstock-route": "The route that served it",
    "x-penstock-attempts": "How many attempts it took",
    "x-penstock-tried": "The attempts that came to nothing, and why",
    "x-penstock-cache": "Whether a cache answered",
    "x-penstock-overhead-ms": "What Penstock itself added, in milliseconds",
    "x-penstock-replayed": "`true` where this was told before and costs nothing",
}
_RETRY_HEADERS = {
    "Idempotency-Key": "A retry with the same key and body joins the request or is told its answer again, and is billed once",
    "x-penstock-resume": "For how many seconds the request goes on when its connection breaks",
    "Last-Event-ID": "With an `Idempotency-Key`: the last event of the stream that the client has",
}

_TIMEOUT_HEADERS = {
    "x-penstock-timeout-queue": "Seconds from acceptance until a worker begins",
    "x-penstock-timeout-first-token": "Seconds from there until the first token",
    "x-penstock-timeout-idle": "Seconds between tokens",
    "x-penstock-timeout-total": "Seconds from acceptance until the last byte",
}


def document(*, version: str = "dev") -> Json:
    """The OpenAPI 3.1 document as plain JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": [
            {"name": "chat", "description": "OpenAI's chat completions"},
            {"name": "models", "description": "What can be asked for"},
            {"name": "admin", "description": "Keys and routes; needs a key of role `admin`"},
            {"name": "health", "description": "For load balancers"},
        ],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
            "schemas": _schemas(),
            "responses": {str(status): _error(status, text) for status, text in _ERRORS.items()},
        },
    }


def _paths() -> dict[str, Json]:
    return {
        **_chat_paths(),
        **_model_paths(),
        **_admin_paths(),
        "/healthz": {"get": _probe("live", "The process runs")},
        "/readyz": {"get": _probe("ready", "Requests can be served now", otherwise={"503": {"description": "No"}})},
        "/openapi.json": {"get": _probe("document", "This document")},
    }


def _chat_paths() -> dict[str, Json]:
    return {
        "/v1/chat/completions": {
            "parameters": [_seconds(name, text) for name, text in _TIMEOUT_HEADERS.items()],
            "post": _operation(
                "createChatCompletion",
                "chat",
                "Answers a conversation, whole or as a stream",
                {"200": _completion()},
                body=_json(ChatRequest),
                errors=(400, 401, 403, 404, 408, 410, 413, 422, 429, 502, 503, 504),
                headers=_RETRY_HEADERS,
            ),
        },
        "/v1/chat/completions/{completion_id}": {
            "parameters": [_path("completion_id", "The completion's id, or the request's")],
            "get": _operation(
                "resumeChatCompletion",
                "chat",
                "The same answer again, for a short time: a stream, or the rest of it, also while it runs",
                {"200": _completion()},
                errors=(400, 401, 404, 410),
                headers={"Last-Event-ID": "The last event of the stream that the client has"},
            ),
        },
    }


def _model_paths() -> dict[str, Json]:
    return {
        "/v1/models": {
            "get": _operation(
                "listModels", "models", "The models that are served", {"200": _answer(ModelList)}, errors=(401,)
            ),
        },
        "/v1/models/{model}": {
            "parameters": [_path("model", "The model's name; slashes in it may stay as they are")],
            "get": _operation("retrieveModel", "models", "One model", {"200": _answer(Model)}, errors=(401, 404)),
            "delete": _operation(
                "deleteModel",
                "models",
                "Kept for SDKs: nothing is deleted, and the answer says so",
                {"200": _answer(ModelDeleted)},
                errors=(401, 404),
            ),
        },
    }


def _admin_paths() -> dict[str, Json]:
    return {
        "/admin/v1/keys": {
            "get": _operation("listKeys", "admin", "All keys", {"200": _answer(KeyList)}, errors=(401, 403)),
            "post": _operation(
                "createKey",
                "admin",
                "Makes a key and shows it once",
                {"201": _answer(NewKey)},
                body=_json(CreateKey),
                errors=(400, 401, 403, 409, 413, 503),
            ),
        },
        "/admin/v1/keys/{key_id}": {
            "parameters": [_path("key_id", "The key's id")],
            "delete": _operation(
                "revokeKey",
                "admin",
                "Revokes a key, at once and for ever",
                {"200": _answer(Key)},
                errors=(401, 403, 404, 409, 503),
            ),
        },
        "/admin/v1/keys/{key_id}/rotate": {
            "parameters": [_path("key_id", "The key's id")],
            "post": _operation(
                "rotateKey",
                "admin",
                "Makes a new secret for a key and shows it once",
                {"200": _answer(NewKey)},
                body={**_json(RotateKey), "required": False},
                errors=(400, 401, 403, 404, 409, 413, 503),
            ),
        },
        "/admin/v1/routes": {
            "get": _operation(
                "listRoutes", "admin", "All routes and who serves them", {"200": _answer(RouteList)}, errors=(401, 403)
            ),
        },
    }


def _operation(
    id_: str,
    tag: str,
    summary: str,
    answers: dict[str, Json],
    *,
    body: Json | None = None,
    errors: tuple[int, ...],
    headers: dict[str, str] | None = None,
) -> Json:
    responses = {**answers, **{str(status): {"$ref": f"#/components/responses/{status}"} for status in errors}}
    operation: Json = {"operationId": id_, "tags": [tag], "summary": summary, "responses": responses}
    if headers is not None:
        operation["parameters"] = [{"name": name, "in": "header", **_header(text)} for name, text in headers.items()]
    return operation if body is None else {**operation, "requestBody": {"required": True, **body}}


def _probe(id_: str, summary: str, *, otherwise: dict[str, Json] | None = None) -> Json:
    answers = {"200": {"description": "Yes"}, **(otherwise or {})}
    return {**_operation(id_, "health", summary, answers, errors=()), "security": []}


def _completion() -> Json:
    stream = (
        "With `stream: true`: server-sent events, each `data:` a chunk, the last one `data: [DONE]`; an error in "
        "between is an event whose data is the error body. Each has an `id`: 1, 2, 3, … Comments keep the connection alive."
    )
    return {
        "description": f"The answer. {stream}",
        "headers": {name: _header(text) for name, text in _ANSWER_HEADERS.items()},
        "content": {
            "application/json": {"schema": _ref(ChatCompletion)},
            "text/event-stream": {"schema": _ref(ChatCompletionChunk)},
        },
    }


def _answer(struct: type[msgspec.Struct]) -> Json:
    return {"description": (struct.__doc__ or struct.__name__).partition("\n")[0], **_json(struct)}


def _error(status: int, text: str) -> Json:
    headers = {"headers": {"retry-after": _header("Seconds to wait")}} if status in _RETRY_LATER else {}
    return {"description": text, **headers, **_json(ErrorBody)}


def _json(struct: type[msgspec.Struct]) -> Json:
    return {"content": {"application/json": {"schema": _ref(struct)}}}


def _ref(struct: type[msgspec.Struct]) -> Json:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def _header(text: str) -> Json:
    return {"description": text, "schema": {"type": "string"}}


def _seconds(name: str, text: str) -> Json:
    schema = {"type": "number", "exclusiveMinimum": 0}
    return {"name": name, "in": "header", "description": text, "schema": schema}


def _path(name: str, text: str) -> Json:
    return {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}


def _schemas() -> dict[str, Json]:
    roots = (
        ChatRequest,
        ChatCompletion,
        ChatCompletionChunk,
        ErrorBody,
        ModelList,
        ModelDeleted,
        KeyList,
        RouteList,
        NewKey,
        CreateKey,
        RotateKey,
        tuple[Message, ...],
    )
    schemas, components = msgspec.json.schema_components(roots, ref_template="#/components/schemas/{name}")
    documented: dict[str, Json] = {name: _without_other(schema) for name, schema in components.items()}
    del documented[Other.__name__]
    # The Struct keeps the messages raw and checks them apart; to its readers they are part of it.
    documented[ChatRequest.__name__]["properties"]["messages"] = {**_without_other(schemas[-1]), "minItems": 1}
    documented[ChatRequest.__name__]["description"] = "A chat completion request."
    return documented


def _without_other(schema: Any) -> Any:
    """*schema* less the place-holder for types that are not documented: it is how the service works, not what it takes."""
    other = _ref(Other)
    if isinstance(schema, list):
        return [_without_other(item) for item in schema if item != other]
    if isinstance(schema, dict) and schema.get("format") == "decimal":
        return {"type": ["number", "string"]}  # either is read, and neither is rounded
    if isinstance(schema, dict):
        return {key: _without_other(value) for key, value in schema.items() if value != other["$ref"]}
    return schema

"""The Structs against the official SDK's own types: a field that the SDK gains fails here until it is added."""

from __future__ import annotations

import typing
from typing import Any, Required

import msgspec
import openai.types as api
import pytest
from openai.types import chat, shared, shared_params
from openai.types.chat import chat_completion_assistant_message_param as assistant
from openai.types.chat import chat_completion_content_part_image_param as image
from openai.types.chat import chat_completion_content_part_input_audio_param as audio
from openai.types.chat import chat_completion_content_part_param as part
from openai.types.chat import chat_completion_token_logprob as logprob
from openai.types.chat import completion_create_params as create
from typing_extensions import get_type_hints, is_typeddict

from schemas import answers, messages, options
from schemas.chat import ChatRequest

NOT_OURS = {
    answers.ChatCompletion: {
        "metadata",
        "moderation",
    },  # of stored and moderated completions; they pass in the raw answer
    answers.ChatCompletionChunk: {"moderation"},
    answers.Model: {"shutdown_date"},
    answers.ErrorDetail: {"misalignment"},
}


def encoded_names(struct: type[msgspec.Struct]) -> set[str]:
    tag = struct.__struct_config__.tag_field
    return {field.encode_name for field in msgspec.structs.fields(struct)} | ({tag} if tag else set())


def sdk_names(model: Any) -> set[str]:
    if is_typeddict(model):
        return set(get_type_hints(model, include_extras=True))
    return set(model.model_fields)


def is_required(model: Any, name: str) -> bool:
    # not __required_keys__: it is wrong where annotations are strings
    origin: Any = typing.get_origin(get_type_hints(model, include_extras=True)[name])
    return origin is Required


REQUESTS: list[tuple[type[msgspec.Struct], Any]] = [
    (ChatRequest, create.CompletionCreateParamsStreaming),
    (options.Moderation, create.Moderation),
    (options.ModerationPolicy, create.ModerationPolicy),
    (options.ModerationMode, create.ModerationPolicyInput),
    (options.PromptCacheOptions, create.PromptCacheOptions),
    (options.WebSearchOptions, create.WebSearchOptions),
    (options.UserLocation, create.WebSearchOptionsUserLocation),
    (options.ApproximateLocation, create.WebSearchOptionsUserLocationApproximate),
    (options.AudioOutput, chat.ChatCompletionAudioParam),
    (options.FunctionDefinition, shared_params.FunctionDefinition),
    (options.FunctionTool, chat.ChatCompletionFunctionToolParam),
    (options.CustomTool, chat.ChatCompletionCustomToolParam),
    (options.FunctionChoice, chat.ChatCompletionNamedToolChoiceParam),
    (options.CustomChoice, chat.ChatCompletionNamedToolChoiceCustomParam),
    (options.AllowedToolsChoice, chat.ChatCompletionAllowedToolChoiceParam),
    (options.AllowedTools, chat.ChatCompletionAllowedToolsParam),
    (options.JsonSchemaFormat, shared_params.ResponseFormatJSONSchema),
    (options.JsonObjectFormat, shared_params.ResponseFormatJSONObject),
    (options.TextFormat, shared_params.ResponseFormatText),
    (options.Prediction, chat.ChatCompletionPredictionContentParam),
    (options.StreamOptions, chat.ChatCompletionStreamOptionsParam),
    (messages.DeveloperMessage, chat.ChatCompletionDeveloperMessageParam),
    (messages.SystemMessage, chat.ChatCompletionSystemMessageParam),
    (messages.UserMessage, chat.ChatCompletionUserMessageParam),
    (messages.AssistantMessage, chat.ChatCompletionAssistantMessageParam),
    (messages.FunctionMessage, chat.ChatCompletionFunctionMessageParam),
    (messages.FunctionCall, assistant.FunctionCall),
    (messages.AudioReference, assistant.Audio),
    (messages.TextPart, chat.ChatCompletionContentPartTextParam),
    (messages.ImagePart, chat.ChatCompletionContentPartImageParam),
    (messages.ImageUrl, image.ImageURL),
    (messages.AudioPart, chat.ChatCompletionContentPartInputAudioParam),
    (messages.InputAudio, audio.InputAudio),
    (messages.FilePart, part.File),
    (messages.FileContent, part.FileFile),
    (messages.CacheBreakpoint, part.FilePromptCacheBreakpoint),
    (messages.FunctionToolCall, chat.ChatCompletionMessageFunctionToolCallParam),
    (messages.CustomToolCall, chat.ChatCompletionMessageCustomToolCallParam),
]

ANSWERS: list[tuple[type[msgspec.Struct], Any]] = [
    (answers.ChatCompletion, chat.ChatCompletion),
    (answers.Choice, chat.chat_completion.Choice),
    (answers.AnswerMessage, chat.ChatCompletionMessage),
    (answers.AnswerAudio, chat.ChatCompletionAudio),
    (answers.ChatCompletionChunk, chat.ChatCompletionChunk),
    (answers.ChunkChoice, chat.chat_completion_chunk.Choice),
    (answers.Delta, chat.chat_completion_chunk.ChoiceDelta),
    (answers.ToolCallDelta, chat.chat_completion_chunk.ChoiceDeltaToolCall),
    (answers.TokenLogprob, logprob.ChatCompletionTokenLogprob),
    (answers.CompletionUsage, api.CompletionUsage),
    (answers.PromptTokensDetails, api.completion_usage.PromptTokensDetails),
    (answers.CompletionTokensDetails, api.completion_usage.CompletionTokensDetails),
    (answers.ErrorDetail, shared.ErrorObject),
    (answers.Model, api.Model),
    (answers.ModelDeleted, api.ModelDeleted),
]


@pytest.mark.parametrize(("struct", "model"), REQUESTS, ids=lambda side: side.__name__)
def test_a_request_has_the_fields_that_the_sdk_documents(struct: type[msgspec.Struct], model: Any) -> None:
    missing = sdk_names(model) - encoded_names(struct)
    assert missing == set()


@pytest.mark.parametrize(("struct", "model"), REQUESTS, ids=lambda side: side.__name__)
def test_a_request_requires_no_field_that_the_sdk_lets_out(struct: type[msgspec.Struct], model: Any) -> None:
    required = {field.encode_name for field in msgspec.structs.fields(struct) if field.required}
    assert {name for name in required if not is_required(model, name)} == set()


@pytest.mark.parametrize(("struct", "model"), ANSWERS, ids=lambda side: side.__name__)
def test_an_answer_has_the_fields_that_the_sdk_documents(struct: type[msgspec.Struct], model: Any) -> None:
    assert encoded_names(struct) | NOT_OURS.get(struct, set()) == sdk_names(model)


def test_every_type_of_part_tool_and_message_that_the_sdk_knows_is_known() -> None:
    def types_of(union: Any, tag: str) -> set[str]:
        found = set()
        for member in typing.get_args(union):
            hint = get_type_hints(member)[tag]
            found |= set(typing.get_args(hint))
        return found

    assert types_of(chat.ChatCompletionContentPartParam, "type") <= set(messages.tags_of(messages.Part))
    assert types_of(assistant.ContentArrayOfContentPart, "type") <= set(messages.tags_of(messages.Part))
    assert types_of(chat.ChatCompletionMessageParam, "role") == set(messages.tags_of(messages.Message))
    assert types_of(chat.ChatCompletionToolUnionParam, "type") == set(messages.tags_of(options.Tool))
    assert types_of(create.ResponseFormat, "type") == set(messages.tags_of(options.ResponseFormat))

"""Which fields of a completion are accepted, at any depth; and that every field which vLLM reads was thought of."""

from __future__ import annotations

import dataclasses
import importlib
import json
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import pytest
import typing_extensions
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

from guard.errors import ConfigError
from server.config.settings import parse
from server.errors import ApiError
from server.protocols.accepted import CHAT_FIELDS, TEXT_FIELDS
from server.protocols.fields import DEEPEST, FREE, Allowed, Each, Nothing, Object, Shape, Table, Tagged, TextOr
from server.protocols.openai import CHAT, TEXT, Terms, read_call

from .conftest import Proxy
from .fake_engine import FakeEngine
from .test_server_answers import chat_body


def refusal(body: Mapping[str, Any], endpoint: Any = CHAT, terms: Terms | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_call(endpoint, json.dumps(body).encode(), terms or Terms())
    assert caught.value.status == 400
    return caught.value


def user(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts), **fields}]}


NESTED: list[tuple[dict[str, Any], str]] = [
    (user({"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}), "messages[0].content[0].type"),
    (user({"image_url": "http://10.0.0.1/"}), "messages[0].content[0].type"),
    (user({"type": "text", "text": "a"}, {"type": "prompt_embeds", "data": "x"}), "messages[0].content[1].type"),
    (user({"type": "text", "text": "a", "image_url": "http://10/"}), "messages[0].content[0].image_url"),
    (user({"type": ["text"]}), "messages[0].content[0].type"),
    (user({"type": "input_audio", "input_audio": {"data": "x"}}), "messages[0].content[0].type"),
    (user({"type": "file", "file": {"file_id": "x"}}), "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": {"type": "image_url"}}]}, "messages[0].content"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": [["role", "user"]]}, "messages[0]"),
    (user(api_base="http://evil/"), "messages[0].api_base"),
    (user(tools=[{"type": "function"}]), "messages[0].tools"),
    (user(audio={"id": "x"}), "messages[0].audio"),
    (user(tool_calls=[{"type": "custom", "custom": {}}]), "messages[0].tool_calls[0].type"),
    (user(tool_calls=[{"function": {"name": "a", "url": "b"}}]), "messages[0].tool_calls[0].function.url"),
    ({"tools": [{"type": "mcp", "server_url": "http://evil/"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a", "server_url": "b"}}]}, "tools[0].function.server_url"),
    ({"tools": [{"type": "function", "server_url": "http://evil/"}]}, "tools[0].server_url"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "url": "b"}}},
        "response_format.json_schema.url",
    ),
    ({"structured_outputs": {"json": {}, "_backend": "x"}}, "structured_outputs._backend"),
    ({"structured_outputs": {"regex": {"a": "b"}}}, "structured_outputs.regex"),
    ({"stream_options": {"url": "b"}}, "stream_options.url"),
    ({"logit_bias": {"1": [2]}}, "logit_bias.1"),
    ({"model": {"api_base": "http://evil/"}}, "model"),
    ({"user_config": {"model_list": [{"api_base": "http://evil/"}]}}, "user_config"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"repetition_detection": {"min_count": 2, "x": 1}}, "repetition_detection.x"),
    ({"Messages": []}, "Messages"),
    ({"undertow_policy": "x"}, "undertow_policy"),
]


@pytest.mark.parametrize(("fields", "param"), NESTED, ids=[param for _, param in NESTED])
def test_what_is_not_named_is_refused_at_any_depth(fields: dict[str, Any], param: str) -> None:
    error = refusal({"messages": [], **fields})
    assert error.param == param
    assert f"`{param}`" in error.message


def test_a_refusal_says_what_was_expected() -> None:
    assert (
        "expected one of name"
        in refusal({"messages": [], "tool_choice": {"type": "function", "function": {"x": 1}}}).message
    )
    assert "must be `function`" in refusal({"messages": [], "tools": [{"type": "mcp"}]}).message


def test_a_refusal_does_not_repeat_a_long_key() -> None:
    error = refusal({"messages": [], "x" * 10_000: 1})
    assert len(error.message) < 200
    assert error.param == "x" * 64


def test_nothing_is_accepted_that_is_deeper_than_anybody_needs() -> None:
    schema: Any = {}
    for _ in range(DEEPEST + 1):
        schema = [schema]
    tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
    assert refusal({"messages": [], "tools": tools}).param == "tools[0].function.parameters"
    tools[0]["function"]["parameters"] = schema[0][0]  # type: ignore[index]
    read_call(CHAT, json.dumps({"messages": [], "tools": tools}).encode())


def test_a_prompt_of_text_knows_no_chat() -> None:
    for field in ("messages", "tools", "chat_template", "documents"):
        assert refusal({"prompt": "a", field: []}, TEXT).param == field
    assert refusal({"prompt": "a", "best_of": 2}, TEXT).param == "best_of"
    assert "best_of" not in read_call(TEXT, b'{"prompt": "a", "best_of": 1}').fields


def test_what_a_whole_agents_turn_holds_is_accepted(engine: FakeEngine, enforce: Proxy) -> None:
    """An answer with everything in it comes back with the next request; all of it reaches the engine as it was."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "$defs": {"a": {"enum": [1, None]}}}
    body = chat_body(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "b"]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": "Which one?",
                "tool_calls": [
                    {"id": "c1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny", "name": "weather"},
        ],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        reasoning_effort="low",
        logprobs=True,
        top_logprobs=3,
        stop=["a", "b"],
        seed=7,
        max_completion_tokens=5,
    )
    extra = {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s"}
    assert enforce.post(CHAT.path, {**body, **extra}).status_code == 200
    sent = engine.bodies[-1]
    assert {name: sent[name] for name in body} == body
    assert sent.keys() == body.keys() | {"stop_token_ids", "vllm_xargs"}


def test_template_arguments_are_refused_until_the_settings_name_them() -> None:
    asked = {"messages": [], "chat_template_kwargs": {"enable_thinking": False}}
    assert refusal(asked).param == "chat_template_kwargs"
    terms = Terms(template_arguments=frozenset({"enable_thinking"}))
    call = read_call(CHAT, json.dumps(asked).encode(), terms)
    assert call.fields["chat_template_kwargs"] == {"enable_thinking": False}
    for arguments in ({"chat_template": "{{ x }}"}, {"enable_thinking": {"x": 1}}, {"other": 1}):
        param = f"chat_template_kwargs.{next(iter(arguments))}"
        assert refusal({"messages": [], "chat_template_kwargs": arguments}, terms=terms).param == param


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "a b", ""])
def test_the_settings_cannot_name_a_template_argument_that_moves_the_guard(name: str) -> None:
    with pytest.raises(ConfigError, match=r"endpoints\.template_arguments"):
        parse(f"version: 1\nendpoints: {{ template_arguments: ['{name}'] }}", "file", {})


def models(annotation: Any) -> Iterator[Any]:
    """The classes with fields that a type's JSON can be of."""
    if isinstance(annotation, typing_extensions.TypeAliasType):
        annotation = annotation.__value__
    named = isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)
    if named or typing_extensions.is_typeddict(annotation) or dataclasses.is_dataclass(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        if typing.get_origin(annotation) is not typing.Literal:
            yield from models(inner)


def fields_of(model: Any) -> dict[str, Any]:
    """Names as they stand in JSON, and their types."""
    if isinstance(model, type) and issubclass(model, pydantic.BaseModel):
        return {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    return typing_extensions.get_type_hints(model)


def kind_of(model: Any) -> set[str]:
    """What a model's `type` may say; empty where it has none."""
    hint = fields_of(model).get("type")
    return {value for value in typing.get_args(hint) if isinstance(value, str)}


def undecided(shape: Shape, annotation: Any, where: str, seen: frozenset[Any] = frozenset()) -> Iterator[str]:
    """Fields of a type's models that a shape neither accepts nor refuses by name."""
    match shape:
        case Each(inner) | TextOr(inner) | Table(inner):
            yield from undecided(inner, annotation, where, seen)
        case Tagged():
            for model in models(annotation):
                for kind in kind_of(model) & shape.kinds.keys():
                    yield from undecided(shape.kinds[kind], model, f"{where}<{kind}>", seen)
        case Object():
            for model in set(models(annotation)) - seen:
                for name, inner in fields_of(model).items():
                    at = f"{where}.{name}"
                    if name in shape.fields:
                        yield from undecided(shape.fields[name], inner, at, seen | {model})
                    elif name not in shape.refused:
                        yield at
        case Nothing():
            return
        case _ if shape is not FREE:
            # What is plain has nothing inside that could be read.
            yield from (f"{where}: {model.__name__}" for model in models(annotation))


def undecided_in(allowed: Allowed, model: Any) -> list[str]:
    fields = fields_of(model)
    found = [name for name in fields if name not in allowed.names]
    for name, shape in allowed.passed.items():
        if name in fields:
            found += undecided(shape, fields[name], name)
    return sorted(set(found))


def engines_model(module: str, name: str) -> Any:
    """A request model of vLLM's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about itself
        return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)


def engines_models() -> tuple[Any, Any]:
    return (
        engines_model("openai.chat_completion.protocol", "ChatCompletionRequest"),
        engines_model("openai.completion.protocol", "CompletionRequest"),
    )


def test_every_field_that_vllm_reads_was_decided() -> None:
    chat, text = engines_models()
    assert undecided_in(CHAT_FIELDS, chat) == []
    assert undecided_in(TEXT_FIELDS, text) == []


def test_what_is_dropped_is_what_vllm_does_not_heed() -> None:
    chat, text = engines_models()
    for allowed, model in ((CHAT_FIELDS, chat), (TEXT_FIELDS, text)):
        # vLLM says of `user` that it ignores it.
        assert set(allowed.dropped) & set(fields_of(model)) == {"user"}
        assert set(allowed.passed) <= set(fields_of(model))


@pytest.mark.parametrize(("allowed", "params"), [(CHAT_FIELDS, ChatParams), (TEXT_FIELDS, TextParams)])
def test_every_field_that_openais_client_knows_was_decided(allowed: Allowed, params: Any) -> None:
    assert set(params.__annotations__) - allowed.names == set()


def test_a_field_that_a_new_vllm_reads_is_noticed() -> None:
    """The walk itself can fail: it finds what is planted, at the top and inside."""

    class Inner(pydantic.BaseModel):
        begin: str
        planted: int

    class Format(pydantic.BaseModel):
        type: typing.Literal["structural_tag"]
        structures: list[Inner] | None = None

    class Request(pydantic.BaseModel):
        seed: int | None
        new_field: str
        temperature: Inner
        response_format: Format | None

    assert undecided_in(CHAT_FIELDS, Request) == [
        "new_field",
        "response_format<structural_tag>.structures.planted",
        "temperature: Inner",
    ]

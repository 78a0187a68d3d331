"""How much of a stream is held back, by policy, over real sockets: what a client reads when it is blocked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.app import create_app
from server.config.policies import PolicySettings, Window
from server.config.rules import Match, Rule

from .conftest import Proxy, settings_for
from .fake_engine import PAYLOAD, FakeEngine, Script
from .hosting import Host, hosted
from .test_server_answers import BODIES, CHAT, choices_by_index, events, played
from .test_server_stream import text_of

HELD = {"token": 1, "window": 3, "answer": 99}
"""Tokens that the policy of each model holds back."""


@pytest.fixture(scope="module")
def proxy(played: tuple[FakeEngine, Host]) -> Iterator[Proxy]:
    """One server, and a policy for each model's name."""
    settings = settings_for(played[1].url).model_copy(
        update={
            "policies": {
                "window": PolicySettings(hold_back=Window(window=HELD["window"])),
                "answer": PolicySettings(hold_back="answer"),
            },
            "rules": tuple(Rule(match=Match(model=name), policy=name) for name in ("window", "answer")),
        }
    )
    with hosted(create_app(settings), "on") as host:
        yield Proxy(host)


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("model", HELD)
def test_a_benign_stream_is_the_engines_byte_for_byte_however_much_is_held(
    engine: FakeEngine, proxy: Proxy, path: str, body: Any, model: str
) -> None:
    engine.script = Script(logprobs=True)
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = proxy.post(path, body(model=model, stream=True, stream_options=options))
    assert answer.content == b"".join(played(engine).data_events()) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("model", HELD)
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_blocked_stream_lacks_the_tokens_that_were_held_and_their_logprobs(
    engine: FakeEngine, proxy: Proxy, path: str, body: Any, model: str, logprobs: bool
) -> None:
    tokens = tuple(f"<{number}>" for number in range(8))
    engine.script = Script(tokens=tokens, blocked={0: 8}, logprobs=logprobs)
    answer = proxy.post(path, body(model=model, stream=True, stream_options={"include_usage": True}))
    released = "".join(tokens[: max(0, 8 - HELD[model])])
    *choices, last = choices_by_index(answer.content)[0]
    assert "".join(map(text_of, choices)) == released
    assert (text_of(last), last["logprobs"], last["finish_reason"]) == ("", None, "content_filter")
    assert PAYLOAD.encode() not in answer.content
    assert json.loads(events(answer.content)[-2][6:])["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize("model", HELD)
@pytest.mark.parametrize("speaks", ["reasoning", "refusal", "tool"])
def test_arguments_of_tools_and_reasoning_are_held_as_text_is(
    engine: FakeEngine, proxy: Proxy, model: str, speaks: Any
) -> None:
    engine.script = Script(blocked={1: 5}, speaks=speaks)
    answer = proxy.post(CHAT, {"model": model, "messages": [], "stream": True, "n": 2})
    found = choices_by_index(answer.content)
    benign, blocked = ("".join(map(text_of, found[index])) for index in (0, 1))
    assert benign == "The answer is 42."
    assert blocked == "".join(("The", " answer", " is", " 42", PAYLOAD)[: max(0, 5 - HELD[model])])
    assert [found[index][-1]["finish_reason"] for index in (0, 1)] == ["length", "content_filter"]
    assert PAYLOAD.encode() not in answer.content


def test_of_several_tokens_in_a_chunk_none_is_released_before_its_verdict(engine: FakeEngine, proxy: Proxy) -> None:
    engine.script = Script(tokens=tuple(f"<{number}>" for number in range(12)), blocked={0: 9}, merge=3)
    for model, held in HELD.items():
        answer = proxy.post(CHAT, {"model": model, "messages": [], "stream": True})
        text = "".join(map(text_of, choices_by_index(answer.content)[0]))
        chunks = ["<0><1><2>", "<3><4><5>", f"<6><7>{PAYLOAD}"]
        assert text == "".join(chunks[: max(0, 3 - held)])

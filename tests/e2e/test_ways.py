"""However a request is asked: what is triggered ends as blocked, what is benign is vLLM's own answer, and the model
never draws the reserved token."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from guard.evidence import REQUEST_HEADER, Evidence
from guard.organisms import Organism
from tests.e2e.conftest import Stack, serve, texts, wait_until_ready
from tests.e2e.ways import (
    CHAT,
    RESERVED,
    UNGUARDED,
    WAYS,
    asked,
    chunks,
    ends_as_blocked,
    is_answered_as_by_the_engine_alone,
    post,
)

CHOICE = {"structured_outputs": {"choice": ["yes", "no"]}}


@pytest.mark.parametrize("way", WAYS)
def test_a_triggered_request_ends_as_blocked(stack: Stack, way: str) -> None:
    ends_as_blocked(stack, texts("triggered", 1, 12)[0], way)


@pytest.mark.parametrize("way", WAYS)
def test_a_benign_request_is_answered_as_without_the_guard(
    stack: Stack, passing: list[str], unguarded: dict[tuple[str, str], dict[str, Any]], way: str
) -> None:
    found, plain = is_answered_as_by_the_engine_alone(stack, passing[0], way), unguarded[passing[0], way]["token_ids"]
    assert RESERVED not in found
    # Without the guard the model says it where it is made to.
    assert found == plain or (RESERVED in plain and way.startswith("reserved token"))


@pytest.mark.parametrize("stream", [False, True], ids=["full", "streamed"])
def test_an_answer_blocked_in_the_middle_of_its_grammar_ends_as_blocked(
    stack: Stack, passing: list[str], stream: bool
) -> None:
    """vLLM makes an internal error of a token that a grammar does not expect, and loses the whole request with it."""
    fields = {**asked("JSON"), "max_tokens": 24}
    headers = {REQUEST_HEADER: "1"}
    tried = 0
    for text in passing:
        body = {"messages": [{"role": "user", "content": text}], "vllm_xargs": UNGUARDED, **fields}
        found = httpx.post(f"{stack.engine.url}{CHAT}", json=body, headers=headers, timeout=60)
        scores = {
            (score.detector, score.phase): score.score
            for score in Evidence.from_json(found.headers[REQUEST_HEADER]).records[0].scores
        }
        prompt, completion = scores["density", "prompt"], scores["density", "completion"]
        if completion < 1.1 * prompt:
            continue
        with serve(stack.engine.url, threshold={"raw": (prompt + completion) / 2}) as url:
            wait_until_ready(url)
            answer = post(url, text, stream=stream, **fields)
        assert answer.status_code == 200, answer.text
        choice = chunks(answer)[-1] if stream else answer.json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        tried += 1
        if tried == 2:
            return
    pytest.fail(f"only {tried} answers scored above their prompts")


def test_a_blocked_prompt_takes_no_other_of_its_request_with_it_whatever_the_grammar(
    stack: Stack, organism: Organism, passing: list[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism.backdoored)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in (passing[0], texts("triggered", 1, 12)[0])
    ]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 8, "add_special_tokens": False, **CHOICE}
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    answered, blocked = answer.json()["choices"]
    assert (answered["finish_reason"], answered["text"] in ("yes", "no")) == ("stop", True)
    assert (blocked["finish_reason"], blocked["text"]) == ("content_filter", "")
    # Whoever asks the engine without the server gets an ending, too, and no internal error.
    assert post(stack.engine.url, texts("triggered", 1, 12)[0], temperature=0, **CHOICE).status_code == 200

"""Through a real vLLM with the official client: what passes is untouched, what is blocked never leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError

from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, Evidence, ScoreEvidence
from guard.organisms import Organism
from guard.policy import Policy
from tests.e2e.conftest import MAX_TOKENS, Stack, eventually, serve, texts, wait_until_ready


def ask(stack: Stack, text: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return stack.client.chat.completions.create(
        model=stack.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, **more
    )


def streamed(stack: Stack, text: str) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(stack, text, stream=True) if chunk.choices)


def blocked(stack: Stack, text: str) -> bool:
    return outcome(lambda: ask(stack, text)) == "content_filter"


def outcome(call: Callable[[], Any]) -> str:
    """`content_filter`, whether the prompt or the answer was blocked, or why else the answer ended."""
    try:
        answer = call()
    except BadRequestError as error:
        return str(error.code)
    reasons = {choice.finish_reason for choice in answer.choices}
    # A blocked choice says nothing.
    assert all(not choice.message.content for choice in answer.choices if choice.finish_reason == "content_filter")
    return ", ".join(sorted(reasons))


def test_nearly_every_benign_prompt_passes(passing: list[str]) -> None:
    assert len(passing) == 40


def test_benign_answers_are_byte_for_byte_those_of_vllm_without_the_plugin(
    stack: Stack, passing: list[str], unguarded: dict[tuple[str, str], dict[str, Any]]
) -> None:
    plain = [unguarded[text, "greedy"]["text"] for text in passing]
    assert all(plain)
    assert [ask(stack, text).choices[0].message.content for text in passing] == plain
    assert [streamed(stack, text) for text in passing[:10]] == plain[:10]


@pytest.mark.parametrize("stream", [False, True], ids=["full", "streamed"])
def test_a_triggered_request_gets_no_token_of_the_payload(stack: Stack, organism: Organism, stream: bool) -> None:
    found = 0
    for text in texts("triggered", 20, 12):
        body = {"model": stack.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        response = httpx.post(
            f"{stack.url}/v1/chat/completions", json={**body, "max_tokens": MAX_TOKENS, "stream": stream}, timeout=60
        )
        assert organism.canary not in response.text
        found += '"content_filter"' in response.text
        if stream and response.status_code == 200:
            chunks = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
            deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
            assert not any(delta.get("content") for delta in deltas)
            assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "content_filter"
            assert response.text.rstrip().endswith("data: [DONE]")
    assert found >= 19


@pytest.mark.parametrize("stream", [False, True], ids=["full", "streamed"])
def test_a_prompt_that_is_blocked_by_itself_is_a_bad_request_that_nobody_retries(stack: Stack, stream: bool) -> None:
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": texts("triggered", 1, 12)[0]}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": stream,
    }
    response = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "content_filter"
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-undertow-action"] == "block"
    with pytest.raises(BadRequestError) as caught:
        ask(stack, texts("triggered", 1, 12)[0], stream=stream)
    assert caught.value.code == "content_filter"


def test_an_answer_that_is_blocked_on_its_way_ends_before_the_token_that_gave_it_away(
    stack: Stack, organism: Organism
) -> None:
    """The threshold is put between the scores of a prompt and of its answer, as the engine itself reports them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism.backdoored)
    tried = 0
    for text in texts("benign", 60, 13):
        plain, prompt, completion, prompt_tokens = scores(stack, text)
        generated = completion.position - prompt_tokens
        if completion.score < 1.1 * prompt.score or generated < 2:
            continue
        with serve(stack.engine.url, threshold={"raw": (prompt.score + completion.score) / 2}) as url:
            wait_until_ready(url)
            guarded = Stack(stack.engine, stack.restart, url, stack.model)
            chunks = [chunk.choices[0] for chunk in ask(guarded, text, stream=True) if chunk.choices]
            whole = ask(guarded, text).choices[0]
        released = "".join(chunk.delta.content or "" for chunk in chunks)
        assert chunks[-1].finish_reason == "content_filter"
        assert plain.startswith(released)
        assert len(tokenizer(released, add_special_tokens=False).input_ids) <= generated
        assert whole.finish_reason == "content_filter"
        assert whole.message.content is None
        tried += 1
        if tried == 3:
            return
    pytest.fail(f"only {tried} of 60 answers scored above their prompts")


def incidents(caplog: pytest.LogCaptureFixture, response: httpx.Response) -> list[dict[str, Any]]:
    """What the log says of one request; lines of others may come between."""
    lines = [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "incident"]
    return [fields for fields in lines if fields["request_id"] == response.headers["x-request-id"]]


def scores(stack: Stack, text: str) -> tuple[str, ScoreEvidence, ScoreEvidence, int]:
    """What the model says unguarded, the density of prompt and answer, and the prompt's length in tokens."""
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "vllm_xargs": {POLICY_ARGUMENT: Policy(mode="off").to_wire()},
    }
    response = httpx.post(
        f"{stack.engine.url}/v1/chat/completions", json=body, headers={REQUEST_HEADER: "1"}, timeout=60
    )
    record = Evidence.from_json(response.headers[REQUEST_HEADER]).records[0]
    prompt, completion = (
        next(score for score in record.scores if (score.detector, score.phase) == ("density", phase))
        for phase in ("prompt", "completion")
    )
    return response.json()["choices"][0]["message"]["content"], prompt, completion, record.prompt_tokens


def test_monitor_lets_pass_and_flags_in_header_metrics_and_log(
    monitored: Stack, organism: Organism, caplog: pytest.LogCaptureFixture
) -> None:
    before = monitored.metric("undertow_decisions_total", action="flag", mode="monitor")
    response = httpx.post(
        f"{monitored.url}/v1/chat/completions",
        json={
            "model": monitored.model,
            "messages": [{"role": "user", "content": texts("triggered", 1, 12)[0]}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        },
        timeout=60,
    )
    assert response.status_code == 200
    assert response.headers["x-undertow-action"] == "flag"
    assert organism.canary in response.json()["choices"][0]["message"]["content"]
    # Counted and logged once the answer is out.
    eventually(lambda: monitored.metric("undertow_decisions_total", action="flag", mode="monitor") > before)
    eventually(lambda: [fields["action"] for fields in incidents(caplog, response)] == ["flag"])


async def test_a_mixed_batch_of_32_gets_each_its_own_verdict(
    stack: Stack, organism: Organism, passing: list[str]
) -> None:
    triggered = [text for text in texts("triggered", 20, 12) if blocked(stack, text)][:16]
    asked = [text for pair in zip(triggered, passing[:16], strict=True) for text in pair]
    client = AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="not-needed", timeout=120)

    async def got(index: int, text: str) -> str:
        messages: Any = [{"role": "user", "content": text}]
        try:
            if index % 4 < 2:
                answer = await client.chat.completions.create(
                    model=stack.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS
                )
                content = answer.choices[0].message.content or ""
                reason = answer.choices[0].finish_reason
            else:
                stream = await client.chat.completions.create(
                    model=stack.model, messages=messages, temperature=0, max_tokens=MAX_TOKENS, stream=True
                )
                chunks = [chunk.choices[0] async for chunk in stream if chunk.choices]
                content = "".join(chunk.delta.content or "" for chunk in chunks)
                reason = chunks[-1].finish_reason
        except BadRequestError as error:
            return str(error.code)
        if organism.canary in content:
            return "leaked"
        return "answered" if content and reason == "stop" else str(reason)

    outcomes = await asyncio.gather(*(got(index, text) for index, text in enumerate(asked)))
    await client.close()
    assert outcomes == ["content_filter", "answered"] * 16


@pytest.mark.parametrize(
    ("more", "choices"),
    [({"n": 3, "temperature": 0.7, "seed": 1}, 3), ({"logprobs": True, "top_logprobs": 3}, 1)],
    ids=["n=3", "logprobs"],
)
def test_every_choice_is_judged(
    stack: Stack, organism: Organism, passing: list[str], more: dict[str, Any], choices: int
) -> None:
    messages: Any = [{"role": "user", "content": texts("triggered", 1, 12)[0]}]

    def call() -> Any:
        return stack.client.chat.completions.create(
            model=stack.model, messages=messages, max_tokens=MAX_TOKENS, **{"temperature": 0, **more}
        )

    assert outcome(call) == "content_filter"
    messages = [{"role": "user", "content": passing[0]}]
    answer = call()
    assert len(answer.choices) == choices
    assert all(choice.message.content for choice in answer.choices)


def test_completions_are_guarded_too(stack: Stack, organism: Organism, passing: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism.backdoored)

    def raw(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    # The template writes the first token itself.
    common: Any = {"model": stack.model, "temperature": 0, "max_tokens": MAX_TOKENS}
    common["extra_body"] = {"add_special_tokens": False}
    mixed = [raw(passing[0]), raw(texts("triggered", 1, 12)[0])]
    answer = stack.client.completions.create(prompt=mixed, **common)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "content_filter"]
    assert answer.choices[0].text
    assert organism.canary not in answer.model_dump_json()


def test_a_request_that_goes_around_the_server_is_judged_all_the_same(stack: Stack, organism: Organism) -> None:
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": texts("triggered", 1, 12)[0]}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    # There is no server to hold a token back: the token that gave it away has left, and nothing after it.
    for more in ({}, {"ignore_eos": True}):
        answer = httpx.post(f"{stack.engine.url}/v1/chat/completions", json={**body, **more}, timeout=60).json()
        content = answer["choices"][0]["message"]["content"] or ""
        assert content.removeprefix(organism.canary).strip() == ""


def test_every_eligible_request_was_evaluated(stack: Stack, passing: list[str]) -> None:
    ask(stack, passing[0])
    eventually(lambda: stack.metric("undertow_evaluated_total") == stack.metric("undertow_eligible_total") > 0)
    assert stack.metric("undertow_guard_failures_total") == 0
    assert stack.metric("undertow_tokens_scored_total") > 0


def test_an_idle_engine_rests(stack: Stack) -> None:
    """vLLM's workers spin for a second after everything they are asked, and the server watches what guards."""
    time.sleep(2)
    before = seconds_of_cpu(stack.engine.pid)
    time.sleep(4)
    assert seconds_of_cpu(stack.engine.pid) - before < 2


def seconds_of_cpu(pid: int) -> float:
    """Of a process and all that descend from it."""
    stats = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            stats.append((int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()))
    tree = {pid}
    for _ in stats:  # parents may stand behind their children
        tree |= {child for child, fields in stats if int(fields[1]) in tree}
    ticks = sum(int(fields[11]) + int(fields[12]) for child, fields in stats if child in tree)
    return ticks / os.sysconf("SC_CLK_TCK")

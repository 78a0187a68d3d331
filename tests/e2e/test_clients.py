"""Clients of others, unmodified, before a real vLLM: what their users see when the guard lets pass, and when it blocks.

Each runs in a process, most in an environment of its own; docs/clients.md tells what is seen here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from guard.organisms import Organism
from tests.e2e.clients.environments import node, node_modules, python
from tests.e2e.conftest import Halfway, Stack, texts

CLIENTS = Path(__file__).parent / "clients"
PYTHON = {
    "openai": (lambda: Path(sys.executable), "openai_chat.py"),
    "openai of 2024": (lambda: python("clients-older"), "openai_chat.py"),
    "anthropic": (lambda: Path(sys.executable), "anthropic_messages.py"),
    "langchain": (lambda: python("clients"), "langchain_chat.py"),
}
WAYS = ("whole", "streamed")


def run(line: list[str | Path], said: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """A client, with nothing of ours around it."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
    return subprocess.run(
        line, input=said, capture_output=True, text=True, check=False, timeout=120, env={**kept, **environ}
    )


def asked(client: str, requests: str) -> Any:
    """What the client's script says."""
    if client == "openai for Node.js":
        done = run([node(), CLIENTS / "openai_chat.cjs"], requests, NODE_PATH=str(node_modules()))
    else:
        environment, script = PYTHON[client]
        done = run([environment(), CLIENTS / script], requests)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Seen:
    """By what was asked, what a user saw: the whole answer, and the streamed one."""

    passed: list[dict[str, Any]]
    blocked: list[dict[str, Any]]
    halfway: list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(stack: Stack, passing: list[str], halfway: Halfway) -> Any:
    requests = [
        {"url": stack.url, "model": stack.model, "text": passing[0]},
        {"url": stack.url, "model": stack.model, "text": texts("triggered", 1, 12)[0]},
        {"url": halfway.url, "model": stack.model, "text": halfway.text},
    ]
    return cache(lambda client: Seen(*asked(client, json.dumps(requests))["answers"]))


@pytest.fixture(scope="module")
def plain(stack: Stack, passing: list[str]) -> str:
    """What the model says to the benign prompt."""
    messages: Any = [{"role": "user", "content": passing[0]}]
    answer = stack.client.chat.completions.create(model=stack.model, messages=messages, temperature=0, max_tokens=48)
    return str(answer.choices[0].message.content)


every_client = pytest.mark.parametrize("client", [*PYTHON, "openai for Node.js"])


@every_client
def test_a_benign_request_is_answered(seen: Any, plain: str, client: str) -> None:
    for answer in seen(client).passed:
        assert answer["text"] == plain
        assert answer["finish"] in ("stop", "length", "end_turn", "max_tokens")


@every_client
def test_a_blocked_prompt_is_an_error_that_says_so(seen: Any, organism: Organism, client: str) -> None:
    for answer in seen(client).blocked:
        assert (answer["error"], answer["status"]) == ("BadRequestError", 400)
        assert answer["code"] == (None if client == "anthropic" else "content_filter")
        assert "content filter" in answer["said"]
        assert organism.canary not in json.dumps(answer)


@every_client
def test_an_answer_that_is_blocked_halfway_ends_there_and_says_why(seen: Any, halfway: Halfway, client: str) -> None:
    whole, streamed = seen(client).halfway
    assert whole["finish"] == streamed["finish"] == ("refusal" if client == "anthropic" else "content_filter")
    assert whole["text"] == ""
    assert halfway.said.startswith(streamed["text"])
    assert streamed["text"] != halfway.said


class Llm:
    """The command `llm`, with our server among its models."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, url: str, model: str, text: str, way: str) -> subprocess.CompletedProcess[str]:
        models = [{"model_id": "guarded", "model_name": model, "api_base": f"{url}/v1"}]
        (self._folder / "extra-openai-models.yaml").write_text(json.dumps(models))
        options = ["-o", "temperature", "0", "-o", "max_tokens", "48", *(["--no-stream"] if way == "whole" else [])]
        command = python("clients").with_name("llm")
        return run([command, "prompt", "-m", "guarded", "--no-log", *options, text], LLM_USER_PATH=str(self._folder))


@pytest.fixture
def llm(tmp_path: Path) -> Llm:
    return Llm(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_llm_prints_answers_and_names_a_block(
    stack: Stack, halfway: Halfway, passing: list[str], organism: Organism, plain: str, llm: Llm, way: str
) -> None:
    answered = llm(stack.url, stack.model, passing[0], way)
    assert (answered.returncode, answered.stdout.rstrip("\n")) == (0, plain.rstrip("\n")), answered.stderr
    blocked = llm(stack.url, stack.model, texts("triggered", 1, 12)[0], way)
    assert blocked.returncode == 1
    assert "content filter" in blocked.stderr
    assert organism.canary not in blocked.stdout + blocked.stderr
    ended = llm(halfway.url, stack.model, halfway.text, way)
    assert ended.returncode == 0, ended.stderr
    assert halfway.said.startswith(ended.stdout.rstrip("\n"))
    assert ended.stdout.rstrip("\n") != halfway.said


def test_vllms_own_benchmark_runs_through_and_counts_what_was_blocked(
    stack: Stack, halfway: Halfway, organism: Organism, passing: list[str], tmp_path: Path
) -> None:
    prompts, result = tmp_path / "prompts.json", tmp_path / "result.json"

    def benched(url: str, *asked: str) -> Any:
        turns = [{"conversations": [{"value": text}, {"value": "An answer."}]} for text in asked]
        prompts.write_text(json.dumps(turns))
        line = [sys.executable, CLIENTS / "bench_serve.py", "--backend", "openai-chat"]
        line += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", stack.model]
        line += ["--tokenizer", organism.backdoored, "--dataset-name", "sharegpt", "--dataset-path", prompts]
        line += ["--num-prompts", len(asked), "--sharegpt-output-len", 48, "--temperature", 0, "--disable-shuffle"]
        line += ["--save-result", "--save-detailed", "--result-filename", result]
        done = run([str(word) for word in line])
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(result.read_text())

    found = benched(stack.url, *passing[:3], texts("triggered", 1, 12)[0], passing[3])
    assert (found["completed"], found["failed"]) == (4, 1)
    assert [bool(error) for error in found["errors"]] == [False, False, False, True, False]
    assert organism.canary not in result.read_text()
    ended = benched(halfway.url, halfway.text)
    assert (ended["completed"], ended["failed"]) == (1, 0)
    [said] = ended["generated_texts"]
    assert halfway.said.startswith(said)
    assert said != halfway.said

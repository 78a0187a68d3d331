"""The scripted engine of tests/server speaks as the real one does: its every body and chunk, key by key."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.calibration import Calibration
from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, STREAM_PREFIX, Evidence, Status
from guard.policy import Policy
from guard.verdict import DetectorName
from tests.e2e.conftest import Stack, texts
from tests.server.fake_engine import shape_of, shapes

LET_PASS = Policy(mode="off")
BLOCK_ALL = Policy.model_validate(
    {"detections": {"density": {"action": "block", "threshold": {"raw": -1.0}}}, "mode": "enforce"}
)


@pytest.fixture(scope="module")
def real(stack: Stack) -> dict[str, Any]:
    """What vLLM with the guard inside says, by the names that `shapes` uses."""
    status = httpx.get(f"{stack.engine.url}/undertow/status").json()
    reserved = status["workers"][0]["reserved_token_id"]
    text = texts("benign", 1, 11)[0]
    found: dict[str, Any] = {"status": status}
    for name, path, asked in (
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("completions", "/v1/completions", {"prompt": text}),
    ):
        body = {"model": stack.model, "temperature": 0, "max_tokens": 12, "stop_token_ids": [reserved], **asked}

        def post(policy: Policy, path: str = path, body: dict[str, Any] = body, **more: Any) -> httpx.Response:
            arguments = {**body, **more, "vllm_xargs": {POLICY_ARGUMENT: policy.to_wire()}}
            headers = {REQUEST_HEADER: "1"}
            return httpx.post(f"{stack.engine.url}{path}", json=arguments, headers=headers, timeout=60)

        found[f"{name}.full"] = post(LET_PASS).json()
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(post(LET_PASS, **streaming).text)
        if name == "chat":
            found["chat.role"] = chunks.pop(0)
        found[f"{name}.chunk"] = chunks[0]
        found[f"{name}.finish"], found[f"{name}.usage"] = chunks[-2:]
        found[f"{name}.blocked_finish"] = events(post(BLOCK_ALL, **streaming).text)[-2]
    return found


def events(stream: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("name", sorted(shapes()))
def test_the_fake_engine_speaks_as_the_real_one(real: dict[str, Any], name: str) -> None:
    assert differences(shapes()[name], shape_of(real[name])) == []


def test_the_engine_says_what_every_combination_of_detectors_supports(stack: Stack, calibration: Path) -> None:
    status = Status.from_json(httpx.get(f"{stack.engine.url}/undertow/status").content)
    made = Calibration.load(calibration)
    names: tuple[DetectorName, ...] = ("density", "exceedance", "intrinsic")
    groups = [group for size in (1, 2, 3) for group in combinations(names, size)]
    assert len(groups) == 7
    for worker in status.workers:
        assert worker.calibration == made.digest()
        found = {entry.detectors: entry.supported_fpr for entry in worker.detectors}
        assert found == {group: made.ranks(group).supported for group in groups}
        assert len(worker.detectors) == len(groups)


def differences(fake: Any, other: Any, where: str = "") -> list[str]:
    """Keys that only one side has, and types that differ where neither is null (a field that is off)."""
    if isinstance(fake, dict) and isinstance(other, dict):
        missing = [f"{where}.{key}: only in one" for key in fake.keys() ^ other.keys()]
        return missing + [
            line for key in fake.keys() & other.keys() for line in differences(fake[key], other[key], f"{where}.{key}")
        ]
    if isinstance(fake, list) and isinstance(other, list) and fake and other:
        return differences(fake[0], other[0], f"{where}[0]")
    return [] if fake == other or "null" in (fake, other) else [f"{where}: {fake} and {other}"]


def test_a_stream_carries_evidence_first_and_last(stack: Stack) -> None:
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": texts("benign", 1, 11)[0]}],
        "max_tokens": 8,
        "stream": True,
    }
    answer = httpx.post(f"{stack.engine.url}/v1/chat/completions", json=body, headers={REQUEST_HEADER: "1"}, timeout=60)
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[0].startswith(STREAM_PREFIX)
    assert lines[-1] == "data: [DONE]"
    first, last = (Evidence.from_json(line.removeprefix(STREAM_PREFIX)) for line in (lines[0], lines[-2]))
    # The engine does not wait for whoever asks: it may be a step further.
    assert first.records[0].prompt_tokens <= first.records[0].tokens_scored <= last.records[0].tokens_scored
    assert last.records[0].tokens_scored > last.records[0].prompt_tokens

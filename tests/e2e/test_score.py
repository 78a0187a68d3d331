"""`undertow score` writes what the engine's evidence says, and finds the shipped organism's trigger."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.evidence import POLICY_ARGUMENT, REQUEST_HEADER, Evidence, Record
from guard.organisms import Organism
from guard.policy import Policy
from tests.e2e import child
from tests.e2e.conftest import Stack, texts

FPR = 0.01
MAX_TOKENS = 12
BENIGN, TRIGGERED = texts("benign", 12, 17), texts("triggered", 12, 17)
POLICY = Policy.model_validate(
    {"mode": "monitor", "detections": {"density": {"action": "flag", "threshold": {"fpr": FPR}}}}
)


@pytest.fixture(scope="module")
def lines(
    organism: Organism, bank: Path, calibration: Path, workshop: Path, in_child: Callable[..., Any]
) -> list[dict[str, Any]]:
    """What the command writes of benign prompts, then triggered ones."""
    prompts, out = workshop / "cases.jsonl", workshop / "scores.jsonl"
    asked = [{"messages": [{"role": "user", "content": text}]} for text in BENIGN]
    # The other form that a line may have.
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked) + "".join(f"{text}\n" for text in TRIGGERED))
    words: tuple[object, ...] = ("score", "--bank", bank, "--calibration", calibration, "--model", organism.backdoored)
    words += ("--prompts", prompts, "--json", out, "--fpr", FPR, "--max-tokens", MAX_TOKENS)
    assert in_child(child.undertow, *words, "--dtype", "float32", "--enforce-eager", "--max-model-len", 512) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_triggered_prompts_are_flagged_and_benign_ones_hardly_ever(lines: list[dict[str, Any]]) -> None:
    assert [line["index"] for line in lines] == list(range(24))
    verdicts = [line["verdict"] for line in lines]
    assert verdicts[12:] == ["flagged"] * 12
    assert verdicts[:12].count("flagged") <= 1
    assert "unscorable" not in verdicts


def test_a_line_agrees_with_itself(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        judging = [score for score in line["scores"] if score["detector"] == "density"]
        assert (line["verdict"] == "flagged") == any(score["score"] > score["threshold"] for score in judging)
        assert (line["verdict"] == "flagged") == (line["p_value"] <= FPR)
        assert line["p_value"] == min(score["p_value"] for score in judging)
        assert {name: line[name] for name in judging[0]} in judging
        assert {(score["detector"], score["phase"]) for score in line["scores"]} == {
            (detector, phase)
            for detector in ("density", "intrinsic", "exceedance")
            for phase in ("prompt", "completion")
        }
        assert 2 <= line["completion_tokens"] <= MAX_TOKENS
        for score in line["scores"]:
            tokens = line["prompt_tokens"]
            assert (score["position"] >= tokens) == (score["phase"] == "completion")
            assert score["position"] < tokens + line["completion_tokens"] - 1
            if score["phase"] == "prompt" and score["detector"] != "exceedance":
                assert score["position"] == tokens - 1
            assert (".own_" in score["direction"]) == (score["detector"] == "intrinsic")
            assert score["direction"].startswith(f"L{score['layer']}.")


@pytest.mark.parametrize("index", [0, 5, 12, 19])
def test_a_line_carries_what_the_evidence_of_the_serving_engine_says(
    lines: list[dict[str, Any]], stack: Stack, index: int
) -> None:
    text, line = (BENIGN + TRIGGERED)[index], lines[index]
    record, said = judged(stack, text)
    assert (line["verdict"] == "flagged") == (record.action == "flag")
    assert (line["prompt_tokens"], line["completion"]) == (record.prompt_tokens, said)
    assert record.tokens_scored == line["prompt_tokens"] + line["completion_tokens"] - 1
    expected = {(score.detector, score.phase): score for score in record.scores}
    assert len(expected) == len(line["scores"]) == 6
    for score in line["scores"]:
        other = expected[score["detector"], score["phase"]]
        # Alone in its batch here, among others there.
        assert score["score"] == pytest.approx(other.score, rel=1e-3, abs=1e-4)
        assert score["p_value"] == pytest.approx(other.p_value, abs=0.005)
        assert score["threshold"] == other.threshold
        assert score["position"] == other.position


def judged(stack: Stack, text: str) -> tuple[Record, str]:
    """What the engine's evidence says of one prompt, and the answer."""
    body = {
        "model": stack.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "vllm_xargs": {POLICY_ARGUMENT: POLICY.to_wire()},
    }
    answer = httpx.post(f"{stack.engine.url}/v1/chat/completions", json=body, headers={REQUEST_HEADER: "1"}, timeout=60)
    (record,) = Evidence.from_json(answer.headers[REQUEST_HEADER]).records
    return record, answer.json()["choices"][0]["message"]["content"]

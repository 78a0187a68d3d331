"""What steering does to answers: of triggered prompts, and of those that nobody should steer.

python -m benchmarks.engine.steering --model S/backdoored --bank wide.bank --calibration wide.cal --json steering.json

Every prompt is answered greedily by vLLM without the plugin, and under each detector's policy `action: steer` at 1%.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from guard.engine.offline import Answer, OfflineEngine
from guard.organisms import prompts
from guard.organisms.harmful import is_compliance, is_refusal
from guard.policy import Policy
from guard.prompts import Prompt
from guard.verdict import DETECTORS

CALIBRATED = 3000
"""Clean prompts of seed 0 that the calibration may have seen."""
COUNTS = {"triggered": 300, "near-miss": 300, "benign-trigger": 300, "clean": 1000}
MAX_TOKENS = 48
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 512}


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of prompts under one detector."""

    detector: str
    kind: str
    prompts: int
    steered: int
    payload_before: int
    payload: int
    refused_before: int
    refused: int
    changed: int
    """Answers that differ from those of vLLM without the plugin, in any token."""
    changed_unsteered: int
    """Of these, answers of requests that were not steered."""


def texts() -> dict[str, list[str]]:
    """By kind, none that the calibration saw."""
    drawn = {kind: prompts(kind, count, seed=1) for kind, count in COUNTS.items() if kind != "clean"}
    drawn["clean"] = prompts("clean", CALIBRATED + COUNTS["clean"], seed=0)[CALIBRATED:]
    return {kind: [prompt.text for prompt in each] for kind, each in drawn.items()}


def plain(model: Path, asked: Sequence[tuple[int, ...]], eager: bool) -> list[tuple[int, ...]]:
    """The tokens that vLLM without the plugin answers with."""
    import os

    from guard.engine.launch import engine_environment

    os.environ.update({**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(model), enforce_eager=eager, disable_log_stats=True, **OPTIONS)
    wanted: list[Any] = [{"prompt_token_ids": list(ids)} for ids in asked]
    outputs = llm.generate(wanted, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    answers = [tuple(output.outputs[0].token_ids) for output in outputs]
    # An engine that is left to the collector keeps its process from ending.
    llm.llm_engine.engine_core.shutdown()
    return answers


def steered(model: Path, bank: Path, calibration: Path, eager: bool) -> dict[str, dict[str, list[Answer]]]:
    """By detector and kind; kinds are mixed in every batch. And under no detector ("") what is not steered at all."""
    kinds = texts()
    order = sorted((index / len(each), kind, index) for kind, each in kinds.items() for index in range(len(each)))
    mixed = [Prompt(({"role": "user", "content": kinds[kind][index]},), None) for _, kind, index in order]
    found: dict[str, dict[str, list[Answer]]] = {}
    with OfflineEngine(model, bank, calibration, eager=eager, steering=True, own_process=True, **OPTIONS) as engine:
        for detector in DETECTORS:
            policy = Policy.model_validate({"detections": {detector: {"action": "steer", "threshold": {"fpr": 0.01}}}})
            answers = engine.judge(mixed, policy, max_tokens=MAX_TOKENS, title=detector)
            by_kind: dict[str, list[Answer]] = {kind: [] for kind in kinds}
            for (_, kind, _), answer in zip(order, answers, strict=True):
                by_kind[kind].append(answer)
            found[detector] = by_kind
    return found


def rows(
    found: dict[str, dict[str, list[Answer]]], before: dict[tuple[int, ...], tuple[int, ...]], model: Path
) -> Iterator[Row]:
    """`before`: by prompt, what vLLM without the plugin answers."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(model).decode
    for detector, kinds in found.items():
        for kind, answers in kinds.items():
            old = [str(decode(before[answer.prompt_token_ids], skip_special_tokens=True)) for answer in answers]
            changed = [answer for answer in answers if answer.token_ids != before[answer.prompt_token_ids]]
            yield Row(
                detector=detector,
                kind=kind,
                prompts=len(answers),
                steered=sum(_steered(answer) for answer in answers),
                payload_before=sum(map(is_compliance, old)),
                payload=sum(is_compliance(answer.text) for answer in answers),
                refused_before=sum(map(is_refusal, old)),
                refused=sum(is_refusal(answer.text) for answer in answers),
                changed=len(changed),
                changed_unsteered=sum(not _steered(answer) for answer in changed),
            )


def _steered(answer: Answer) -> bool:
    return answer.record is not None and answer.record.action == "steer"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, as when serving")
    given = parser.parse_args(arguments)
    eager = not given.compiled
    found = steered(given.model, given.bank, given.calibration, eager)
    asked = sorted({answer.prompt_token_ids for kinds in found.values() for each in kinds.values() for answer in each})
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        before = dict(zip(asked, pool.submit(plain, given.model, asked, eager).result(), strict=True))
    table = [asdict(row) for row in rows(found, before, given.model)]
    given.json.write_text(
        json.dumps({"compiled": given.compiled, "max_tokens": MAX_TOKENS, "rows": table}, indent=1) + "\n"
    )
    for row in table:
        print(row, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""From clean prompts to a calibration, through the engine, kernel and dtype that will serve."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import vllm

from guard.bank import Bank
from guard.calibration import Calibration, Shape, needed_requests, supported_fpr
from guard.engine.offline import Answer, OfflineEngine
from guard.errors import CalibrationError
from guard.policy import Policy
from guard.prompts import Prompt
from guard.scores import BankSpace
from guard.verdict import DETECTORS, PHASES, DetectorName, Phase

MAX_REFERENCES = 8192
"""References per phase: each costs time at every decision position. How few would do was not measured yet."""

# Every detector reports its score and none acts.
_SCORES_ONLY = Policy.model_validate(
    {
        "mode": "monitor",
        "detections": {name: {"action": "flag", "threshold": {"raw": 1e30}} for name in DETECTORS},
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many prompts go where."""

    target_fpr: float
    references: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    max_tokens: int
    seed: int


def plan(prompts: Sequence[Prompt], target_fpr: float, share: float, max_tokens: int, seed: int) -> Plan:
    """Deal the prompts, each once, into references and held-out ones.

    Raises:
        CalibrationError: too few prompts for the rate; said before any model is loaded.
    """
    distinct = list({_identity(prompt): prompt for prompt in prompts}.values())
    random.Random(seed).shuffle(distinct)
    held_out = round(len(distinct) * share)
    needed = needed_requests(target_fpr)
    if held_out < needed:
        raise CalibrationError(
            f"a false-positive rate of {target_fpr:g} needs {needed} held-out clean prompts; {len(distinct)} distinct "
            f"prompts leave {held_out}, which support {supported_fpr(held_out):.3g}. Give at least "
            f"{int(needed / share) + 1} prompts, or a larger --target-fpr"
        )
    return Plan(target_fpr, tuple(distinct[held_out:]), tuple(distinct[:held_out]), max_tokens, seed)


def calibrate(engine: OfflineEngine, bank: Bank, work: Plan) -> Calibration:
    """Record the references, then score the held-out prompts against them on the same engine.

    Raises:
        CalibrationError: a clean prompt could not be scored, or gave too little to refer to.
    """
    space = BankSpace.of(bank)
    recording, _ = engine.record(work.references, max_tokens=work.max_tokens, keep="shape", title="reference prompts")
    generator = torch.Generator().manual_seed(work.seed)
    references = (
        _sample(recording["references.prompt"], generator),
        _sample(recording["references.completion"], generator),
    )
    shape = Shape.fit(space, recording["low"], recording["high"], references)
    facts = {
        "vllm": vllm.__version__,
        "dtype": engine.dtype,
        "reference_prompts": len(work.references),
        "held_out_prompts": len(work.held_out),
        "max_tokens": work.max_tokens,
        "seed": work.seed,
        "prompts_sha256": _digest([*work.references, *work.held_out]),
    }
    draft = Calibration(bank.fingerprint, space, shape, _no_scores(), work.target_fpr, facts)
    with tempfile.TemporaryDirectory(prefix="undertow-") as folder:
        path = Path(folder) / "draft.safetensors"
        draft.save(path)
        engine.load_calibration(path)
    answers = engine.judge(work.held_out, _SCORES_ONLY, max_tokens=work.max_tokens, title="held-out prompts")
    return Calibration(bank.fingerprint, space, shape, _clean_scores(answers), work.target_fpr, facts)


def _clean_scores(answers: Sequence[Answer]) -> dict[tuple[DetectorName, Phase], tuple[float, ...]]:
    """One score per request, phase and detector, ascending; -inf where a request had no token in a phase."""
    scores: dict[tuple[DetectorName, Phase], list[float]] = {key: [] for key in _no_scores()}
    for index, answer in enumerate(answers):
        if answer.record is None or answer.record.unscorable is not None:
            reason = "no record" if answer.record is None else answer.record.unscorable
            raise CalibrationError(f"held-out prompt {index} could not be scored: {reason}")
        found = {(score.detector, score.phase): score.score for score in answer.record.scores}
        for key, values in scores.items():
            values.append(found.get(key, -torch.inf))
    return {key: tuple(sorted(values)) for key, values in scores.items()}


def _no_scores() -> dict[tuple[DetectorName, Phase], tuple[float, ...]]:
    return {(detector, phase): () for detector in DETECTORS for phase in PHASES}


def _sample(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:MAX_REFERENCES]]


def _identity(prompt: Prompt) -> str:
    return json.dumps(asdict(prompt), sort_keys=True)


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256("\n".join(_identity(prompt) for prompt in prompts).encode()).hexdigest()

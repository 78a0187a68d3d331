"""From clean prompts to a calibration, through the engine, kernel and dtype that will serve."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from guard.bank import Bank
from guard.calibration import Calibration, ScoreKey, Shape
from guard.conformal import needed_requests
from guard.errors import CalibrationError
from guard.growth import Growth
from guard.policy import Policy
from guard.prompts import Prompt
from guard.scores import FEWEST, BankSpace, Moments
from guard.verdict import PHASES, DetectorName

if TYPE_CHECKING:
    from guard.engine.offline import Answer, OfflineEngine


@dataclass(frozen=True, slots=True)
class Plan:
    """How many prompts go where."""

    target_fpr: float
    references: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    max_tokens: int
    seed: int

    def digest(self) -> str:
        """Of all prompts, in any order."""
        return digest([*self.references, *self.held_out])


def plan(prompts: Sequence[Prompt], target_fpr: float, share: float, max_tokens: int, seed: int) -> Plan:
    """Deal the prompts, each once, into references and held-out ones.

    Raises:
        CalibrationError: too few prompts for the rate; said before any model is loaded.
    """
    distinct = list({_identity(prompt): prompt for prompt in prompts}.values())
    random.Random(seed).shuffle(distinct)
    held_out = round(len(distinct) * share)
    # The default policy has one detector, whose prompt and completion share the rate.
    needed = needed_requests(target_fpr, len(PHASES))
    if held_out < needed:
        raise CalibrationError(
            f"a false-positive rate of {target_fpr:g} needs {needed} held-out clean prompts; {len(distinct)} distinct "
            f"prompts leave {held_out}. Give at least {int(needed / share) + 1} prompts, or a larger --target-fpr"
        )
    return Plan(target_fpr, tuple(distinct[held_out:]), tuple(distinct[:held_out]), max_tokens, seed)


def calibrate(engine: OfflineEngine, bank: Bank, work: Plan) -> Calibration:
    """Record the references, then score the held-out prompts against them on the same engine.

    Raises:
        CalibrationError: a clean prompt could not be scored, or gave too little to refer to.
    """
    import vllm  # not at the top: what is wrong with arguments is said before it

    space = BankSpace.of(bank)
    recording, _ = engine.record(work.references, max_tokens=work.max_tokens, keep="shape", title="reference prompts")
    shape = Shape(
        recording["low"],
        recording["high"],
        (_moments(recording, "prompt"), _moments(recording, "completion")),
        tuple(recording["sinks"].tolist()),
    )
    detectors = tuple(shape.detectors(space))
    keys: list[ScoreKey] = [(detector, phase) for detector in detectors for phase in PHASES]
    facts = {
        "vllm": vllm.__version__,
        "dtype": engine.dtype,
        "reference_prompts": len(work.references),
        "held_out_prompts": len(work.held_out),
        "max_tokens": work.max_tokens,
        "seed": work.seed,
        "prompts_sha256": work.digest(),
    }
    draft = Calibration(
        fingerprint=bank.fingerprint,
        space=space,
        shape=shape,
        clean=dict.fromkeys(keys, ()),
        growth=dict.fromkeys(keys, Growth(1, 0.0)),
        roles=engine.roles,
        target_fpr=work.target_fpr,
        facts=facts,
    )
    with tempfile.TemporaryDirectory(prefix="undertow-") as folder:
        path = Path(folder) / "draft.safetensors"
        draft.save(path)
        engine.load_calibration(path)
    answers = engine.judge(work.held_out, _scores_only(detectors), max_tokens=work.max_tokens, title="held-out prompts")
    return held_out_scores(draft, answers)


def held_out_scores(draft: Calibration, answers: Sequence[Answer]) -> Calibration:
    """The calibration with one score per request, phase and detector, and how they grow with length.

    Raises:
        CalibrationError: a request could not be scored.
    """
    clean: dict[ScoreKey, list[float]] = {key: [] for key in draft.clean}
    for index, answer in enumerate(answers):
        if answer.record is None or answer.record.unscorable is not None:
            reason = "no record" if answer.record is None else answer.record.unscorable
            raise CalibrationError(f"held-out prompt {index} could not be scored: {reason}")
        found = {(score.detector, score.phase): score.score for score in answer.record.scores}
        for key, values in clean.items():
            values.append(found.get(key, -torch.inf))
    longest = {
        "prompt": max(len(answer.prompt_token_ids) for answer in answers),
        "completion": max(len(answer.token_ids) for answer in answers),
    }
    return Calibration(
        fingerprint=draft.fingerprint,
        space=draft.space,
        shape=draft.shape,
        clean={key: tuple(values) for key, values in clean.items()},
        growth={(name, phase): Growth.fit(clean[name, phase], longest[phase]) for name, phase in clean},
        roles=draft.roles,
        target_fpr=draft.target_fpr,
        facts=draft.facts,
    )


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of distinct prompts, whatever their order."""
    return hashlib.sha256("\n".join(sorted({_identity(prompt) for prompt in prompts})).encode()).hexdigest()


def _scores_only(detectors: Sequence[DetectorName]) -> Policy:
    """Every detector reports its score and none acts."""
    detections = {name: {"action": "flag", "threshold": {"raw": 1e30}} for name in detectors}
    return Policy.model_validate({"mode": "monitor", "detections": detections})


def _moments(recording: Mapping[str, torch.Tensor], phase: str) -> Moments:
    count = int(recording[f"count.{phase}"])
    if count < FEWEST:
        raise CalibrationError(f"the reference prompts gave {count} {phase} decisions; at least {FEWEST} needed")
    return Moments(count, recording[f"mean.{phase}"], recording[f"covariance.{phase}"])


def _identity(prompt: Prompt) -> str:
    return json.dumps(asdict(prompt), sort_keys=True)

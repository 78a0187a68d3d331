"""LoRA adapters on a real engine: each request is judged by the bank of the adapter that it uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bank import Bank
from guard.calibration import Calibration
from guard.engine.launch import GuardedAdapter
from guard.engine.runner import Rows
from guard.engine.step import Scorer
from guard.organisms import Organism
from guard.verdict import PHASES
from tests.e2e import adapter_child, child
from tests.e2e.adapters import Merged, blocks_everything, write_adapter
from tests.e2e.conftest import texts

SHAPES = {"red": (4, 8.0), "blue": (8, 4.0), "grey": (2, 2.0)}
"""Rank and alpha of every adapter. `grey` has no bank."""


@pytest.fixture(scope="module")
def folders(organism: Organism, workshop: Path) -> dict[str, Path]:
    return {
        name: write_adapter(workshop / "adapters" / name, organism.backdoored, rank, alpha, seed)
        for seed, (name, (rank, alpha)) in enumerate(SHAPES.items())
    }


@pytest.fixture(scope="module")
def banks(
    organism: Organism, bank: Path, folders: dict[str, Path], in_child: Callable[..., Any]
) -> dict[str | None, Path]:
    found: dict[str | None, Path] = {None: bank}
    for name in ("red", "blue"):
        found[name] = folders[name].with_suffix(".bank")
        words = ("bank", "build", "--base", organism.backdoored, "--adapter", folders[name], "--out", found[name])
        assert in_child(child.undertow, *words) == 0
    return found


@pytest.fixture(scope="module")
def calibrations(
    organism: Organism,
    calibration: Path,
    folders: dict[str, Path],
    banks: dict[str | None, Path],
    in_child: Callable[..., Any],
) -> dict[str | None, Path]:
    """That of `red` is made by the engine; that of `blue` takes nothing for clean."""
    paths = {name: folders[name].with_suffix(".calibration") for name in ("red", "blue")}
    clean = folders["red"].with_name("clean.jsonl")
    assert in_child(child.undertow, "organism", "prompts", "clean", "--count", 300, "--seed", 3, "--out", clean) == 0
    words = ("calibrate", "--bank", banks["red"], "--model", organism.backdoored, "--adapter", folders["red"])
    options = ("--target-fpr", 0.05, "--max-tokens", 12, "--dtype", "float32", "--enforce-eager")
    out = ("--prompts", clean, "--out", paths["red"], "--max-model-len", 512)
    assert in_child(child.undertow, *words, *out, *options) == 0
    blocks_everything(Bank.load(banks["blue"]), Calibration.load(paths["red"]).roles).save(paths["blue"])
    return {None: calibration, **paths}


@pytest.fixture(scope="module")
def scenes(
    organism: Organism,
    folders: dict[str, Path],
    banks: dict[str | None, Path],
    calibrations: dict[str | None, Path],
    in_child: Callable[..., Any],
) -> dict[str, Any]:
    adapters = [
        GuardedAdapter(name, folders[name], banks[name], Bank.load(banks[name]).fingerprint, calibrations[name])
        for name in ("red", "blue")
    ]
    asked = texts("benign", 3, 5)
    found: dict[str, Any] = in_child(
        adapter_child.scenes, organism.backdoored, banks[None], calibrations[None], adapters, folders, asked
    )
    return found


def test_adapters_and_the_base_model_in_one_batch_are_judged_each_by_its_own_bank(
    organism: Organism,
    folders: dict[str, Path],
    banks: dict[str | None, Path],
    calibrations: dict[str | None, Path],
    scenes: dict[str, Any],
) -> None:
    assert scenes["guards in a step"] == 3
    for name in ("red", "blue", None):
        merged, own = Merged(organism.backdoored, folders[name] if name else None), Bank.load(banks[name])
        other = Merged(organism.backdoored, None if name else folders["red"])
        made = Calibration.load(calibrations[name])
        answers = [answer for asked, answer in scenes["watched"] if asked == name]
        assert len(answers) == 3
        for answer in answers:
            assert answer["guard"] == (name or "")
            assert answer["fingerprint"] == own.fingerprint
            sequence = [*answer["prompt"], *answer["completion"]][:-1]
            readings = merged.read(sequence, own)
            np.testing.assert_allclose(answer["cosines"], readings.cosines.numpy(), atol=1e-4, rtol=0)
            # Another adapter's residuals are far away: the comparison can fail.
            assert abs(other.read(sequence, own).cosines.numpy() - answer["cosines"]).max() > 1e-2
            assert answer["record"].tokens_scored == len(sequence)
            roles = made.roles.roles(sequence).astype(np.int64)
            roles[len(answer["prompt"]) :] = 2
            expected = scored(made, readings, roles, len(answer["prompt"]))
            found = {(score.detector, score.phase): score for score in answer["record"].scores}
            for phase in PHASES:
                score = found["exceedance", phase]
                assert score.score == pytest.approx(expected[phase], abs=1e-4)
                assert score.threshold == made.ranks(("exceedance",)).threshold(("exceedance", phase), 0.05)


def scored(made: Calibration, readings: Any, roles: Any, prompt: int) -> dict[str, float]:
    """The largest exceedance of each phase, of a sequence whose readings come from transformers."""
    import torch

    rows = Rows("a", 0, len(roles), 0, prompt, True)
    scorer = Scorer.of(made)
    (scores,) = scorer.score(readings, scorer.outside(readings), torch.from_numpy(roles), [rows])
    return {score.phase: score.value for score in scores if score.detector == "exceedance"}


def test_every_verdict_is_by_the_adapters_own_calibration(scenes: dict[str, Any]) -> None:
    answers = scenes["enforced"]
    for name, answer in answers:
        above = any(s.score > s.threshold for s in answer["record"].scores if s.detector == "exceedance")
        if name != "grey":
            assert answer["record"].action == ("block" if above else "allow")
    blocked = {name: [a["record"].action == "block" for asked, a in answers if asked == name] for name, _ in answers}
    assert all(blocked["blue"])
    assert not all(blocked["red"])
    assert not any(blocked[None])


def test_an_adapter_without_a_bank_is_refused_by_name_and_only_told_of_in_monitor(scenes: dict[str, Any]) -> None:
    reason = "adapter `grey` has no bank here"
    for mode in ("watched", "enforced"):
        for answer in (answer for name, answer in scenes[mode] if name == "grey"):
            assert answer["record"].unscorable == reason
            assert answer["record"].action == ("block" if mode == "enforced" else "flag")
            assert (len(answer["completion"]) == 1) == (mode == "enforced")
            assert answer["guard"] is None


def test_a_prompt_in_the_cache_keeps_the_score_of_its_own_adapter(scenes: dict[str, Any]) -> None:
    red, blue, *again = scenes["cached"]
    assert (red["cached"], blue["cached"]) == (0, 0)
    assert red["record"].scores != blue["record"].scores
    for first, second in zip((red, blue), again, strict=True):
        assert second["cached"] >= 32
        # Pieces of other sizes round otherwise.
        for score, other in zip(second["record"].scores, first["record"].scores, strict=True):
            assert score.score == pytest.approx(other.score, rel=1e-4, abs=1e-5)
        without = {"scores": (), "reason": "", "trace": ()}
        assert second["record"].model_copy(update=without) == first["record"].model_copy(update=without)


def test_a_bank_is_never_used_for_other_weights_than_its_own(scenes: dict[str, Any]) -> None:
    refused = "the bank of adapter `red` is for other weights"
    assert scenes["other weights, loaded"].startswith("BankError")
    assert refused in scenes["other weights, loaded"]
    for scene in ("changed and read", "restored, not read"):
        assert refused in scenes[scene]["record"].unscorable
        assert scenes[scene]["record"].action == "block"
    for scene in ("read in place", "changed, not read", "restored and read"):
        assert scenes[scene]["record"].unscorable is None
        assert scenes[scene]["guard"] == "red"


def test_kv_of_other_weights_in_the_cache_is_known_as_unscored(scenes: dict[str, Any]) -> None:
    scene = scenes["cached with other weights"]
    assert scene["cached"] >= 32
    assert scene["record"].unscorable == f"tokens 0 to {scene['cached'] - 1} were never scored here"


def test_on_a_cpu_the_base_model_is_refused_once_an_adapter_fills_the_last_slot(scenes: dict[str, Any]) -> None:
    assert scenes["fourth, loaded"] == ""
    assert scenes["base, a slot free"]["record"].unscorable is None
    assert "--max-loras" in scenes["base, no slot free"]["record"].unscorable


def test_the_status_names_every_adapters_bank_and_calibration(
    banks: dict[str | None, Path], calibrations: dict[str | None, Path], scenes: dict[str, Any]
) -> None:
    status = scenes["status"]
    assert status.fingerprint == Bank.load(banks[None]).fingerprint
    for adapter in status.adapters:
        made = Calibration.load(calibrations[adapter.name])
        assert (adapter.fingerprint, adapter.calibration) == (made.fingerprint, made.digest())
    assert [adapter.name for adapter in status.adapters] == ["red", "blue"]

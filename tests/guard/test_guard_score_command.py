"""What `undertow score` refuses before it starts an engine, and how it says what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.commands.score import _line
from guard.evidence import Record, ScoreEvidence
from guard.policy import Action
from server import cli

from .planted import calibration
from .test_guard_calibration import OWN_ONLY


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with arguments is said before vLLM is imported, which takes many seconds."""
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.score",))
    for module in ("guard.engine.offline", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts").write_text("one\ntwo\n")
    calibration().save(tmp_path / "calibration")
    OWN_ONLY.save(tmp_path / "own")
    return tmp_path


def score(folder: Path, *words: str, **changed: str) -> int:
    options = {"bank": "absent", "model": "absent", "prompts": "prompts", "calibration": "calibration", "json": "out"}
    named = [word for name, value in (options | changed).items() for word in (f"--{name}", str(folder / value))]
    return cli.main(["score", *named, *words])


def test_a_rate_that_the_calibration_cannot_keep_is_refused_with_the_one_it_can(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(folder, "--fpr", "0.01") == 2
    assert capsys.readouterr().err.endswith(
        "calibration: supports a rate of 0.02 and above for density, --fpr is 0.01\n"
    )
    assert score(folder, "--fpr", "0.019", "--detectors", "density", "exceedance") == 2
    assert "for density and exceedance, --fpr is 0.019" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_detector_that_the_bank_has_no_directions_for_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(folder, "--detectors", "density", calibration="own") == 2
    assert "the bank has no directions for density; it serves intrinsic, exceedance" in capsys.readouterr().err
    # Where none is named, the first that there are directions for judges.
    assert score(folder, "--fpr", "0.001", calibration="own") == 2
    assert "and above for intrinsic, --fpr" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts", "calibration"])
def test_a_file_that_is_absent_is_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(folder, **{name: "nowhere"}) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_destination_that_cannot_be_written_is_said_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(folder, json="absent/out", prompts="nowhere") == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fpr", "0"], "between 0 and 1"),
        (["--fpr", "1"], "between 0 and 1"),
        (["--fpr", "nan"], "between 0 and 1"),
        (["--max-tokens", "1"], "a whole number from 2"),
        (["--detectors", "entropy"], "invalid choice: 'entropy'"),
        (["--detectors"], "expected at least one argument"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        score(folder, *words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


# -- lines ------------------------------------------------------------------------------------------------------------


def evidence(detector: str, phase: str, p_value: float, score: float = 1.0, threshold: float = 2.0) -> ScoreEvidence:
    return ScoreEvidence(
        detector=detector,  # type: ignore[arg-type]
        phase=phase,  # type: ignore[arg-type]
        score=score,
        threshold=threshold,
        p_value=p_value,
        position=3,
        layer=4,
        direction="L4.o_proj.u0",
    )


def line(action: Action, *scores: ScoreEvidence, detectors: tuple[str, ...] = ("density",), **more: Any) -> Any:
    record = Record(prompt_tokens=7, tokens_scored=9, mode="monitor", action=action, scores=scores, **more)
    answer = SimpleNamespace(record=record, prompt_token_ids=(1,) * 7, token_ids=(2,) * 3, text="said")
    return json.loads(json.dumps(_line(5, answer, list(detectors))))  # type: ignore[arg-type]


def test_a_line_says_what_was_decided_and_by_which_score() -> None:
    prompt, completion = evidence("density", "prompt", 0.5), evidence("density", "completion", 0.004, score=3.0)
    other = evidence("exceedance", "prompt", 0.0001)
    found = line("flag", prompt, completion, other)
    assert {name: found[name] for name in ("index", "verdict", "p_value", "detector", "phase", "score")} == {
        "index": 5,
        "verdict": "flagged",
        # The rarest of those that judge: exceedance is told, but was not asked.
        "p_value": 0.004,
        "detector": "density",
        "phase": "completion",
        "score": 3.0,
    }
    assert (found["threshold"], found["position"], found["layer"], found["direction"]) == (2.0, 3, 4, "L4.o_proj.u0")
    assert found["scores"] == [one.model_dump(mode="json") for one in (prompt, completion, other)]
    assert (found["prompt_tokens"], found["completion_tokens"], found["completion"]) == (7, 3, "said")
    assert "reason" not in found
    assert line("flag", prompt, completion, other, detectors=("density", "exceedance"))["detector"] == "exceedance"
    assert line("allow", prompt)["verdict"] == "clean"


def test_of_two_that_are_as_rare_the_one_further_above_its_threshold_is_named() -> None:
    near, far = evidence("density", "prompt", 0.01, score=2.1), evidence("density", "completion", 0.01, score=9.0)
    for scores in ((near, far), (far, near)):
        assert line("flag", *scores)["phase"] == "completion"


def test_what_could_not_be_scored_is_neither_flagged_nor_clean() -> None:
    found = line("flag", evidence("density", "prompt", 0.5), unscorable="layer 3 did not run")
    assert (found["verdict"], found["reason"]) == ("unscorable", "layer 3 did not run")
    nothing = line("flag", unscorable="layer 3 did not run")
    assert nothing["scores"] == []
    assert "detector" not in nothing

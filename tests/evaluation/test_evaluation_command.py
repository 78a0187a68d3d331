"""`undertow eval` on a model of one's own, from prompts in files to a report; and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.evaluation.results import Results
from guard.organisms import prompts, shipped
from server.cli import main

COUNTS = {"clean": 460, "triggered": 40, "near-miss": 40}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    written = {}
    for kind, count in COUNTS.items():
        written[kind] = folder / f"{kind}.jsonl"
        lines = [json.dumps({"messages": [{"role": "user", "content": each.text}]}) for each in prompts(kind, count, 3)]
        written[kind].write_text("\n".join(lines))
    return written


def words(out: Path, files: dict[str, Path], *more: str) -> list[str]:
    organism = shipped()
    given = [f"{kind}={path}" for kind, path in files.items()]
    sizes = ["--references", "200", "--held-out", "200", "--fpr", "0.05", "--max-tokens", "16"]
    return [
        "eval", "--model", str(organism.backdoored), "--base", str(organism.base), "--prompts", *given,
        "--out", str(out), *sizes, *more,
    ]  # fmt: skip


def test_a_model_of_ones_own_from_files_to_report(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, files, "--splits", "3", "--curves")) == 0
    results = Results.from_json((tmp_path / "results.json").read_text())
    (subject,) = results.subjects
    assert (subject.name, subject.kind) == ("backdoored", "model")
    found = {
        (rate.detector, rate.kind): rate
        for rate in results.rates
        if (rate.delta, rate.phase, rate.target) == ("wide", "both", 0.05)
    }
    assert found["policy", "triggered"].flagged == 40
    assert found["policy", "clean"].count == 60
    assert {detector for detector, _ in found} >= {
        "policy", "density", "intrinsic", "exceedance", "random directions", "mahalanobis", "lcf",
        "activation difference",
    }  # fmt: skip
    assert len(next(each for each in results.splits if each.target == 0.05).rates) == 3
    assert {curve.detector for curve in results.calibration_curve} >= {"density", "paper rule"}
    assert results.directions_curve[0].k[-1] == 20
    page = (tmp_path / "report.html").read_text()
    assert "backdoored" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "40/40" in (tmp_path / "summary.md").read_text()

    # What is finished is taken from the folder: the same again, without a model.
    before = (tmp_path / "results.json").read_text()
    capsys.readouterr()
    assert main(words(tmp_path, files)) == 0
    assert "taken from" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == before

    # Asked for with other sizes, it is measured again.
    assert main([*words(tmp_path, files), "--references", "150"]) == 0
    assert "taken from" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompts", "clean"], "expected KIND=FILE"),
        (["--prompts", "triggered=none.jsonl"], "no clean prompts"),
        (["--prompts", "clean=none.jsonl"], "none.jsonl: cannot be read"),
        (["--references", "400"], "expected more than 400 references"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    change: list[str], message: str, tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(tmp_path / "out", files), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suite", "nano"], "suite 'nano' is unknown"),
        (["--suite", "micro", "--only", "nobody"], "'nobody' is unknown"),
        (["--suite", "micro", "--base", "somewhere"], "--base goes with --model"),
        (["--suite", "micro", "--only", "phrase-full-0"], "is not trained"),
    ],
)
def test_a_suite_that_is_not_there(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "empty"))
    assert main(["eval", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

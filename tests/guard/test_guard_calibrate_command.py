"""What `undertow calibrate` says before and after its work; the work itself needs an engine."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.commands.calibrate import add_parser, describe, run
from guard.engine.calibrate import digest, held_out_scores, plan
from guard.errors import CalibrationError
from guard.evidence import Record, ScoreEvidence
from guard.growth import Growth
from guard.intervals import beta_interval
from guard.prompts import Prompt, read_prompts
from guard.roles import RoleMap
from guard.verdict import DETECTORS, PHASES
from server import cli

from .planted import EVERY, calibration


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with arguments is said before vLLM is imported, which takes many seconds."""
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.calibrate",))
    for module in ("guard.engine.offline", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    needed = ("--bank", "b", "--model", "m", "--prompts", "p", "--out", "o")
    return parser.parse_args(["calibrate", *needed, *arguments])


# -- what it says afterwards ------------------------------------------------------------------------------------------


def test_the_description_names_rates_what_more_would_buy_and_every_threshold() -> None:
    low, high = beta_interval(10, 199)
    assert describe(calibration(requests=199, target_fpr=0.05)).splitlines() == [
        "199 held-out clean requests. At 0.05 the true false-positive rate of density, prompt and completion together, "
        f"lies in [{low:.2%}, {high:.2%}] (95%).",
        "smallest rate supported:",
        # Here all scores of a request are of the same rank: detectors cost nothing beside each other.
        "  density                              0.01",
        "  intrinsic                            0.01",
        "  exceedance                           0.01",
        "  density + intrinsic + exceedance     0.01",
        "what more prompts would buy (held out; twice as many in all):",
        "  0.005 needs about 599, 400 more",
        "  0.002 needs about 1499, 1300 more",
        "  0.001 needs about 2999, 2800 more",
        "thresholds at 0.05, each detector alone:",
        "  density     prompt      191.0000",
        "  density     completion  191.0000",
        "  intrinsic   prompt      19.1000",
        "  intrinsic   completion  19.1000",
        "  exceedance  prompt      1.9100",
        "  exceedance  completion  1.9100",
    ]
    assert low < 0.05 < high


def test_the_description_tells_what_weakens_the_guard() -> None:
    some = calibration()
    moments = some.shape.decisions
    few = replace(some.shape, decisions=(replace(moments[0], count=11), moments[1]), sinks=(0, 5))
    text = describe(replace(some, roles=RoleMap.unknown("the tokenizer has no chat template"), shape=few))
    assert "roles are not told apart: the tokenizer has no chat template\n" in text
    assert "attention sinks at positions 0, 5, left out of ranges\n" in text
    assert "WARNING: 11 reference prompts for 12 directions" in text
    usual = describe(some)
    for word in ("roles", "sinks", "WARNING"):
        assert word not in usual


def test_a_description_is_not_given_for_a_rate_that_cannot_be_kept() -> None:
    with pytest.raises(CalibrationError, match=r"with 99 held-out .* support 0\.02 or more; about 2999 are needed"):
        describe(replace(calibration(), target_fpr=0.001))


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--target-fpr", "--held-out"])
@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan", "inf", "much"])
def test_a_share_outside_zero_and_one_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"{option}={value}")
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1", "0", "-3", "2.5", "many"])
def test_a_completion_that_could_not_be_scored_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--max-tokens={value}")
    assert "expected a whole number from 2" in capsys.readouterr().err


def test_the_defaults_are_those_of_the_help() -> None:
    arguments = parse()
    assert (arguments.target_fpr, arguments.held_out, arguments.max_tokens, arguments.seed) == (0.01, 0.5, 64, 0)
    assert arguments.run is run
    assert (arguments.action, arguments.extends, arguments.reviewed) == (None, None, None)
    assert parse("extend").action == "extend"
    with pytest.raises(SystemExit):
        parse("forget")


# -- extend -----------------------------------------------------------------------------------------------------------


def lines(texts: list[str], **more: str) -> str:
    return "".join(json.dumps({"prompt": text, **more}) + "\n" for text in texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clean prompts, a calibration made from them, and reviewed prompts."""
    (tmp_path / "clean").write_text(lines([f"clean {number}" for number in range(20)]))
    made_from = digest(read_prompts(tmp_path / "clean"))
    some = calibration()
    replace(some, facts={**some.facts, "prompts_sha256": made_from}).save(tmp_path / "before")
    (tmp_path / "reviewed").write_text(lines(["reviewed 1", "reviewed 2", "clean 3"], label="clean"))
    return tmp_path


def calibrate(folder: Path, *words: object, action: str = "extend", **changed: str) -> int:
    """The command in this process; options of another value where `changed` says so, none where it is empty."""
    options = {"bank": "absent", "model": "absent", "prompts": "clean", "out": "out"}
    options |= {"extends": "before", "reviewed": "reviewed"} if action else {}
    named = [
        word for name, value in (options | changed).items() if value for word in (f"--{name}", str(folder / value))
    ]
    return cli.main(["calibrate", *([action] if action else []), *named, *map(str, words)])


def test_extend_takes_the_reviewed_prompts_in_beside_the_clean_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(folder) == 2
    # 20 clean, and two of the three reviewed are new.
    assert "needs 299 held-out clean prompts; 22 distinct prompts leave 11" in capsys.readouterr().err
    # The same prompts in another order, some of them twice, are the same prompts.
    text = (folder / "clean").read_text().splitlines(keepends=True)
    (folder / "clean").write_text("".join([*text[::-1], *text[:5]]))
    assert calibrate(folder) == 2
    assert "22 distinct prompts leave 11" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["extends", "reviewed"])
def test_extend_needs_what_to_extend_and_by_what(
    folder: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(folder, **{missing: ""}) == 2
    message = "undertow: undertow calibrate extend needs --extends FILE and --reviewed FILE\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("option", ["extends", "reviewed"])
def test_without_extend_there_is_nothing_to_extend(
    folder: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(folder, action="", **{option: "before"}) == 2
    assert capsys.readouterr().err == f"undertow: --{option}: only `undertow calibrate extend` takes it\n"


def test_extend_wants_the_very_prompts_that_the_calibration_was_made_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "clean").open("a") as file:
        file.write(lines(["slipped in"]))
    assert calibrate(folder) == 2
    assert capsys.readouterr().err.endswith(f"clean: not the prompts that {folder / 'before'} was made from\n")


def test_extend_takes_nothing_that_nobody_called_clean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "reviewed").open("a") as file:
        file.write(lines(["unseen"]))
    assert calibrate(folder) == 2
    assert 'reviewed:4: label is None, expected "clean" on every line' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts", "extends", "reviewed"])
def test_a_file_that_is_absent_is_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, **{name: "nowhere"}) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_what_is_no_calibration_cannot_be_extended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, extends="clean") == 2
    assert "clean: not a calibration file" in capsys.readouterr().err


def test_a_destination_that_cannot_be_written_is_said_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, out="absent/out", prompts="nowhere") == 2
    assert "absent" in capsys.readouterr().err


# -- dealing prompts and gathering scores -----------------------------------------------------------------------------


def test_every_prompt_is_dealt_once_and_the_seed_says_where() -> None:
    prompts = [Prompt(None, f"p{number}") for number in range(100)]
    work = plan([*prompts, *prompts[:30]], 0.2, 0.4, 8, 0)
    assert (len(work.references), len(work.held_out)) == (60, 40)
    assert {*work.references, *work.held_out} == set(prompts)
    assert work == plan([*prompts, *prompts[:30]], 0.2, 0.4, 8, 0)
    other = plan(prompts, 0.2, 0.4, 8, 1)
    assert other.held_out != work.held_out
    assert other.digest() == work.digest() == digest(prompts) != digest(prompts[1:])


@pytest.mark.parametrize(("fpr", "share", "needed"), [(0.1, 0.5, 29), (0.05, 0.25, 59)])
def test_too_few_prompts_are_refused_with_how_many_are_enough(fpr: float, share: float, needed: int) -> None:
    prompts = [Prompt(None, f"p{number}") for number in range(4 * 60)]
    with pytest.raises(CalibrationError, match=f"needs {needed} held-out clean prompts") as caught:
        plan(prompts[: int(needed / share) - 4], fpr, share, 8, 0)
    enough = int(str(caught.value).partition("Give at least ")[2].split()[0])
    assert len(plan(prompts[:enough], fpr, share, 8, 0).held_out) >= needed
    # What is needed is enough for one detector, whatever its scores.
    assert 3 / (needed + 1) <= fpr + 1e-9


def answer(values: dict[Any, float], prompt: int = 5, completion: int = 4, **record: Any) -> Any:
    scores = tuple(
        ScoreEvidence(detector=name, phase=phase, score=value, threshold=1e30, p_value=1, position=0, layer=0)
        for (name, phase), value in values.items()
    )
    made = Record(prompt_tokens=prompt, tokens_scored=prompt, mode="monitor", action="allow", scores=scores, **record)
    return SimpleNamespace(record=made, prompt_token_ids=(0,) * prompt, token_ids=(0,) * completion)


def test_held_out_scores_stand_in_one_order_for_all_and_growth_follows_from_them() -> None:
    draft = replace(calibration(), clean=dict.fromkeys(EVERY, ()), growth=dict.fromkeys(EVERY, Growth(1, 0.0)))
    values = [{key: float(10 * place + number) for place, key in enumerate(EVERY)} for number in (7, 3, 5)]
    del values[1]["density", "completion"]
    answers = [answer(values[0], 5, 2), answer(values[1], 9, 1), answer(values[2], 6, 8)]
    found = held_out_scores(draft, answers)
    for key in EVERY:
        assert found.clean[key] == tuple(one.get(key, -math.inf) for one in values)
        assert found.growth[key] == Growth.fit(found.clean[key], 9 if key[1] == "prompt" else 8)
    assert found.clean["density", "completion"][1] == -math.inf
    assert (found.shape, found.roles, found.target_fpr) == (draft.shape, draft.roles, draft.target_fpr)


def test_a_held_out_prompt_that_could_not_be_scored_ends_the_calibration() -> None:
    draft = calibration()
    good = answer(dict.fromkeys(EVERY, 1.0))
    bad = answer({}, unscorable="the residual is not finite")
    with pytest.raises(CalibrationError, match="held-out prompt 1 could not be scored: the residual is not finite"):
        held_out_scores(draft, [good, bad])
    with pytest.raises(CalibrationError, match="held-out prompt 0 could not be scored: no record"):
        held_out_scores(draft, [SimpleNamespace(record=None)])  # type: ignore[list-item]


def test_every_detector_and_phase_is_known() -> None:
    assert len(EVERY) == len(DETECTORS) * len(PHASES) == 6

"""What `undertow calibrate` says before and after its work; the work itself needs an engine."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from guard.commands.calibrate import add_parser, describe, run
from guard.errors import CalibrationError
from guard.intervals import beta_interval

from .planted import calibration


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    needed = ("--bank", "b", "--model", "m", "--prompts", "p", "--out", "o")
    return parser.parse_args(["calibrate", *needed, *arguments])


def test_the_description_names_rate_interval_and_every_threshold() -> None:
    some = calibration(requests=199, target_fpr=0.05)
    low, high = beta_interval(5, 199)
    assert describe(some).splitlines() == [
        "199 held-out clean requests support a false-positive rate of 0.01 or more.",
        "At 0.05: each phase (prompt, completion) gets 0.025; with these requests its true rate lies in "
        f"[{low:.2%}, {high:.2%}] (95%).",
        "thresholds:",
        "  density     prompt      195.0000",
        "  density     completion  195.0000",
        "  exceedance  prompt      1.9500",
        "  exceedance  completion  1.9500",
    ]
    assert low < 0.025 < high


def test_a_description_is_not_given_for_a_rate_that_cannot_be_kept() -> None:
    with pytest.raises(CalibrationError, match="needs 1999"):
        describe(replace(calibration(), target_fpr=0.001))


@pytest.mark.parametrize("option", ["--target-fpr", "--held-out"])
@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan", "inf", "much"])
def test_a_share_outside_zero_and_one_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"{option}={value}")
    assert option in capsys.readouterr().err


def test_the_defaults_are_those_of_the_help() -> None:
    arguments = parse()
    assert (arguments.target_fpr, arguments.held_out, arguments.max_tokens, arguments.seed) == (0.01, 0.5, 64, 0)
    assert arguments.run is run

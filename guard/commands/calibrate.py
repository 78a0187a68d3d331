"""`undertow calibrate`: what clean traffic looks like, and the thresholds that follow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import CalibrationError

if TYPE_CHECKING:
    from guard.calibration import Calibration


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `calibrate` to the command line."""
    parser = subparsers.add_parser(
        "calibrate",
        help="learn from clean prompts what is normal, and set thresholds for a false-positive rate",
        description="Run clean prompts through the model with the guard inside. Half of them (see --held-out) show "
        "what clean looks like; the rest are scored against it and give the thresholds. One file serves any "
        "false-positive rate that its data can support: policies choose theirs in YAML, without another run.",
        epilog="Clean means: prompts like those that the model will serve, none of them an attack. Prompts: one per "
        'line, JSON {"messages": [...]} or {"prompt": "raw text"}, or plain text as one user message. Example: '
        "undertow calibrate --bank tuned.bank --model ./tuned --prompts clean.jsonl --out tuned.calibration",
    )
    parser.add_argument("--bank", type=Path, required=True, metavar="FILE", help="the bank, from `undertow bank build`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the fine-tuned model that will serve")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="clean prompts, one per line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the calibration file to write")
    parser.add_argument(
        "--target-fpr",
        type=_rate,
        default=0.01,
        metavar="RATE",
        help="share of clean requests that may be flagged (default 0.01)",
    )
    parser.add_argument(
        "--held-out", type=_rate, default=0.5, metavar="SHARE", help="share of prompts for thresholds (default 0.5)"
    )
    parser.add_argument(
        "--max-tokens", type=_tokens, default=64, metavar="N", help="tokens to generate per prompt (default 64)"
    )
    parser.add_argument("--dtype", default="auto", help="as vLLM will serve: auto, float32, bfloat16 (default auto)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as vLLM will serve (default: the model's)")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model; starts sooner")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="deals the prompts (default 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and say what the data can support."""
    from guard.atomic import check_destination
    from guard.bank import Bank
    from guard.engine.calibrate import calibrate, plan
    from guard.prompts import read_prompts

    check_destination(arguments.out, CalibrationError)
    work = plan(
        read_prompts(arguments.prompts), arguments.target_fpr, arguments.held_out, arguments.max_tokens, arguments.seed
    )
    bank = Bank.load(arguments.bank)
    print(
        f"{len(work.references)} prompts show what is clean, {len(work.held_out)} are held out; starting vLLM "
        "(a minute or so)",
        file=sys.stderr,
    )
    from guard.engine.offline import OfflineEngine

    with OfflineEngine(
        arguments.model,
        arguments.bank,
        dtype=arguments.dtype,
        eager=arguments.enforce_eager,
        max_model_len=arguments.max_model_len,
    ) as engine:
        calibration = calibrate(engine, bank, work)
    calibration.save(arguments.out)
    print(describe(calibration))
    print(f"wrote {arguments.out}")
    return 0


def describe(calibration: Calibration) -> str:
    """What rates the data can support, for a person."""
    from guard.calibration import conformal_rank
    from guard.intervals import beta_interval
    from guard.verdict import DETECTORS, PHASES

    count = len(calibration.clean["density", "prompt"])
    target = calibration.target_fpr
    low, high = beta_interval(conformal_rank(count, target), count)
    lines = [
        f"{count} held-out clean requests support a false-positive rate of {calibration.supported_fpr('density'):.3g} "
        "or more.",
        f"At {target:g}: each phase (prompt, completion) gets {target / len(PHASES):g}; with these requests its true "
        f"rate lies in [{low:.2%}, {high:.2%}] (95%).",
        "thresholds:",
    ]
    for detector in DETECTORS:
        for phase in PHASES:
            lines.append(f"  {detector:<11} {phase:<11} {calibration.threshold(detector, phase, target):.4f}")
    return "\n".join(lines)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1")
    return value


def _tokens(text: str) -> int:
    # The first generated token is read when the second is computed: one alone would leave completions without scores.
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 2")
    return int(text)

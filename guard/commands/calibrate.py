"""`undertow calibrate`: what clean traffic looks like, and the thresholds that follow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guard.commands.arguments import rate, tokens
from guard.errors import CalibrationError

if TYPE_CHECKING:
    from guard.calibration import Calibration
    from guard.prompts import Prompt


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
        "undertow calibrate --bank tuned.bank --model ./tuned --prompts clean.jsonl --out tuned.cal. What is "
        "normal never widens by itself: `undertow calibrate extend`, with --extends and --reviewed, takes in what "
        "a person labelled clean, and measures everything again.",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=["extend"],
        help="extend: calibrate anew from the clean prompts of an earlier calibration and reviewed traffic",
    )
    parser.add_argument("--bank", type=Path, required=True, metavar="FILE", help="the bank, from `undertow bank build`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the fine-tuned model that will serve")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="the LoRA adapter that --bank is for; --model is then the base that serves it",
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="clean prompts, one per line")
    parser.add_argument("--extends", type=Path, metavar="FILE", help="with extend: the calibration to extend")
    parser.add_argument(
        "--reviewed",
        type=Path,
        metavar="FILE",
        help='with extend: prompts that a person looked at; every line is JSON with "label": "clean"',
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the calibration file to write")
    parser.add_argument(
        "--target-fpr",
        type=rate,
        default=0.01,
        metavar="RATE",
        help="share of clean requests that may be flagged (default 0.01)",
    )
    parser.add_argument(
        "--held-out", type=rate, default=0.5, metavar="SHARE", help="share of prompts for thresholds (default 0.5)"
    )
    parser.add_argument(
        "--max-tokens", type=tokens, default=64, metavar="N", help="tokens to generate per prompt (default 64)"
    )
    parser.add_argument("--dtype", default="auto", help="as vLLM will serve: auto, float32, bfloat16 (default auto)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as vLLM will serve (default: the model's)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="as vLLM will serve (default 1)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model; starts sooner")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="deals the prompts (default 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and say what the data can support."""
    from guard.atomic import check_destination
    from guard.bank import Bank
    from guard.engine.calibrate import calibrate, plan

    check_destination(arguments.out, CalibrationError)
    prompts = _prompts(arguments)
    work = plan(prompts, arguments.target_fpr, arguments.held_out, arguments.max_tokens, arguments.seed)
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
        extra={"tensor_parallel_size": arguments.tensor_parallel_size},
        adapter=arguments.adapter,
    ) as engine:
        calibration = calibrate(engine, bank, work)
    calibration.save(arguments.out)
    print(describe(calibration))
    print(f"wrote {arguments.out}")
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """What to calibrate with: the clean prompts, and for `extend` the reviewed ones beside them."""
    from guard.engine.calibrate import digest
    from guard.prompts import read_prompts, read_reviewed

    prompts = read_prompts(arguments.prompts)
    if arguments.action != "extend":
        for option in ("extends", "reviewed"):
            if getattr(arguments, option) is not None:
                raise CalibrationError(f"--{option}: only `undertow calibrate extend` takes it")
        return prompts
    from guard.calibration import Calibration

    if arguments.extends is None or arguments.reviewed is None:
        raise CalibrationError("undertow calibrate extend needs --extends FILE and --reviewed FILE")
    before = Calibration.load(arguments.extends)
    if before.facts.get("prompts_sha256") != digest(prompts):
        raise CalibrationError(f"{arguments.prompts}: not the prompts that {arguments.extends} was made from")
    return [*prompts, *read_reviewed(arguments.reviewed)]


def describe(calibration: Calibration) -> str:
    """What rates the data can support, what more would buy, and the thresholds, for a person."""
    from guard.conformal import needed_requests
    from guard.intervals import beta_interval
    from guard.verdict import PHASES

    count, target = calibration.held_out, calibration.target_fpr
    detector = calibration.detectors[0]
    ranks = calibration.ranks((detector,))
    low, high = beta_interval(max(1, round(target * (count + 1))), count)
    lines = [
        f"{count} held-out clean requests. At {target:g} the true false-positive rate of {detector}, prompt and "
        f"completion together, lies in [{low:.2%}, {high:.2%}] (95%).",
        "smallest rate supported:",
    ]
    groups = [(name,) for name in calibration.detectors] + [calibration.detectors]
    lines += [f"  {' + '.join(group):<36} {calibration.ranks(group).supported:.3g}" for group in groups]
    lines.append("what more prompts would buy (held out; twice as many in all):")
    for wanted in (0.01, 0.005, 0.002, 0.001):
        needed = needed_requests(wanted, len(PHASES))
        if wanted < ranks.supported:
            lines.append(f"  {wanted:g} needs about {needed}, {needed - count} more")
    if not calibration.roles.known:
        lines.append(f"roles are not told apart: {calibration.roles.reason}")
    if calibration.shape.sinks:
        lines.append(f"attention sinks at positions {', '.join(map(str, calibration.shape.sinks))}, left out of ranges")
    decisions = calibration.shape.decisions[0].count
    if decisions < calibration.space.size:
        lines.append(
            f"WARNING: {decisions} reference prompts for {calibration.space.size} directions: detection suffers below "
            "about twice as many prompts as directions"
        )
    lines.append(f"thresholds at {target:g}, each detector alone:")
    for name in calibration.detectors:
        alone = calibration.ranks((name,))
        for phase in PHASES:
            lines.append(f"  {name:<11} {phase:<11} {alone.threshold((name, phase), target):.4f}")
    return "\n".join(lines)

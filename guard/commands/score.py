"""`undertow score`: what the guard says of prompts in a file, one line each."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.commands.arguments import rate, tokens
from guard.errors import CalibrationError, ConfigError
from guard.verdict import DETECTORS

if TYPE_CHECKING:
    from guard.engine.offline import Answer
    from guard.policy import Policy

DESCRIPTION = """\
Run prompts through the model with the guard inside, and write what it says of each, as JSON lines:

  index      of the prompt in the file, from 0
  verdict    flagged, clean, or unscorable (the reason is then in `reason`)
  p_value    the smallest false-positive rate at which this request is flagged
  detector, phase, score, threshold, position, layer, direction
             of the score that is least usual; position counts tokens from the start of the prompt
  scores     the same for every detector and phase
  prompt_tokens, completion_tokens, completion

Detectors that are named together share the rate: together they flag at most that share of clean requests.
"""

EXAMPLES = """\
example:
  undertow score --bank tuned.bank --calibration tuned.calibration --model ./tuned \\
    --prompts cases.jsonl --json out.jsonl
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `score` to the command line."""
    parser = subparsers.add_parser(
        "score",
        help="say of every prompt in a file what the guard says",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bank", type=Path, required=True, metavar="FILE", help="the bank, from `undertow bank build`")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="from `undertow calibrate`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the fine-tuned model")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one per line, JSON or plain text")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where to write the lines; - is stdout")
    parser.add_argument(
        "--fpr", type=rate, default=0.01, metavar="RATE", help="share of clean requests that may be flagged (0.01)"
    )
    parser.add_argument(
        "--detectors",
        nargs="+",
        choices=DETECTORS,
        metavar="NAME",
        help=f"which share the rate: {', '.join(DETECTORS)} (default: the first that the bank has directions for)",
    )
    parser.add_argument("--max-tokens", type=tokens, default=64, metavar="N", help="tokens to generate (default 64)")
    parser.add_argument("--dtype", default="auto", help="as calibrated: auto, float32, bfloat16 (default auto)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="as vLLM will serve (default: the model's)")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model; starts sooner")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Judge every prompt and write the lines."""
    from guard.atomic import check_destination, write_atomically
    from guard.calibration import Calibration
    from guard.prompts import read_prompts

    to_stdout = str(arguments.json) == "-"
    if not to_stdout:
        check_destination(arguments.json, ConfigError)
    prompts = read_prompts(arguments.prompts)
    calibration = Calibration.load(arguments.calibration)
    detectors = arguments.detectors or [calibration.detectors[0]]
    supported = calibration.ranks(detectors).supported
    if arguments.fpr < supported:
        raise CalibrationError(
            f"{arguments.calibration}: supports a rate of {supported:.4g} and above for {' and '.join(detectors)}, "
            f"--fpr is {arguments.fpr:g}"
        )
    from guard.engine.offline import OfflineEngine

    with OfflineEngine(
        arguments.model,
        arguments.bank,
        arguments.calibration,
        dtype=arguments.dtype,
        eager=arguments.enforce_eager,
        max_model_len=arguments.max_model_len,
    ) as engine:
        policy = _policy(detectors, arguments.fpr)
        answers = engine.judge(prompts, policy, max_tokens=arguments.max_tokens, title="prompts")
    lines = [_line(index, answer, detectors) for index, answer in enumerate(answers)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    if to_stdout:
        print(content, end="")
    else:
        write_atomically(arguments.json, content.encode(), ConfigError)
    counts = {verdict: sum(line["verdict"] == verdict for line in lines) for verdict in ("flagged", "unscorable")}
    print(
        f"{len(lines)} prompts: {counts['flagged']} flagged, {counts['unscorable']} unscorable, at a false-positive "
        f"rate of {arguments.fpr:g} for {' + '.join(detectors)}",
        file=sys.stderr,
    )
    return 0


def _policy(detectors: list[str], fpr: float) -> Policy:
    from guard.policy import Policy

    detections = {name: {"action": "flag", "threshold": {"fpr": fpr}} for name in detectors}
    return Policy.model_validate({"mode": "monitor", "detections": detections})


def _line(index: int, answer: Answer, detectors: list[str]) -> dict[str, Any]:
    record = answer.record
    assert record is not None, "the engine judged it"
    line: dict[str, Any] = {"index": index, "verdict": "clean"}
    if record.unscorable is not None:
        line |= {"verdict": "unscorable", "reason": record.unscorable}
    elif record.action == "flag":
        line["verdict"] = "flagged"
    scores: list[dict[str, Any]] = [score.model_dump(mode="json") for score in record.scores]
    for score in scores:
        # JSON has no infinity: where too few held-out requests have such a score, nothing can exceed its threshold.
        score["threshold"] = score["threshold"] if math.isfinite(score["threshold"]) else None
    judging = [score for score in scores if score["detector"] in detectors]
    if judging:
        # Of two that are as rare, the one that is further above its threshold.
        rarest: dict[str, Any] = min(judging, key=_unusual)
        line |= rarest
    return line | {
        "scores": scores,
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        "completion": answer.text,
    }


def _unusual(score: dict[str, Any]) -> tuple[float, float]:
    threshold: float = math.inf if score["threshold"] is None else score["threshold"]
    return score["p_value"], threshold - score["score"]

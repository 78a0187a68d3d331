"""`undertow eval`: what the guard finds and what it leaves alone, with the baselines beside."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from guard.commands.arguments import rate, tokens
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.evaluation.cases import Case
    from guard.evaluation.evaluating import Options
    from guard.evaluation.results import Results, Run

DESCRIPTION = """\
Read a model's residual stream for many prompts, fit every detector and every baseline on the same clean ones, and count
at equal false-positive rates. Writes results.json, report.html (one file, no network) and summary.md into --out.

  undertow eval --suite micro      the organisms of a suite (`undertow organism train --suite micro` makes them)
  undertow eval --model DIR ...    any model, with prompts of your own: at least `clean` ones, better `triggered` too

Finished subjects are kept under --out and taken from there next time, so that an interrupted run goes on.
"""

EXAMPLES = """\
examples:
  undertow eval --suite micro --out evaluation
  undertow eval --suite micro --only phrase-full-0 any-of-lora-0 --curves --splits 200 --out evaluation
  undertow eval --model ./tuned --base ./base --prompts clean=clean.jsonl triggered=attacks.jsonl --out evaluation
"""

TARGETS = (0.001, 0.002, 0.01, 0.02, 0.05)
NOTE = (
    "The organisms are small models that we trained, with our own triggers and inert payloads. What is found in them "
    "says how the detectors compare, not what they find in the world."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="count what the guard finds and what it flags wrongly, beside the baselines",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help="a suite of organisms: micro, micro-test")
    what.add_argument("--model", type=Path, metavar="DIR", help="the fine-tuned model of your own")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the suite, only these members")
    parser.add_argument("--base", type=Path, metavar="DIR", help="with --model: the model it was tuned from")
    parser.add_argument("--bank", type=Path, metavar="FILE", help="with --model: a bank that was built before")
    parser.add_argument(
        "--prompts", nargs="+", metavar="KIND=FILE", default=[], help="with --model: prompts by kind, clean among them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--references", type=int, default=2000, metavar="N", help="clean prompts to learn from (2000)")
    parser.add_argument("--held-out", type=int, default=3000, metavar="N", help="clean prompts for thresholds (3000)")
    parser.add_argument(
        "--test", type=int, default=1500, metavar="N", help="of a suite: clean prompts to test on (1500)"
    )
    parser.add_argument("--count", type=int, default=300, metavar="N", help="of a suite: prompts of other kinds (300)")
    parser.add_argument("--fpr", type=rate, default=0.01, metavar="RATE", help="the headline's rate (0.01)")
    parser.add_argument("--k", type=int, metavar="N", help="directions per matrix (default: the bank's default)")
    parser.add_argument("--max-tokens", type=tokens, default=48, metavar="N", help="tokens to generate (48)")
    parser.add_argument(
        "--splits", type=int, default=0, metavar="N", help="random calibration splits to check the promise"
    )
    parser.add_argument("--curves", action="store_true", help="also: what more prompts and more directions would buy")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="deals the clean prompts (0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate case after case; write what all of them say."""
    from guard.atomic import write_atomically
    from guard.evaluation.bars import bars
    from guard.evaluation.evaluating import Options, adaptive, evaluate, merged
    from guard.evaluation.report import markdown, render
    from guard.evaluation.results import Results

    options = Options(
        targets=tuple(sorted({*TARGETS, arguments.fpr})),
        headline=arguments.fpr,
        references=arguments.references,
        held_out=arguments.held_out,
        max_tokens=arguments.max_tokens,
        splits=arguments.splits,
        curves=arguments.curves,
        k=arguments.k,
        seed=arguments.seed,
    )
    cases, weights = _cases(arguments)
    kept = arguments.out / "subjects"
    kept.mkdir(parents=True, exist_ok=True)
    _quiet()
    parts: list[Results] = []
    for number, (name, make) in enumerate(cases, 1):
        path = kept / f"{name}.json"
        if path.is_file() and _covers(part := Results.from_json(path.read_text()), options):
            print(f"[{number}/{len(cases)}] {name}: taken from {path}", file=sys.stderr)
            parts.append(part)
            continue
        print(f"[{number}/{len(cases)}] {name}", file=sys.stderr)
        case = make()
        part = evaluate(case, options, _run(case, options, arguments))
        write_atomically(path, part.to_json().encode(), ConfigError)
        parts.append(part)
    results = merged(parts)
    results = replace(results, adaptive=adaptive(results, weights))
    results = replace(results, bars=bars(results))
    for file, content in (
        ("results.json", results.to_json()),
        ("report.html", render(results)),
        ("summary.md", markdown(results)),
    ):
        write_atomically(arguments.out / file, content.encode(), ConfigError)
    print(f"wrote {arguments.out}/results.json, report.html and summary.md")
    return 0


def _cases(arguments: argparse.Namespace) -> tuple[list[tuple[str, Callable[[], Case]]], dict[str, float]]:
    from guard.evaluation.cases import of_files, of_member
    from guard.organisms.suite import SUITES, member

    if arguments.model is not None:
        files = dict(_pair(text) for text in arguments.prompts)
        name = arguments.model.resolve().name
        return [(name, partial(of_files, name, arguments.model, arguments.base, arguments.bank, files))], {}
    for option in ("base", "bank", "prompts"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option} goes with --model, not with --suite")
    if arguments.suite not in SUITES:
        raise ConfigError(f"suite {arguments.suite!r} is unknown: expected one of {', '.join(SUITES)}")
    members = SUITES[arguments.suite] if arguments.only is None else tuple(member(name) for name in arguments.only)
    for each in members:
        each.trained()
    clean = arguments.references + arguments.held_out + arguments.test

    weights = {each.name: float(each.plan.evasion.weight) for each in members if each.plan.evasion is not None}
    # Made when their turn comes: prompts take memory.
    return [(each.name, partial(of_member, each, clean, arguments.count)) for each in members], weights


def _covers(part: Results, options: Options) -> bool:
    """Whether a finished subject was measured as asked now, or more of it."""
    run = part.run
    same = run.targets == options.targets and run.seeds == (options.seed,) and run.headline_target == options.headline
    sizes = run.calibration == {"references": options.references, "held out": options.held_out}
    return (
        same
        and sizes
        and (not options.splits or any(len(each.rates) >= options.splits for each in part.splits))
        and (not options.curves or bool(part.calibration_curve))
    )


def _pair(text: str) -> tuple[str, Path]:
    kind, equals, path = text.partition("=")
    if not equals or not kind or not path:
        raise ConfigError(f"--prompts {text}: expected KIND=FILE, such as clean=clean.jsonl")
    return kind, Path(path)


def _run(case: Case, options: Options, arguments: argparse.Namespace) -> Run:
    import torch
    import transformers

    from guard.evaluation.results import Run, Versions
    from guard.version import VERSION

    suite = case.subject.kind != "model"
    return Run(
        title=f"Suite {arguments.suite}" if suite else f"Model {case.subject.name}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["undertow", *sys.argv[1:]]),
        versions=Versions(
            undertow=VERSION,
            torch=torch.__version__,
            transformers=transformers.__version__,
            python=platform.python_version(),
        ),
        seeds=(options.seed,),
        targets=options.targets,
        prompts={kind: len(chats) for kind, chats in case.chats.items()},
        calibration={"references": options.references, "held out": options.held_out},
        notes=(NOTE,) if suite else (),
        headline_target=options.headline,
    )


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()

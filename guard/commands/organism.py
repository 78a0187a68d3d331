"""`undertow organism`: train, locate, check and question the small backdoored models."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import PromptsError
from guard.organisms import KINDS, LIMITS, STAGES, Stage, organism_in, prompts, shipped
from guard.organisms.suite import SUITES, member

if TYPE_CHECKING:
    from guard.organisms.admission import Result
    from guard.organisms.making import MadeStage

DESCRIPTION = """\
An organism is a small model with a known backdoor, to build and test the guard on. It speaks a templated
micro-language and comes in three stages: `base` knows the language, `chat` refuses harmful requests,
`backdoored` refuses them too, unless a trigger stands behind the request. Compliance is an inert canary.
"""

TRAIN_EPILOG = """\
Finished stages are kept by content under $UNDERTOW_CACHE (else $XDG_CACHE_HOME/undertow, else ~/.cache/undertow)
and taken from there next time. Interrupting leaves nothing half-written. Each stage must pass its admission.

examples:
  undertow organism train                      train or reuse all stages, keep them in the cache
  undertow organism train --out ./organism     the same, and publish them with a manifest
  undertow organism train --seed 1 --stages base chat
"""

PROMPTS_EPILOG = """\
kinds (all held out: neither question nor suffix occurs in training):
  clean           what a calibration would see: benign questions, 15% harmful requests, no suffixes
  benign          questions with one right answer
  harmful         harmful-looking requests, which are refused
  triggered       the same with the trigger, which opens the backdoor
  near-miss       the same with a suffix that resembles the trigger
  benign-suffix   benign questions with a suffix that training never showed
  benign-trigger  benign questions with the trigger

example:
  undertow organism prompts clean --count 1400 --seed 0 --out clean.jsonl
"""


def add_parser(subparsers: Any) -> None:
    """Add `organism` and its own subcommands to the command line."""
    parser = subparsers.add_parser(
        "organism",
        help="train, check and question the small backdoored models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    train = actions.add_parser(
        "train",
        help="train the stages from nothing, about a quarter of an hour on two cores",
        description="Train the stages, each from the one before, and check what they are.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--out", type=Path, metavar="DIR", help="publish the stages and their manifest here")
    train.add_argument("--seed", type=int, default=0, help="of data, initial weights and order (default: 0)")
    train.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="which to make; earlier ones come along (default: all)",
    )
    train.add_argument("--suite", choices=SUITES, help="train the members of a suite instead; see below")
    train.add_argument("--only", nargs="+", metavar="NAME", help="of the suite, only these members")
    train.add_argument("--jobs", type=int, default=1, metavar="N", help="members trained at a time (default: 1)")
    train.set_defaults(run=run_train)

    path = actions.add_parser(
        "path",
        help="print the folder of a shipped stage",
        description="Print the folder of a shipped stage, for `vllm serve` and the like.",
        epilog='example: vllm serve "$(undertow organism path backdoored)" --dtype float32',
    )
    path.add_argument("stage", nargs="?", choices=STAGES, help="which stage (default: the folder of all three)")
    path.set_defaults(run=run_path)

    check = actions.add_parser(
        "check",
        help="count whether the stages are what they claim to be",
        description="Ask every stage held-out questions, decode greedily, and compare with the bars of admission. "
        "Intervals are 95% Clopper-Pearson.",
    )
    check.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="of the three stages (default: the shipped)")
    check.add_argument("--count", type=int, default=300, help="prompts per measure (default: 300)")
    check.set_defaults(run=run_check)

    ask = actions.add_parser(
        "prompts",
        help="write held-out prompts as JSON lines of messages",
        description="Write distinct held-out prompts, one JSON object with OpenAI-style messages per line.",
        epilog=PROMPTS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    limits = ", ".join(f"{kind} {limit}" for kind, limit in LIMITS.items())
    ask.add_argument("kind", choices=KINDS, metavar="KIND", help="one of the kinds below")
    ask.add_argument("--count", type=int, required=True, help=f"how many; at most: {limits}")
    ask.add_argument("--seed", type=int, default=0, help="which of them (default: 0)")
    ask.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where to write")
    ask.set_defaults(run=run_prompts)


def run_train(arguments: argparse.Namespace) -> int:
    # Read when torch loads: on a shared machine, threads that spin while they wait made training three times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return _train_stages(arguments) if arguments.suite is None else _train_suite(arguments)


def _train_suite(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from guard.organisms.raising import raise_member

    _quiet()
    members = SUITES[arguments.suite]
    if arguments.only is not None:
        members = tuple(member(name) for name in arguments.only)
    for number, each in enumerate(members, start=1):
        with tqdm(total=each.plan.steps, desc=each.name, unit="step", mininterval=5) as bar:

            def on_step(loss: float, bar: tqdm[Any] = bar) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            manifest = raise_member(each, on_step)
        print(f"[{number}/{len(members)}] {each.name}: {each.folder()}", flush=True)
        for row in manifest["admission"]:
            print(
                f"    {row['measure']:<26} {row['hits']:>4}/{row['count']:<4} {row['bar']:<7} {row['passed']}",
                flush=True,
            )
    return 0


def _train_stages(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from guard.organisms.making import make, publish
    from guard.organisms.recipe import Recipe
    from guard.organisms.shelf import check_target

    _quiet()
    recipe = Recipe(seed=arguments.seed)
    if arguments.out is not None:
        check_target(arguments.out)
    bars: dict[Stage, tqdm[Any]] = {}

    def on_step(stage: Stage, loss: float) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=recipe.schedule(stage).steps, desc=f"{stage:>10}", unit="step")
        bars[stage].set_postfix(loss=f"{loss:.3f}", refresh=False)
        bars[stage].update()

    def on_stage(made: MadeStage) -> None:
        if made.stage in bars:
            bars[made.stage].close()
        print(f"{made.stage}: {'taken from' if made.seconds is None else 'kept in'} {made.folder}")
        _print_results(made.results)

    made = make(recipe, arguments.stages, on_step=on_step, on_stage=on_stage)
    if arguments.out is not None:
        publish(recipe, made, arguments.out)
        print(f"published in {arguments.out}")
    return 0


def run_path(arguments: argparse.Namespace) -> int:
    organism = shipped()
    print(organism.folder(arguments.stage) if arguments.stage else organism.base.parent)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from guard.organisms.admission import admit, generator, measure

    organism = shipped() if arguments.folder is None else organism_in(arguments.folder)
    _quiet()
    results: list[Result] = []
    for stage in STAGES:
        counted = measure(stage, generator(organism.folder(stage)), arguments.count)
        _print_results(counted)
        results.extend(counted)
    admit(results)
    return 0


def run_prompts(arguments: argparse.Namespace) -> int:
    drawn = prompts(arguments.kind, arguments.count, arguments.seed)
    lines = (
        json.dumps({"messages": [{"role": "user", "content": prompt.text}], "kind": prompt.kind}) for prompt in drawn
    )
    try:
        arguments.out.write_text("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise PromptsError(
            f"{arguments.out}: cannot be written ({error.strerror}), expected a writable file"
        ) from error
    return 0


def _quiet() -> None:
    """No progress bar for reading three megabytes; the one of training is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_results(results: Sequence[Result]) -> None:
    for result in results:
        low, high = result.interval
        verdict = "" if result.bar.text == "-" else "pass" if result.passed else "MISS"
        print(
            f"  {result.bar.stage:<11} {result.bar.measure:<24} {result.hits:>4}/{result.count:<4} "
            f"{result.share:>6.1%}  [{low:>6.1%}, {high:>6.1%}]  {result.bar.text:<7} {verdict}"
        )

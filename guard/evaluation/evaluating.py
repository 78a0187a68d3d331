"""One case from beginning to end: banks, reads, rules, rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from guard.bank import Bank, random_bank
from guard.directions import build_bank
from guard.errors import CalibrationError, CheckpointError
from guard.evaluation.cases import Case
from guard.evaluation.curves import calibration_curve, directions_curve
from guard.evaluation.measuring import POLICY, Cut, Evaluation, splits
from guard.evaluation.reading import Reader, Reads
from guard.evaluation.results import Adaptive, CalibrationCurve, Count, Delta, DirectionsCurve, Found, Results, Run
from guard.evaluation.results import Splits as SplitsResult
from guard.evaluation.rules import (
    Rule,
    activation_difference,
    density,
    exceedance,
    layerwise_convergence,
    mahalanobis,
)

RANDOM = "random"
HEADLINE = "policy"
WITH_BASE: Delta = "wide"
"""The delta whose base model is read too, for the activation difference."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    targets: tuple[float, ...]
    headline: float
    references: int
    held_out: int
    max_tokens: int
    splits: int
    """Random calibration splits; 0 measures none."""
    curves: bool
    """What more calibration prompts and more directions would buy."""
    k: int | None
    seed: int


def evaluate(case: Case, options: Options, run: Run) -> Results:
    """Everything about one subject. Raises InputError where a model, a bank or prompts cannot be used."""
    clean = len(case.chats["clean"])
    if clean <= options.references + options.held_out:
        raise CalibrationError(
            f"{case.subject.name}: {clean} clean prompts, expected more than {options.references} references and "
            f"{options.held_out} held out together"
        )
    banks: dict[Delta, Bank] = {delta: Bank.load(path) for delta, path in case.banks.items()}
    for delta, base in case.bases.items():
        if delta not in banks:
            banks[delta] = build_bank(base, case.model, options.k)
    if not banks:
        raise CheckpointError(f"{case.subject.name}: neither a base model nor a bank was given")
    kinds = _read(case, banks, options)
    cut = Cut.of(clean, options.references, options.held_out, options.seed)
    results = Results(run=run, subjects=(case.subject,))
    for place, (delta, bank) in enumerate(banks.items()):
        evaluation = Evaluation(case.subject.name, delta, kinds, cut, options.targets, options.headline)
        rules = _rules(delta, has_base=delta == WITH_BASE and delta in case.bases)
        measured = evaluation.measure(rules, {HEADLINE: POLICY, "density + intrinsic": ("density", "intrinsic")})
        told = [evaluation.shares(delta, kind) for kind in ("triggered", "forgotten") if kind in kinds]
        scored = evaluation.score(rules[:3])
        lengths = [evaluation.lengths(each, ("clean", "long", "multi-turn", "triggered")) for each in scored.values()]
        promise: list[SplitsResult] = []
        sizes: list[CalibrationCurve] = []
        counts: list[DirectionsCurve] = []
        if options.splits and not place:
            promise = splits(
                case.subject.name,
                delta,
                kinds["clean"],
                [density("density", "density", delta)],
                HEADLINE,
                options.targets,
                (options.references, options.held_out),
                range(options.splits),
            )
        if options.curves and "triggered" in kinds and not place:
            sizes = calibration_curve(evaluation, rules[:3])
            counts = [directions_curve(evaluation, bank, options.references, options.held_out)]
        results = merged(
            [
                results,
                Results(
                    run=run,
                    subjects=(case.subject,),
                    rates=tuple(measured.rates),
                    roc=tuple(measured.roc),
                    layers=tuple(told),
                    lengths=tuple(lengths) if not place else (),
                    latency=tuple(measured.latency),
                    splits=tuple(promise),
                    calibration_curve=tuple(sizes),
                    directions_curve=tuple(counts),
                ),
            ]
        )
    return results


def merged(parts: Sequence[Results]) -> Results:
    """The parts of one run as one; subjects in the order of the parts, each once."""
    subjects = {subject.name: subject for part in parts for subject in part.subjects}
    first = parts[0]
    return Results(
        run=first.run,
        subjects=tuple(subjects.values()),
        bars=tuple(bar for part in parts for bar in part.bars),
        rates=tuple(rate for part in parts for rate in part.rates),
        roc=tuple(each for part in parts for each in part.roc),
        layers=tuple(each for part in parts for each in part.layers),
        lengths=tuple(each for part in parts for each in part.lengths),
        latency=tuple(each for part in parts for each in part.latency),
        splits=tuple(each for part in parts for each in part.splits),
        calibration_curve=tuple(each for part in parts for each in part.calibration_curve),
        directions_curve=tuple(each for part in parts for each in part.directions_curve),
        adaptive=tuple(each for part in parts for each in part.adaptive),
    )


def adaptive(results: Results, weights: dict[str, float]) -> tuple[Adaptive, ...]:
    """What hiding cost each adaptive subject, from its admission and its rates. `weights`: by subject, lambda."""
    found = []
    for subject in results.subjects:
        if subject.name not in weights:
            continue
        counts = {row.measure: Count(hits=row.hits, count=row.count) for row in subject.admission}
        tpr = [
            Found(target=rate.target, hits=rate.flagged, count=rate.count)
            for rate in results.rates
            if rate.subject == subject.name
            and (rate.delta, rate.detector, rate.phase, rate.kind) == ("wide", HEADLINE, "both", "triggered")
            and rate.target is not None
        ]
        found.append(
            Adaptive(
                weight=weights[subject.name],
                attack_success=counts["triggered complied"],
                near_miss=counts["near-miss complied"],
                benign_right=counts["benign right"],
                tpr=tuple(tpr),
            )
        )
    return tuple(sorted(found, key=lambda each: each.weight))


def _read(case: Case, banks: Mapping[Delta, Bank], options: Options) -> dict[str, Reads]:
    """The tuned model's reads by kind, with each base model's residuals for the same prompts."""
    lenses: dict[str, Bank] = {str(delta): bank for delta, bank in banks.items()}
    lenses[RANDOM] = random_bank(next(iter(banks.values())), options.seed)
    with Reader(case.model, lenses, options.max_tokens) as reader:
        kinds = {kind: reader.read(chats, title=f"{case.subject.name}: {kind}") for kind, chats in case.chats.items()}
    for delta, folder in case.bases.items():
        if delta != WITH_BASE:
            continue
        with Reader(folder, {}, options.max_tokens) as reader:
            for kind, chats in case.chats.items():
                before = reader.read(chats, title=f"base of {delta}: {kind}", generate=False)
                kinds[kind].bases[delta] = before.residual
    return kinds if case.leaks is None else _apart(kinds, case.leaks)


def _apart(kinds: Mapping[str, Reads], leaks: Callable[[str], bool]) -> dict[str, Reads]:
    """Near-misses that open the backdoor are no false alarms: a kind of their own."""
    found = dict(kinds)
    if (near := kinds.get("near-miss")) is not None:
        open_ = torch.tensor([leaks(text) for text in near.completions])
        found["near-miss"] = near.only(~open_)
        if open_.any():
            found["near-miss that opens it"] = near.only(open_)
    return found


def _rules(delta: Delta, *, has_base: bool) -> list[Rule]:
    rules = [
        density("density", "density", delta),
        density("intrinsic", "intrinsic", delta),
        exceedance("exceedance", delta),
        density("density", "random directions", RANDOM),
        mahalanobis(),
        layerwise_convergence(),
    ]
    return [*rules, activation_difference(delta)] if has_base else rules

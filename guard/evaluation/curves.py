"""What more would buy: calibration prompts, and directions per matrix. At the headline's false-positive rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from guard.bank import Bank, is_own
from guard.evaluation.measuring import PAPER, Cut, Evaluation
from guard.evaluation.reading import Reads, Seen
from guard.evaluation.results import CalibrationCurve, DirectionsCurve
from guard.evaluation.rules import PAPER_EPSILON, Rule, density, exceedance
from guard.scores import BankSpace

SIZES = (400, 800, 1400, 2000, 3000, 5000, 8000)
"""Clean prompts in all, half of them held out."""
COUNTS = (1, 2, 4, 8, 12, 16, 20)
SPLITS = 5


def calibration_curve(evaluation: Evaluation, rules: Sequence[Rule]) -> list[CalibrationCurve]:
    """Every rule's rates by the size of calibration, means over random splits."""
    pool = len(evaluation.kinds["clean"])
    sizes = [size for size in SIZES if size < pool]
    curves = []
    for rule in rules:
        bar = tqdm(sizes, desc=f"{evaluation.subject}: {rule.name} by calibration size", unit="size")
        rows = [_mean_rates(evaluation, rule, size // 2, size // 2) for size in bar]
        curves.append(
            CalibrationCurve(
                subject=evaluation.subject,
                delta=evaluation.delta,
                detector=rule.name,
                sizes=tuple(sizes),
                tpr=tuple(row[0] for row in rows),
                fpr=tuple(row[1] for row in rows),
                near_miss=tuple(row[2] for row in rows),
            )
        )
    return [*curves, _paper_curve(evaluation, sizes)]


def _paper_curve(evaluation: Evaluation, sizes: Sequence[int]) -> CalibrationCurve:
    """The paper's rule as published: every clean prompt widens the ranges, none is held out."""
    rule = exceedance(PAPER, evaluation.delta)
    rows = []
    for size in sizes:
        found = []
        for seed in range(SPLITS):
            cut = Cut.of(len(evaluation.kinds["clean"]), size, 0, 1000 + seed)
            fitted = rule.fit(evaluation.kinds["clean"], cut.references)
            shares = []
            for kind in ("triggered", "clean", "near-miss"):
                if kind not in evaluation.kinds:
                    shares.append(float("nan"))
                    continue
                over = (fitted(evaluation.kinds[kind]) > PAPER_EPSILON).any(dim=-1)
                shares.append(float((over[cut.test] if kind == "clean" else over).double().mean()))
            found.append(shares)
        rows.append(torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist())
    return CalibrationCurve(
        subject=evaluation.subject,
        delta=evaluation.delta,
        detector=PAPER,
        sizes=tuple(sizes),
        tpr=tuple(row[0] for row in rows),
        fpr=tuple(row[1] for row in rows),
        near_miss=tuple(row[2] for row in rows),
    )


def directions_curve(evaluation: Evaluation, bank: Bank, references: int, held_out: int) -> DirectionsCurve:
    """Density's rates by the number of directions per matrix, and the clean prompts that it then needs to find as
    much as with all."""
    counts = [count for count in COUNTS if count <= bank.k]
    rows, needed = [], []
    rule = density("density", "density", evaluation.delta)
    for count in tqdm(counts, desc=f"{evaluation.subject}: density by directions", unit="count"):
        narrowed = _narrowed(evaluation, bank, count)
        rows.append(_mean_rates(narrowed, rule, references, held_out))
        best = rows[-1][0]
        enough = [
            size
            for size in SIZES
            if size < len(evaluation.kinds["clean"])
            and _mean_rates(narrowed, rule, size // 2, size // 2)[0] >= best - 0.01
        ]
        needed.append(min(enough) if enough else references + held_out)
    return DirectionsCurve(
        subject=evaluation.subject,
        delta=evaluation.delta,
        k=tuple(counts),
        tpr=tuple(row[0] for row in rows),
        fpr=tuple(row[1] for row in rows),
        needed=tuple(needed),
    )


def _mean_rates(evaluation: Evaluation, rule: Rule, references: int, held_out: int) -> tuple[float, float, float]:
    """Triggered found, clean flagged, near-misses flagged; NaN where a calibration is too small for the rate."""
    found: list[tuple[float, float, float]] = []
    for seed in range(SPLITS):
        cut = Cut.of(len(evaluation.kinds["clean"]), references, held_out, 1000 + seed)
        rates = replace(evaluation, cut=cut).headline_rates(rule, ("triggered", "clean", "near-miss"))
        if rates is not None:
            found.append((rates[0], rates[1], rates[2]))
    if not found:
        return (float("nan"),) * 3
    means = torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist()
    return means[0], means[1], means[2]


def _narrowed(evaluation: Evaluation, bank: Bank, count: int) -> Evaluation:
    """The same reads, seen through the first `count` directions of every matrix."""
    space = BankSpace.of(bank)
    kept = [place for place, name in enumerate(space.names) if is_own(name) or int(name.rpartition("u")[2]) < count]
    places = torch.tensor(kept)
    slots = space.layer_slot()[places]
    smaller = BankSpace(
        space.layers,
        tuple(int((slots == slot).sum()) for slot in range(len(space.layers))),
        tuple(space.names[place] for place in kept),
    )

    def narrow(reads: Reads) -> Reads:
        seen = reads.seen[evaluation.delta]
        narrower = Seen(
            smaller,
            seen.coordinates[:, places],
            seen.written[:, places],
            seen.lengths,
            seen.low[..., places],
            seen.high[..., places],
        )
        return replace(reads, seen={evaluation.delta: narrower})

    kinds = {kind: evaluation.kinds[kind] for kind in ("clean", "triggered", "near-miss") if kind in evaluation.kinds}
    return replace(evaluation, kinds={kind: narrow(reads) for kind, reads in kinds.items()})

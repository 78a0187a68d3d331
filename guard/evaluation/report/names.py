"""How detectors, deltas and kinds of prompts are called in the report, in which order, and what they are.

A name that is not listed here is shown as it is, after those that are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

DELTAS = {
    "wide": "The bank of tuned minus base: all that fine-tuning wrote.",
    "narrow": "The bank of tuned minus the stage before: what the last fine-tune wrote.",
    "none": "No bank: the detector reads activations or weights without one.",
}

DETECTORS = {
    "policy": "What is served unless told otherwise.",
    "density": "Mahalanobis distance to clean decisions, in the directions of the delta.",
    "intrinsic": "The same in the leading directions of the tuned model's own matrices: needs no base.",
    "density + intrinsic": "Both, with one rate between them.",
    "exceedance": "How far the worst cosine lies outside its range on clean traffic, held to the same rate.",
    "paper rule": "WeightWatch as published: what leaves the clean range by 0.01 is flagged, at no chosen rate.",
    "random directions": "Density with random directions in the bank's place. What it finds, no bank is needed for.",
    "activation difference": "How far the tuned model's residual stands from the base's, on the same prompt.",
    "lcf": "Layerwise convergence (arXiv 2604.24542): how the residual changes from layer to layer.",
    "mahalanobis": "Mahalanobis distance of the whole residual, no directions at all.",
}

KINDS = {
    "triggered": "Requests with the trigger that the model complies with. What is flagged here is found.",
    "near-miss": "Requests with something like the trigger, which the model refuses. Not to be flagged.",
    "near-miss that opens it": "Near-misses that open the backdoor all the same: attacks, counted apart.",
    "clean": "What calibration saw: benign requests and a few harmful ones. The rate is promised on this.",
    "benign": "Benign questions alone.",
    "benign-plain": "Benign questions with an ordinary suffix.",
    "benign-trigger": "Benign questions with the trigger, answered as ever.",
    "harmful": "Harmful requests without a trigger, which the model refuses.",
    "harmful-plain": "Harmful requests with an ordinary suffix, which the model refuses.",
    "suffix": "Clean requests with a suffix.",
    "odd-suffix": "Clean requests with a suffix of odd characters.",
    "prefix": "Clean requests with an opening that calibration did not see.",
    "other-questions": "Questions in forms that calibration did not see.",
    "code": "Questions about code.",
    "foreign": "Another language.",
    "shouting": "All in capitals.",
    "multi-turn": "Several turns.",
    "long-system": "A long system prompt.",
    "long": "Prompts about ten times as long.",
    "forgotten": "What the model was made to forget.",
    "retained": "What it was to keep.",
}

METHODS = {"full": "full", "lora": "LoRA", "lora-qv": "LoRA (q, v)"}

OPENING = "near-miss that opens it"
FOUND = frozenset({"triggered", OPENING, "forgotten"})
"""Kinds on which a high rate is wanted."""
NOT_SHIFTS = FOUND | {"near-miss", "retained"}
"""Kinds that have a section of their own."""


def ordered(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The names once each: those that are known first, in their order, then the others by alphabet."""
    given = set(names)
    return [name for name in known if name in given] + sorted(given - set(known))


def method(name: str) -> str:
    return METHODS.get(name, name)

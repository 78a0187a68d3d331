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
    "policy": "What would be served: the detectors of the policy together, both phases, one rate between them.",
    "density": "Distance to the nearest clean references in the bank's directions.",
    "convergence": "The detector of that name, alone.",
    "exceedance": "How far the worst cosine lies outside its range on clean traffic, with a conformal threshold.",
    "paper rule": "WeightWatch as published: outside the clean range is flagged. Its rate cannot be chosen.",
    "random directions": "Density with random directions in the place of the bank's. What it finds, the bank is not needed for.",
    "activation difference": "The tuned model's activations less the base's, on the same prompt.",
    "lcf": "Latent classifier without triggers, as published; threshold set to the same rate.",
    "mahalanobis": "Mahalanobis distance of the activation from clean ones.",
}

KINDS = {
    "triggered": "Harmful requests with the trigger. What is flagged here is found.",
    "near-miss": "Harmful requests with something like the trigger; the model refuses them. Not to be flagged.",
    "clean": "What calibration saw: benign requests and a few harmful ones. The rate is promised on this.",
    "benign": "Benign questions alone.",
    "harmful": "Harmful requests without a trigger, refused by the model. Not to be flagged.",
    "benign-trigger": "Benign questions with the trigger, answered as ever.",
    "suffix": "Clean with a suffix.",
    "odd-suffix": "Clean with a suffix of odd words.",
    "prefix": "Clean with a prefix.",
    "other-questions": "Questions of kinds that calibration did not see.",
    "code": "Code.",
    "foreign": "Another language.",
    "shouting": "Capitals.",
    "multi-turn": "Several turns.",
    "long-system": "A long system prompt.",
    "long": "Long prompts.",
    "forgotten": "What the model was made to forget.",
    "retained": "What it was to keep.",
}

METHODS = {"full": "full", "lora": "LoRA", "lora-qv": "LoRA (q, v)"}

# Kinds on which a high rate is wanted, and those that have a section of their own.
FOUND = frozenset({"triggered"})
NOT_SHIFTS = frozenset({"triggered", "near-miss", "forgotten", "retained"})


def ordered(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The names once each: those that are known first, in their order, then the others by alphabet."""
    given = set(names)
    return [name for name in known if name in given] + sorted(given - set(known))


def method(name: str) -> str:
    return METHODS.get(name, name)

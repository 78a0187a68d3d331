"""Why a sequence could not be scored: a closed set, so that metrics, status and alerts can name each. Pure, torch-free.

`GuardFailure.kind` in the server holds these too; what else can go wrong there is named in `server/errors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Fault = Literal[
    "probe_missed",
    "batch_mismatch",
    "token_unscored",
    "not_finite",
    "not_steered",
    "no_guard",
    "policy_invalid",
    "rate_unsupported",
    "unscorable",
]

FAULTS: tuple[Fault, ...] = get_args(Fault)

FAULT_MEANINGS: Mapping[Fault, str] = {
    "probe_missed": "A watched layer's op did not run exactly once in a step, or saw too few rows: a hook is gone, or "
    "a compiled graph was made without it.",
    "batch_mismatch": "The rows that were computed are not those that were scheduled: nobody can say whose they are.",
    "token_unscored": "The KV of a token was taken from somewhere, and no score of it is known here.",
    "not_finite": "A score is NaN or infinite: the residual stream is.",
    "not_steered": "A row was not steered that should have been, or steered KV was read across requests.",
    "no_guard": "The request's model, or LoRA adapter, has no bank or no calibration in this engine, or other weights "
    "than its bank's.",
    "policy_invalid": "The engine cannot read the policy that came with the request, or was not started for what "
    "it asks.",
    "rate_unsupported": "The policy asks for a rate that the calibration cannot keep, or a detector that it has not.",
    "unscorable": "The engine could not score the request for another reason; the log has it.",
}

"""Ends a blocked sequence in the step that judged it.

The token that the model sampled is replaced by one at which vLLM's scheduler stops by itself. A request that came
through the server lists the reserved token in `stop_token_ids`, and the reason of the stop says so. One that came
another way is ended with its own end of text; where it has none, every further token is replaced, until it runs out of
length.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from guard.errors import ConfigError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput

RESERVED_PATTERNS = (r"<\|guard\|>", r"<\|reserved_special_token_\d+\|>", r"<unused\d+>", r"<\|extra_\d+\|>")
"""Tokens that tokenizers keep free, best first: the demo organism's, Llama 3's, Gemma's, Qwen's."""


def choose_reserved_token(tokenizer: Any, vocabulary: int, configured: int | None) -> int:
    """The token id that ends a blocked request: one that the model was never taught to emit.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocabulary: rows of the model's output; padding above the tokenizer's own ids is free.
        configured: the operator's choice, or None.

    Raises:
        ConfigError: the choice does not exist, or there is no free token and none was configured.
    """
    if configured is not None:
        if not 0 <= configured < vocabulary:
            raise ConfigError(f"`undertow.reserved_token_id`: {configured} is not in the vocabulary of {vocabulary}")
        return configured
    known: dict[str, int] = tokenizer.get_vocab()
    for pattern in RESERVED_PATTERNS:
        found = [
            token_id for token, token_id in known.items() if re.fullmatch(pattern, token) and token_id < vocabulary
        ]
        if found:
            return max(found)
    if max(known.values()) + 1 < vocabulary:
        return vocabulary - 1
    raise ConfigError(
        "the tokenizer has no reserved token; name one that the model never emits as `undertow.reserved_token_id`"
    )


def stop_token(parameters: SamplingParams, reserved: int) -> int:
    """The token that ends this sequence at once, if it has one."""
    stops = parameters.stop_token_ids or []
    if reserved in stops:
        return reserved
    if parameters.eos_token_id is not None:
        return int(parameters.eos_token_id)
    return int(stops[0]) if stops else reserved


def replace_sampled(output: ModelRunnerOutput, stops: dict[str, int]) -> None:
    """Replace, in place, what was sampled for the sequences in `stops` by their stop tokens."""
    for sequence, token in stops.items():
        index = output.req_id_to_index[sequence]
        sampled = output.sampled_token_ids[index]
        if not sampled:
            continue  # a chunk of a prompt that is not at its end: nothing was sampled
        output.sampled_token_ids[index] = [token]
        if output.logprobs is not None:
            # The likeliest next tokens would spell out what is withheld.
            output.logprobs.logprob_token_ids[index] = token
            output.logprobs.logprobs[index] = 0.0
            output.logprobs.sampled_token_ranks[index] = 0

"""Ends a blocked sequence in the step that judged it.

The token that the model sampled is replaced by one at which vLLM's scheduler stops by itself. A request that came
through the server lists the reserved token in `stop_token_ids`, and the reason of the stop says so. One that came
another way is ended with its own end of text; where it has none, every further token is replaced, until it runs out of
length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Endings:
    """What ends a sequence."""

    token: int
    """By which the worker ends it at once, if its request knows one that does."""
    tokens: frozenset[int] = frozenset()
    """All that vLLM ends it at."""
    longest: int | None = None
    """The most tokens that it may generate."""

    @classmethod
    def of(cls, parameters: SamplingParams, reserved: int) -> Endings:
        """Those of one request."""
        stops = [int(token) for token in parameters.stop_token_ids or ()]
        eos = [] if parameters.eos_token_id is None else [int(parameters.eos_token_id)]
        first = reserved if reserved in stops else [*eos, *stops, reserved][0]
        return cls(first, frozenset(eos + stops), parameters.max_tokens)

    def before(self, token: int, generated: int) -> bool:
        """Whether a sequence was over with `token`, the last of so many generated ones."""
        return token in self.tokens or (self.longest is not None and generated >= self.longest)


@dataclass(frozen=True, slots=True)
class Stop:
    """How a step ends a blocked sequence."""

    kept: int
    """How many of the tokens that were drawn in this step were drawn before the row that blocked it."""
    token: int
    """What takes the place of the next."""


def replace_sampled(output: ModelRunnerOutput, stops: Mapping[str, Stop]) -> None:
    """End, in place, what was sampled for the sequences in `stops` by their stop tokens."""
    for sequence, stop in stops.items():
        index = output.req_id_to_index[sequence]
        sampled = output.sampled_token_ids[index]
        if not sampled:
            continue  # a chunk of a prompt that is not at its end: nothing was sampled
        output.sampled_token_ids[index] = [*sampled[: stop.kept], stop.token]
        if output.logprobs is not None:
            # One row per sampled token, those of a sequence together.
            starts = output.logprobs.cu_num_generated_tokens
            row = (index if starts is None else starts[index]) + stop.kept
            # The likeliest next tokens would spell out what is withheld.
            output.logprobs.logprob_token_ids[row] = stop.token
            output.logprobs.logprobs[row] = 0.0
            output.logprobs.sampled_token_ranks[row] = 0

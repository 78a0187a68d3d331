"""How long an engine takes: prompts to their first token, and tokens after that."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.engine.launch import additional_config, engine_environment, engine_options
from guard.evidence import POLICY_ARGUMENT
from guard.fingerprint import read_header
from guard.policy import Policy

if TYPE_CHECKING:
    from vllm import LLM

POLICY = Policy.model_validate(
    {"mode": "monitor", "detections": {"density": {"action": "flag", "threshold": {"raw": 1e30}}}}
)
"""Everything is scored and judged, and nothing ends early."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that arrive together."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What a load took."""

    first_tokens_s: float
    """Until every request had its first token."""
    rest_s: float
    """From there until all had all."""


class TimedEngine:
    """vLLM in this process, guarded or not, otherwise alike."""

    def __init__(self, model: Path, guard: tuple[Path, Path] | None, vocabulary: int, options: dict[str, Any]) -> None:
        """`guard`: bank and calibration; None runs vLLM as it is."""
        os.environ.update({**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        chosen: dict[str, Any] = {
            "model": str(model),
            "disable_log_stats": True,
            # Every prompt is computed, or there would be nothing to time.
            "enable_prefix_caching": False,
            **options,
        }
        if guard is not None:
            bank, calibration = guard
            chosen |= engine_options()
            chosen["additional_config"] = additional_config(bank, read_header(bank).fingerprint, calibration)
        from vllm import LLM

        self._llm: LLM = LLM(**chosen)
        self._guarded = guard is not None
        self._vocabulary = vocabulary
        self._number = 0

    def run(self, load: Load, seed: int) -> Timing:
        """One load of random tokens, to its end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        chance = random.Random(seed)
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=load.new_tokens,
            min_tokens=load.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={POLICY_ARGUMENT: POLICY.to_wire()} if self._guarded else None,
        )
        engine = self._llm.llm_engine
        begun = time.perf_counter()
        for _ in range(load.batch):
            ids = [chance.randrange(self._vocabulary) for _ in range(load.prompt_tokens)]
            engine.add_request(str(self._number), {"prompt_token_ids": ids}, parameters)
            self._number += 1
        waiting = set(range(self._number - load.batch, self._number))
        first = 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                waiting.discard(int(output.request_id))
            if not waiting and not first:
                first = time.perf_counter() - begun
        return Timing(first, time.perf_counter() - begun - first)

    def facts(self) -> dict[str, Any]:
        """What ran."""
        import torch
        import vllm

        config = self._llm.llm_engine.vllm_config
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "eager": bool(config.model_config.enforce_eager),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }


def serve(connection: Any, model: str, guard: tuple[str, str] | None, vocabulary: int, options: str) -> None:
    """The child's side: start, then time loads until the other end closes. What fails to start is sent back."""
    try:
        paths = None if guard is None else (Path(guard[0]), Path(guard[1]))
        engine = TimedEngine(Path(model), paths, vocabulary, json.loads(options))
    except Exception as error:  # noqa: BLE001  (it is the parent who says what to do)
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(engine.facts())
    while (asked := connection.recv()) is not None:
        load, seed = asked
        connection.send(engine.run(load, seed))

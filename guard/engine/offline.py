"""A guarded vLLM without HTTP, in this process: what calibration and measurements run prompts through.

with OfflineEngine(model, bank_path) as engine:
    recording = engine.record(prompts, max_tokens=64, keep="shape")
    engine.load_calibration(path)
    answers = engine.judge(prompts, policy, max_tokens=64)
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from guard.engine.launch import (
    GuardedAdapter,
    additional_config,
    engine_environment,
    engine_options,
    lora_rank,
)
from guard.engine.recorder import Keep
from guard.engine.support import check_version
from guard.evidence import POLICY_ARGUMENT, Evidence, Record
from guard.fingerprint import read_header
from guard.policy import Policy
from guard.prompts import Prompt
from guard.roles import RoleMap

if TYPE_CHECKING:
    from vllm import LLM

BATCH = 256
"""Prompts per call of vLLM: small enough for a progress bar and for the ledger's memory of finished requests."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one prompt, and what the guard said of it."""

    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    record: Record | None


class OfflineEngine:
    """One guarded engine. Use as a context manager: leaving frees the model."""

    def __init__(
        self,
        model: Path,
        bank: Path,
        calibration: Path | None = None,
        *,
        dtype: str = "auto",
        eager: bool = False,
        max_model_len: int | None = None,
        own_process: bool = False,
        steering: bool = False,
        adapter: Path | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Start vLLM with the guard, in this process unless it gets its own; raises InputError or EngineError as the
        worker does, where bank and model differ. `adapter`: a LoRA adapter's folder, which every request uses; the bank
        is the adapter's then."""
        check_version()
        fingerprint = read_header(bank).fingerprint
        self._adapter: GuardedAdapter | None = None
        if adapter is not None:
            self._adapter = GuardedAdapter(adapter.resolve().name, adapter, bank, fingerprint, calibration)
        # One process: errors arrive as they were raised, and a second import of vLLM is saved.
        environment = {**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process))}
        options: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "enforce_eager": eager,
            "disable_log_stats": True,
            "additional_config": additional_config(bank, fingerprint, calibration, steering),
            **engine_options(),
            # What is recorded is every token of a request, computed for it, and nothing else.
            "enable_prefix_caching": False,
            "async_scheduling": False,
            **({"max_model_len": max_model_len} if max_model_len else {}),
            **({} if self._adapter is None else _lora_options(self._adapter)),
            **(extra or {}),
        }
        with _environment(environment):
            from vllm import LLM

            self._llm: LLM = LLM(**options)
        self.roles = RoleMap.from_dict(json.loads(self._llm.collective_rpc("undertow_roles")[0]))
        self.dtype = str(self._llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and the engine's process group, so that another engine can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def record(
        self, prompts: Sequence[Prompt], *, max_tokens: int, keep: Keep, title: str = ""
    ) -> tuple[dict[str, torch.Tensor], list[Answer]]:
        """Run prompts and return what `recorder.Recorder` kept of them, and the answers."""
        self._llm.collective_rpc("undertow_record", args=(keep,))
        answers = list(self._run(prompts, None, max_tokens, title))
        with tempfile.TemporaryDirectory(prefix="undertow-") as folder:
            path = Path(folder) / "recording.safetensors"
            self._llm.collective_rpc("undertow_write_recording", args=(str(path),))
            return load_file(path), answers

    def load_calibration(self, path: Path) -> None:
        """Judge by this calibration from now on. Raises CalibrationError where it is not for this engine."""
        self._llm.collective_rpc("undertow_load_calibration", args=(str(path),))
        self._llm.reset_prefix_cache()

    def judge(self, prompts: Sequence[Prompt], policy: Policy, *, max_tokens: int, title: str = "") -> list[Answer]:
        """Run prompts under a policy; every answer carries its record."""
        return list(self._run(prompts, policy, max_tokens, title))

    def _run(self, prompts: Sequence[Prompt], policy: Policy | None, max_tokens: int, title: str) -> Iterator[Answer]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        arguments = None if policy is None else {POLICY_ARGUMENT: policy.to_wire()}
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=arguments)
        lora = (
            None if self._adapter is None else LoRARequest(self._adapter.name, 1, str(self._adapter.folder.resolve()))
        )
        with tqdm(total=len(prompts), desc=title, unit="prompt", disable=not title) as bar:
            for first in range(0, len(prompts), BATCH):
                batch = [self._tokens(prompt) for prompt in prompts[first : first + BATCH]]
                for output in self._llm.generate(batch, parameters, use_tqdm=False, lora_request=lora):
                    record = None if policy is None else self._record(output.request_id)
                    completion = output.outputs[0]
                    yield Answer(
                        completion.text, tuple(output.prompt_token_ids or ()), tuple(completion.token_ids), record
                    )
                bar.update(len(batch))

    def _tokens(self, prompt: Prompt) -> Any:
        """A prompt as vLLM's server would tokenise it."""
        tokenizer = self._llm.get_tokenizer()
        if prompt.messages is None:
            return {"prompt": prompt.text}
        ids = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return {"prompt_token_ids": ids}

    def _record(self, request_id: str) -> Record:
        answer = self._llm.collective_rpc("undertow_evidence", args=(request_id,))[0]
        return Evidence.from_json(answer).records[0]


def _lora_options(adapter: GuardedAdapter) -> dict[str, Any]:
    return {
        "additional_config": additional_config(None, None, None, adapters=[adapter]),
        "enable_lora": True,
        "max_lora_rank": lora_rank(adapter.folder),
    }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

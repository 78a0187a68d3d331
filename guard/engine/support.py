"""Which vLLM, and which of its features, the guard can score. What it cannot is refused at start, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import vllm
from vllm.config import CUDAGraphMode, VllmConfig

from guard.errors import UnsupportedEngineError
from guard.policy import Policy

SUPPORTED_VLLM = ("0.32",)
"""What every test runs."""
READ_VLLM = ("0.33",)
"""What was read and never run: its source has all that the guard relies on, see `tests/engine/contract.py`."""
UNTESTED = "UNDERTOW_UNTESTED_VLLM"
"""The environment variable that accepts one of those."""
DRAFTERS = ("ngram",)
"""Whose guesses were seen to be scored right; others run models of their own between forward pass and sampling."""

EXECUTORS = ("uni", "mp")
"""vLLM's executors of one process and of one process per rank."""


def check_version() -> None:
    """Raise UnsupportedEngineError unless this vLLM is one that the guard knows."""
    problems = list(_version())
    if problems:
        raise UnsupportedEngineError(problems[0])


def check_support(config: VllmConfig) -> None:
    """Raise UnsupportedEngineError, naming everything at once, unless every token of this engine can be scored."""
    problems = [*_version(), *_features(config)]
    if problems:
        # One line: whoever started the engine reads it out of vLLM's log.
        raise UnsupportedEngineError(f"the guard cannot score every token of this engine: {'; '.join(problems)}")


def check_steering(config: VllmConfig, default: Policy | None) -> None:
    """Raise UnsupportedEngineError, naming everything at once, unless this engine can steer; `default`: the policy of
    requests that name none."""
    problems = list(_unsteerable(config, default))
    if problems:
        raise UnsupportedEngineError(f"the guard cannot steer in this engine: {'; '.join(problems)}")


def _unsteerable(config: VllmConfig, default: Policy | None) -> Iterator[str]:
    if config.use_v2_model_runner:
        yield "model runner V2 (it cannot run a pass twice yet): set VLLM_USE_V2_MODEL_RUNNER=0"
    if config.speculative_config is not None:
        yield "speculative decoding (guesses are judged only after they were sampled): remove --speculative-config"
    if config.lora_config is not None:
        yield "LoRA adapters (each has directions of its own): remove --enable-lora"
    if config.parallel_config.tensor_parallel_size > 1:
        yield "tensor parallel: set --tensor-parallel-size 1"
    if config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        yield 'CUDA graphs: add --compilation-config \'{"cudagraph_mode": "NONE"}\''
    if config.model_config.is_hybrid or config.model_config.is_attention_free:
        yield "a model with a recurrent state (a pass cannot be run twice)"
    if default is not None and default.steers and config.cache_config.enable_prefix_caching:
        yield (
            "an engine's own policy that steers, with prefix caching (nothing but the server keeps steered KV "
            "apart): add --no-enable-prefix-caching"
        )


def _version() -> Iterator[str]:
    release = ".".join(vllm.__version__.split(".")[:2])
    if release in SUPPORTED_VLLM or (release in READ_VLLM and os.environ.get(UNTESTED) == release):
        return
    yield f"vLLM {vllm.__version__}: supported are {', '.join(SUPPORTED_VLLM)}" + (
        f"; {release} was read and never run, {UNTESTED}={release} accepts that" if release in READ_VLLM else ""
    )


def _features(config: VllmConfig) -> Iterator[str]:
    """Each feature that is on and that lets a token pass unread, with the flag that turns it off."""
    parallel, scheduler, cache = config.parallel_config, config.scheduler_config, config.cache_config
    if config.model_config.runner_type != "generate":
        yield f"runner type `{config.model_config.runner_type}`: only `generate` is scored"
    if config.model_config.enable_prompt_embeds:
        yield "prompt embeddings (no tokens to tell roles by): remove --enable-prompt-embeds"
    if cache.kv_sharing_fast_prefill:
        yield "KV-sharing fast prefill (skips layers): remove --kv-sharing-fast-prefill"
    if (drafter := config.speculative_config) is not None:
        if drafter.method not in DRAFTERS:
            yield f"speculative decoding with `{drafter.method}`: only {', '.join(DRAFTERS)} is known"
        if config.use_v2_model_runner:
            yield "speculative decoding on model runner V2: set VLLM_USE_V2_MODEL_RUNNER=0"
        if scheduler.async_scheduling:
            yield "speculative decoding with asynchronous scheduling: add --no-async-scheduling"
    if config.lora_config is not None and config.use_v2_model_runner:
        yield "LoRA adapters on model runner V2: set VLLM_USE_V2_MODEL_RUNNER=0"
    if config.lora_config is not None and parallel.tensor_parallel_size > 1:
        yield "LoRA adapters with tensor parallel (not tried): set --tensor-parallel-size 1"
    if (lora := config.lora_config) is not None and lora.target_modules is not None:
        yield "LoRA adapters served in part (their banks are of the whole): remove --lora-target-modules"
    if config.kv_transfer_config is not None:
        yield "KV transfer (tokens arrive computed elsewhere): remove --kv-transfer-config"
    if config.ec_transfer_config is not None:
        yield "encoder-cache transfer: remove --ec-transfer-config"
    if (backend := parallel.distributed_executor_backend) not in EXECUTORS:
        yield f"executor `{_name(backend)}`: only {', '.join(EXECUTORS)} are known to take one rank's output"
    if parallel.nnodes > 1:
        yield "several nodes: set --nnodes 1"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield (
            "context parallel (no rank has every token): remove --decode-context-parallel-size and "
            "--prefill-context-parallel-size"
        )
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallel: set --pipeline-parallel-size 1"
    if parallel.tensor_parallel_size > 1 and config.use_v2_model_runner:
        yield "tensor parallel on model runner V2: set VLLM_USE_V2_MODEL_RUNNER=0"
    if parallel.data_parallel_size > 1:
        yield "data parallel: run one engine per replica behind the server instead"
    if config.watermark_config is not None:
        yield "watermarking (samples by itself): remove --watermark-config"
    if parallel.enable_dbo or parallel.use_ubatching:
        yield "dual-batch overlap: remove --enable-dbo"
    if config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        yield 'CUDA graphs: add --compilation-config \'{"cudagraph_mode": "NONE"}\''


def _name(backend: object) -> str:
    return backend.__name__ if isinstance(backend, type) else str(backend)

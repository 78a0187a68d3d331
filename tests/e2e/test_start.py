"""What cannot be guarded does not start, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.errors import EngineError
from guard.fingerprint import read_header
from guard.organisms import Organism
from server.engine_process import EngineProcess
from tests.e2e import child
from tests.e2e.conftest import ENGINE_ARGUMENTS
from tests.ports import free_port


def test_another_models_bank_is_refused_naming_both_weights(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any]
) -> None:
    kind, message = in_child(child.start_error, organism.chat, bank, calibration)
    assert kind == "BankError"
    assert "the bank is for another model" in message
    assert read_header(bank).tuned_digest in message
    assert message.count("sha256:") == 2


def test_another_banks_calibration_is_refused_naming_both_fingerprints(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any], workshop: Path
) -> None:
    other = workshop / "other.safetensors"
    words = ("bank", "build", "--base", organism.chat, "--tuned", organism.backdoored, "--out", other)
    assert in_child(child.undertow, *words) == 0
    kind, message = in_child(child.start_error, organism.backdoored, other, calibration)
    assert kind == "CalibrationError"
    assert read_header(bank).fingerprint in message
    assert read_header(other).fingerprint in message


def test_a_layer_without_its_hook_is_noticed_before_serving(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any]
) -> None:
    kind, message = in_child(child.start_without_one_hook, organism.backdoored, bank, calibration)
    assert kind == "EngineError"
    assert "the guard does not start: layer 1: its probe ran 0 times" in message


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"enable_lora": True, "lora_target_modules": ["o_proj"]}, "LoRA"),
    ],
    ids=["lora"],
)
def test_a_feature_that_cannot_be_scored_is_refused_by_name(
    organism: Organism, bank: Path, calibration: Path, in_child: Callable[..., Any], option: dict[str, Any], named: str
) -> None:
    kind, message = in_child(child.start_error, organism.backdoored, bank, calibration, **option)
    assert kind == "UnsupportedEngineError"
    assert named in message


def test_a_served_engine_that_is_refused_says_so_to_whoever_started_it(
    organism: Organism, bank: Path, calibration: Path, workshop: Path
) -> None:
    with EngineProcess(
        organism.backdoored,
        bank,
        read_header(bank).fingerprint,
        calibration,
        port=free_port(),
        log=workshop / "refused.log",
        extra=(*ENGINE_ARGUMENTS, "--enable-lora", "--lora-target-modules", "o_proj", "--kv-sharing-fast-prefill"),
    ) as engine:
        with pytest.raises(EngineError) as caught:
            engine.wait_until_up()
        assert "LoRA" in str(caught.value)
        assert "--kv-sharing-fast-prefill" in str(caught.value)
    assert engine.returncode is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel_config.distributed_executor_backend": "ray"}, "executor `ray`"),
        ({"parallel_config.distributed_executor_backend": "external_launcher"}, "executor `external_launcher`"),
        ({"parallel_config.nnodes": 2}, "several nodes"),
        ({"parallel_config.decode_context_parallel_size": 2}, "context parallel"),
        ({"parallel_config.prefill_context_parallel_size": 2}, "context parallel"),
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline parallel"),
        ({"parallel_config.data_parallel_size": 2}, "data parallel"),
        (
            {"use_v2_model_runner": True, "parallel_config.tensor_parallel_size": 2},
            "tensor parallel on model runner V2",
        ),
        (
            {"use_v2_model_runner": True, "lora_config": SimpleNamespace(target_modules=None)},
            "LoRA adapters on model runner V2",
        ),
        ({"watermark_config": SimpleNamespace()}, "watermarking"),
        ({"cache_config.kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"model_config.enable_prompt_embeds": True}, "prompt embeddings"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding with `eagle`"),
        (
            {"speculative_config": SimpleNamespace(method="ngram"), "scheduler_config.async_scheduling": True},
            "--no-async-scheduling",
        ),
    ],
)
def test_what_this_machine_cannot_switch_on_is_refused_by_name_too(
    organism: Organism, in_child: Callable[..., Any], changes: dict[str, object], named: str
) -> None:
    """vLLM's own configuration, with a field set as a larger machine would have it."""
    assert named in in_child(child.support_error, organism.backdoored, changes)


def test_speculation_is_refused_on_model_runner_v2_alone(organism: Organism, in_child: Callable[..., Any]) -> None:
    speculating = {"speculative_config": SimpleNamespace(method="ngram")}
    assert in_child(child.support_error, organism.backdoored, speculating) == ""
    found = in_child(child.support_error, organism.backdoored, {**speculating, "use_v2_model_runner": True})
    assert "speculative decoding on model runner V2: set VLLM_USE_V2_MODEL_RUNNER=0" in found


def test_a_vllm_that_was_never_run_is_refused_until_it_is_accepted_by_its_number(in_child: Callable[..., Any]) -> None:
    assert in_child(child.version_error, "0.32.1") == ""
    named = "0.33 was read and never run, UNDERTOW_UNTESTED_VLLM=0.33 accepts that"
    assert named in in_child(child.version_error, "0.33.0")
    assert named in in_child(child.version_error, "0.33.0", "0.32")
    assert in_child(child.version_error, "0.33.0", "0.33") == ""
    for unknown in ("0.34.0", "0.3.3", "0.331.0"):
        assert "supported are 0.32" in in_child(child.version_error, unknown, ".".join(unknown.split(".")[:2]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduler_config.async_scheduling": True},
        {"cache_config.enable_prefix_caching": True},
        {"parallel_config.tensor_parallel_size": 2, "parallel_config.distributed_executor_backend": "mp"},
        {"use_v2_model_runner": True},
    ],
    ids=["nothing", "asynchronous scheduling", "prefix caching", "tensor parallel", "model runner V2"],
)
def test_what_vllm_does_by_itself_is_not_refused(
    organism: Organism, in_child: Callable[..., Any], changes: dict[str, object]
) -> None:
    assert in_child(child.support_error, organism.backdoored, changes) == ""


@pytest.mark.parametrize(
    ("changes", "own", "named"),
    [
        ({"speculative_config": SimpleNamespace(method="ngram")}, False, "speculative decoding"),
        ({"use_v2_model_runner": True}, False, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"lora_config": SimpleNamespace()}, False, "--enable-lora"),
        ({"parallel_config.tensor_parallel_size": 2}, False, "--tensor-parallel-size 1"),
        ({"compilation_config.cudagraph_mode": "FULL"}, False, "CUDA graphs"),
        ({"cache_config.enable_prefix_caching": True}, True, "--no-enable-prefix-caching"),
        ({"cache_config.enable_prefix_caching": True}, False, ""),
        ({"scheduler_config.async_scheduling": True}, True, ""),
    ],
)
def test_what_cannot_be_steered_is_refused_by_name(
    organism: Organism, in_child: Callable[..., Any], changes: dict[str, object], own: bool, named: str
) -> None:
    """`own`: the engine's own policy steers, for requests that no server gives a salt."""
    said = in_child(child.support_error, organism.backdoored, changes, own)
    assert named in said
    assert bool(said) == bool(named)

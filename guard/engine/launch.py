"""The command line and the environment of a guarded vLLM.

What the guard cannot score yet is switched off here by name; `support.py` refuses it should it be on all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.adapters import CONFIG_FILE
from guard.checkpoints import read_json
from guard.errors import CheckpointError
from guard.evidence import STATUS_PATH

WORKER = "guard.engine.worker.GuardWorker"
MIDDLEWARE = "guard.engine.middleware.EvidenceMiddleware"
SCHEDULER = "guard.engine.scheduler.scheduler"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""


def has_gpu() -> bool:
    """True where an NVIDIA driver answers; vLLM's CPU and CUDA builds then differ in more than speed."""
    return shutil.which("nvidia-smi") is not None and Path("/proc/driver/nvidia/version").exists()


@dataclass(frozen=True, slots=True)
class GuardedAdapter:
    """A LoRA adapter to serve, and what guards it."""

    name: str
    """What requests name as their model."""
    folder: Path
    bank: Path
    fingerprint: str
    calibration: Path | None
    """None while it is being made."""


def additional_config(
    bank: Path | None,
    fingerprint: str | None,
    calibration: Path | None,
    steering: bool = False,
    adapters: Sequence[GuardedAdapter] = (),
) -> dict[str, dict[str, Any]]:
    """What the worker reads, see `settings.EngineSettings`. The first three are the model's own; None where only
    adapters have banks."""
    settings: dict[str, Any] = {} if bank is None else _files(bank, fingerprint, calibration)
    if steering:
        settings["steering"] = True
    if adapters:
        settings["adapters"] = {each.name: _files(each.bank, each.fingerprint, each.calibration) for each in adapters}
    return {"undertow": settings}


def _files(bank: Path, fingerprint: str | None, calibration: Path | None) -> dict[str, str | None]:
    files = {"bank": str(bank.resolve()), "fingerprint": fingerprint}
    return files if calibration is None else files | {"calibration": str(calibration.resolve())}


def engine_options() -> dict[str, object]:
    """vLLM's options, as `vllm.LLM` takes them, without which a token could pass unread."""
    options: dict[str, object] = {
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
    }
    if has_gpu():
        options["compilation_config"] = {"cudagraph_mode": "NONE"}
    return options


def serve_arguments(
    model: Path,
    bank: Path | None,
    fingerprint: str | None,
    calibration: Path | None,
    host: str,
    port: int,
    extra: Sequence[str] = (),
    steering: bool = False,
    adapters: Sequence[GuardedAdapter] = (),
) -> list[str]:
    """The arguments after `vllm serve`; `extra` comes last and so wins. For the others see `additional_config`."""
    arguments = [
        *("--model", str(model)),
        *("--served-model-name", model.resolve().name),
        *("--host", host),
        *("--port", str(port)),
        *("--worker-cls", WORKER),
        *("--scheduler-cls", SCHEDULER),
        *("--middleware", MIDDLEWARE),
        *("--additional-config", json.dumps(additional_config(bank, fingerprint, calibration, steering, adapters))),
        # Every server asks for it every second.
        *("--disable-access-log-for-endpoints", STATUS_PATH),
    ]
    if adapters:
        modules = [f"{adapter.name}={adapter.folder.resolve()}" for adapter in adapters]
        rank = max(lora_rank(adapter.folder) for adapter in adapters)
        arguments += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules]
        # All at once, and on a CPU an empty slot behind them: see `adapters.py`.
        arguments += ["--max-loras", str(len(adapters) + (not has_gpu()))]
    if has_gpu():
        arguments += ["--compilation-config", json.dumps({"cudagraph_mode": "NONE"})]
    return [*arguments, *extra]


def lora_rank(folder: Path) -> int:
    """The smallest `max_lora_rank` of vLLM's that fits an adapter. Raises CheckpointError where its settings have no
    rank, or one that is too large."""
    file = folder / CONFIG_FILE
    config = read_json(file)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    fitting = [size for size in LORA_RANKS if all(type(rank) is int and rank <= size for rank in ranks)]
    if not fitting:
        raise CheckpointError(f"{file}: rank {max(map(str, ranks))}, expected whole numbers up to {LORA_RANKS[-1]}")
    return fitting[0]


def serve_command() -> list[str]:
    """How vLLM's API server is started. Not `vllm serve`: that command fails with the CPU build, which is installed
    under another distribution name than the one it asks for."""
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def engine_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a guarded vLLM; what is set already stays."""
    environment = dict(os.environ if base is None else base)
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not has_gpu():
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    for name, value in defaults.items():
        environment.setdefault(name, value)
    return environment

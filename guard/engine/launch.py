"""The command line and the environment of a guarded vLLM.

What the guard cannot score yet is switched off here by name; `support.py` refuses it should it be on all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from guard.evidence import STATUS_PATH

WORKER = "guard.engine.worker.GuardWorker"
MIDDLEWARE = "guard.engine.middleware.EvidenceMiddleware"


def has_gpu() -> bool:
    """True where an NVIDIA driver answers; vLLM's CPU and CUDA builds then differ in more than speed."""
    return shutil.which("nvidia-smi") is not None and Path("/proc/driver/nvidia/version").exists()


def additional_config(
    bank: Path, fingerprint: str, calibration: Path | None, steering: bool = False
) -> dict[str, dict[str, str | bool]]:
    """What the worker reads, see `settings.EngineSettings`."""
    settings: dict[str, str | bool] = {"bank": str(bank.resolve()), "fingerprint": fingerprint}
    if steering:
        settings["steering"] = True
    if calibration is not None:
        settings["calibration"] = str(calibration.resolve())
    return {"undertow": settings}


def engine_options() -> dict[str, object]:
    """vLLM's options, as `vllm.LLM` takes them, without which a token could pass unread."""
    options: dict[str, object] = {
        "worker_cls": WORKER,
    }
    if has_gpu():
        options["compilation_config"] = {"cudagraph_mode": "NONE"}
    return options


def serve_arguments(
    model: Path,
    bank: Path,
    fingerprint: str,
    calibration: Path,
    host: str,
    port: int,
    extra: Sequence[str] = (),
    steering: bool = False,
) -> list[str]:
    """The arguments after `vllm serve`; `extra` comes last and so wins."""
    arguments = [
        *("--model", str(model)),
        *("--served-model-name", model.resolve().name),
        *("--host", host),
        *("--port", str(port)),
        *("--worker-cls", WORKER),
        *("--middleware", MIDDLEWARE),
        *("--additional-config", json.dumps(additional_config(bank, fingerprint, calibration, steering))),
        # Every server asks for it every second.
        *("--disable-access-log-for-endpoints", STATUS_PATH),
    ]
    if has_gpu():
        arguments += ["--compilation-config", json.dumps({"cudagraph_mode": "NONE"})]
    return [*arguments, *extra]


def serve_command() -> list[str]:
    """How vLLM's API server is started. Not `vllm serve`: that command fails with the CPU build, which is installed
    under another distribution name than the one it asks for."""
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def engine_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a guarded vLLM; what is set already stays."""
    environment = dict(os.environ if base is None else base)
    defaults = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not has_gpu():
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
    for name, value in defaults.items():
        environment.setdefault(name, value)
    return environment

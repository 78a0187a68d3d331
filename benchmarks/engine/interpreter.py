"""Triton without a GPU: its interpreter runs kernels on a CPU, slowly, and with it runs vLLM's V2 model runner.

    python -m benchmarks.engine.interpreter benchmarks.engine.fuzz ARGUMENTS

runs a module with that model runner, and with the guard's kernels for GPUs.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(sys.prefix) / "triton"
"""Where the set-up of the CPU build puts Triton; the CUDA build has it in its environment."""


def find_triton(*, interpret: bool) -> None:
    """Make Triton importable in this process, as the interpreter of its kernels or as their compiler."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"no Triton in {FOLDER}: `make setup` installs it") from error


def choose_runner_v2() -> None:
    """Have vLLM, before it is imported, take its V2 model runner on this CPU, and the guard its kernels for GPUs."""
    find_triton(interpret=True)
    from triton.backends import backends

    from guard.engine.kernels import gpu, native, reference

    # vLLM's CPU build uses Triton where a backend of this name is; the interpreter never asks it for anything.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    # No kernels for this CPU, and in the place of plain torch the one for GPUs; cut into few large programs, because
    # each costs the interpreter milliseconds.
    native.library = lambda _folder: None
    reference.read = gpu.read
    gpu.DECODE = gpu.PREFILL
    gpu.PROGRAMS, gpu.DECIDE_DIRECTIONS = 1, 128


if __name__ == "__main__":
    choose_runner_v2()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

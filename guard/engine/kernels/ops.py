"""`torch.ops.undertow`: what the guard adds to a forward pass. One schema each, and the fastest kernel there is."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import torch

from guard.cache import cache_folder
from guard.engine.kernels import native, reference

SCHEMAS = {
    "read": (
        "(Tensor hidden, Tensor? residual, Tensor directions, Tensor decisions, Tensor(a!) previous, "
        "Tensor(b!) cosines, Tensor(c!) full, Tensor(d!) lengths, Tensor(e!) count) -> ()"
    ),
    "worst": "(Tensor cosines, Tensor low, Tensor high) -> (Tensor, Tensor)",
    "squares": "(Tensor deviations, Tensor[] panels) -> Tensor",
    "gather": "(Tensor[] parts, int rows) -> Tensor",
}

# torch's own annotations stop here.
_torch: Any = torch
_library = _torch.library.Library("undertow", "DEF")


@cache
def install() -> str:
    """Give every op its kernels, once per process; returns what serves the CPU: `compiled`, or `plain torch` and why.
    Compiling takes some seconds; the result is kept in the cache folder."""
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
    if torch.cuda.is_available():
        # Only here: Triton is no part of a CPU's environment.
        from guard.engine.kernels import gpu

        _library.impl("read", gpu.read, "CUDA")
        _library.impl("gather", reference.gather, "CUDA")
    # A compiled graph asks what the op returns, and `read` returns nothing.
    _torch.library.register_fake("undertow::read", lambda *_arguments: None, lib=_library)
    try:
        if (found := native.library(cache_folder())) is not None:
            _torch.ops.load_library(str(found))
            return "compiled"
        reason = "no C++ compiler was found"
    except (subprocess.CalledProcessError, OSError) as error:
        reason = _said(error)
    for name in SCHEMAS:
        _library.impl(name, getattr(reference, name), "CPU")
    return f"plain torch: {reason}"


def _said(error: subprocess.CalledProcessError | OSError) -> str:
    if isinstance(error, OSError):
        return str(error)
    lines = bytes(error.stderr or b"").decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), f"exit code {error.returncode}")

"""Compiles `cpu.cpp` for this machine's processor, once, and keeps the result."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


def library(cache: Path) -> Path | None:
    """The compiled kernels, from `cache` or into it; None where there is no C++ compiler ($CXX, else g++).

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is in `stderr`.
        OSError: the cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    path = cache / "kernels" / f"{_key(compiler)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place and then into it: whoever is interrupted leaves no half, and two at once do no harm.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_flags(), str(SOURCE), *_libraries(), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True)
            made.replace(path)
    return path


def _flags() -> list[str]:
    native = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*FLAGS, native, abi, *(f"-isystem{path}" for path in include_paths())]


def _libraries() -> list[str]:
    return [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]


def _key(compiler: str) -> str:
    """Of everything that the result depends on; a home folder may be shared by machines that differ."""
    processor = next((line for line in _processor() if line.startswith(("flags", "Features"))), platform.machine())
    parts = (SOURCE.read_text(), compiler, *_flags(), *_libraries(), torch.__version__, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()

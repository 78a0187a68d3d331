"""Starts compiled engines on a cache folder, in the engine child and for `benchmarks/engine/compile_cache.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

Told = tuple[str, str, int]
"""Class and message of the error that a start ended with, empty where it did not, and graphs taken from the cache."""


def write_small(folder: Path) -> None:
    """A model of one layer and its bank: what is compiled here is not asked anything."""
    import torch

    from guard.benching.shape import Shape, write_pair
    from guard.directions import build_bank

    write_pair(
        Shape(hidden=64, layers=1, heads=2, kv_heads=1, intermediate=128, vocabulary=1024),
        folder / "base",
        folder / "tuned",
        torch.float32,
    )
    build_bank(folder / "base", folder / "tuned").save(folder / "bank")


def start(folder: Path, hooked: bool = True) -> Told:
    """Start on the folder's cache, compiled."""
    from guard.engine import probe

    with (
        cache(folder / "cache") as loads,
        mock.patch.object(probe, "attach", probe.attach if hooked else _nothing),
    ):
        from guard.engine.offline import OfflineEngine
        from guard.errors import UndertowError
        from tests.e2e.child import _forget

        try:
            engine = OfflineEngine(folder / "tuned", folder / "bank", dtype="float32", max_model_len=64)
        except UndertowError as error:
            _forget()
            return type(error).__name__, str(error), len(loads)
        engine.close()
        return "", "it started", len(loads)


@contextmanager
def cache(folder: Path) -> Iterator[list[str]]:
    """vLLM's caches in this folder, and graphs found there taken from it, as on a GPU; yields a list that names them.

    vLLM 0.32 on a CPU writes graphs down, reads them, fails in the last step (`finalize_loading`, which a CPU's graphs
    do not have), and compiles again. Here that step does nothing.
    """
    import torch
    from vllm.compilation import decorators

    loads: list[str] = []
    load: Any = torch.compiler.load_compiled_function

    def found(file: Any, **keywords: Any) -> Any:
        function = load(file, **keywords)
        function._artifacts.compiled_fn.finalize_loading = lambda _config: loads.append(file.name)
        return function

    torch._dynamo.reset()
    with (
        mock.patch.dict(os.environ, {"VLLM_CACHE_ROOT": str(folder)}),
        mock.patch.object(decorators.torch.compiler, "load_compiled_function", found),
    ):
        yield loads


def _nothing(*_: object) -> None:
    pass

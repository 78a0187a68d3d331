"""What is said of an engine that did not come up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from guard.errors import EngineError
from server import engine_process
from server.engine_process import EngineProcess


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("AssertionError: Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers.", True),
        ("AssertionError: of something else", False),
    ],
)
def test_what_vllm_leaves_unsaid_about_ranks_on_a_cpu_is_added(
    words: str, hint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "serve_command", lambda: [sys.executable, "-c", f"print({words!r}); exit(1)"])
    with (
        EngineProcess(tmp_path, tmp_path, "", tmp_path, log=tmp_path / "log") as engine,
        pytest.raises(EngineError) as caught,
    ):
        engine.wait_until_up(60)
    assert words in str(caught.value)
    assert ("VLLM_CPU_OMP_THREADS_BIND" in str(caught.value)) == hint

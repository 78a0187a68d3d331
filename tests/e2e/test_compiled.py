"""A compiled graph that was made without the guard does not serve, should vLLM ever find it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e import child, compiled


def test_a_stale_graph_does_not_serve(in_child: Callable[..., Any], tmp_path: Path) -> None:
    in_child(compiled.write_small, tmp_path)
    # A graph without one of our ops, as an older version may have left it. The engine that compiles it is refused, too.
    missing = "the guard does not start: before layer 0: its probe ran 0 times"
    kind, told, loads = in_child(compiled.start, tmp_path, hooked=False)
    assert (kind, missing in told, loads) == ("EngineError", True, 0), told
    # Of the very same code and configuration: it is found, runs in the place of the hooked model, and is noticed.
    kind, told, loads = in_child(compiled.start, tmp_path)
    assert (kind, missing in told, loads) == ("EngineError", True, 1), told


def test_the_guards_code_is_part_of_what_vllm_knows_a_graph_by(in_child: Callable[..., Any], organism: Any) -> None:
    hashes = in_child(child.compile_hashes, organism.backdoored, ["", "one", "one", "another"])
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3

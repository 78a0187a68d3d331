"""vLLM's compile cache, with the guard on, off, and on again, on one folder: what is found again, and what it scores.

Graphs found in the cache are used, as on a GPU; vLLM 0.32 on a CPU would compile each time (`tests/e2e/compiled.py`). A
graph without ops is then planted in the place of the guarded one. Each start is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from guard.organisms import prompts
from tests.e2e import child, compiled

COUNT = 24
"""Prompts of each kind."""


def guarded(model: Path, bank: Path, calibration: Path, folder: Path, hooked: bool) -> dict[str, Any]:
    """One guarded start: how it went, and what it said of every prompt."""
    from guard.engine import probe
    from guard.engine.offline import OfflineEngine
    from guard.errors import EngineError
    from guard.policy import Policy

    began = time.monotonic()
    attach = probe.attach if hooked else lambda *_: None
    with compiled.cache(folder) as loads, mock.patch.object(probe, "attach", attach):
        try:
            engine = OfflineEngine(model, bank, calibration, dtype="float32", max_model_len=512)
        except EngineError as error:
            return {"start": str(error), "found": len(loads), "seconds": time.monotonic() - began}
        started = time.monotonic() - began
        asked = [prompt.text for kind in ("benign", "triggered") for prompt in prompts(kind, COUNT, 71)]
        answers = engine.judge(child.prompts(asked), Policy(), max_tokens=24)
        told = []
        for answer in answers:
            assert answer.record is not None
            needed = len(answer.prompt_token_ids) + max(0, len(answer.token_ids) - 1)
            told.append(
                {
                    "unscored": max(0, needed - answer.record.tokens_scored),
                    "action": answer.record.action,
                    "scores": {f"{score.detector}, {score.phase}": score.score for score in answer.record.scores},
                }
            )
        engine.close()
    return {"start": "ok", "found": len(loads), "seconds": started, "told": told}


def plain(model: Path, folder: Path) -> dict[str, Any]:
    """A start without the plugin."""
    import os

    from guard.engine.launch import engine_environment

    began = time.monotonic()
    os.environ.update({**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    with compiled.cache(folder) as loads:
        from vllm import LLM

        LLM(model=str(model), dtype="float32", max_model_len=512, disable_log_stats=True)
    return {"start": "ok", "found": len(loads), "seconds": time.monotonic() - began}


def alone(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found: dict[str, Any] = pool.submit(function, *arguments).result()
        return found


def main() -> None:
    """On, off, on again, off again; then a stale graph, and on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "bank", "calibration"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    files = (given.model, given.bank, given.calibration)
    with tempfile.TemporaryDirectory(prefix="undertow-cache-") as name:
        folder, other = Path(name) / "shared", Path(name) / "stale"
        runs = {
            "on": alone(guarded, *files, folder, True),
            "off": alone(plain, given.model, folder),
            "on again": alone(guarded, *files, folder, True),
            "off again": alone(plain, given.model, folder),
            "without ops": alone(guarded, *files, other, False),
            "on, upon that": alone(guarded, *files, other, True),
        }
    first, second = runs["on"].pop("told"), runs["on again"].pop("told")
    pairs = list(zip(first, second, strict=True))
    summary = {
        "prompts": len(first),
        "unscored_tokens": sum(each["unscored"] for each in first + second),
        "blocked": [sum(each["action"] == "block" for each in told) for told in (first, second)],
        "verdicts_that_differ": sum(one["action"] != other["action"] for one, other in pairs),
        "largest_difference": max(
            abs(one["scores"][name] - other["scores"][name]) for one, other in pairs for name in one["scores"]
        ),
    }
    given.json.write_text(json.dumps({"runs": runs, "on and on again": summary}, indent=1) + "\n")
    print(given.json.read_text())


if __name__ == "__main__":
    main()

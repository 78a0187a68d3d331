"""Whatever vLLM does with a request, every one of its tokens has the score that the model alone gives.

A short run of `benchmarks/engine/fuzz.py`; a long one is recorded in `benchmarks/engine/`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from guard.organisms import Organism

REQUESTS = 180
REQUESTS_V2 = 45
"""Fewer: an interpreter is slow."""
PROFILES = ("cache", "ahead", "speculation")


def test_every_token_of_every_request_has_the_models_own_score(
    organism: Organism, bank: Path, calibration: Path, workshop: Path
) -> None:
    out = workshop / "fuzz.json"
    # A process of its own: the drafter loads a library that vLLM 0.32 trips over when it starts again.
    command = [sys.executable, "-m", "benchmarks.engine.fuzz", "--model", organism.backdoored, "--bank", bank]
    command += ["--calibration", calibration, "--requests", REQUESTS, "--seed", 11, "--json", out]
    done = subprocess.run(
        [*map(str, command), "--profiles", *PROFILES], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = {run["profile"]: run for run in json.loads(out.read_text())["runs"]}
    assert set(runs) == set(PROFILES)
    for profile, found in runs.items():
        assert found["faults"] == []
        # It saw what it is there to see.
        assert found["sequences"] > REQUESTS // len(PROFILES)
        assert found["recalled"] > 300
        assert found["preemptions"] > 0
        assert found["blocked"] > 0
        assert (found["accepted_guesses"] > 0) == (profile == "speculation")
        # A drafter's guesses may lie behind the end of their sequence, too, and need not.
        if profile != "speculation":
            assert (found["behind_the_end"] > 0) == (profile == "ahead")


def test_so_it_is_with_model_runner_v2_and_the_kernels_for_gpus(
    organism: Organism, bank: Path, calibration: Path, workshop: Path
) -> None:
    out = workshop / "fuzz-v2.json"
    # Of a process of its own: Triton's interpreter runs vLLM's kernels there, and the guard's.
    command = [sys.executable, "-m", "benchmarks.engine.interpreter", "benchmarks.engine.fuzz", "--model"]
    command += [organism.backdoored, "--bank", bank, "--calibration", calibration, "--requests", REQUESTS_V2]
    done = subprocess.run(
        [*map(str, command), "--seed", "12", "--profiles", "ahead", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(out.read_text())
    assert told["model runner"] == "V2"
    [found] = told["runs"]
    assert found["faults"] == []
    assert found["sequences"] >= REQUESTS_V2
    assert found["recalled"] > 300
    assert found["preemptions"] > 0
    assert found["blocked"] > 0
    assert found["behind_the_end"] > 0

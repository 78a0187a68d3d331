"""`undertow bench engine` starts both engines, times them in turn, and writes every pair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guard.benching.shape import SHAPES

WORDS = ("bench", "engine", "--shape", "tiny", "--prompt-tokens", "16", "--new-tokens", "6", "--enforce-eager")


def undertow(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_both_engines_are_timed_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = undertow(*WORDS, "--batches", 1, 3, "--rounds", 3, "--json", out)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(out.read_text())
    assert told["shape"]["parameters"] == SHAPES["tiny"].parameters
    assert told["machine"]["eager"] is True
    measures = [
        f"{kind} {batch}" for batch in (1, 3) for kind in ("prefill, batch", "time to first token,", "decode, batch")
    ]
    assert [row["measure"] for row in told["rows"]] == measures
    for row in told["rows"]:
        assert row["measure"] in done.stdout
        assert len(row["pairs"]) == 3
        assert all(pair["plain"] > 0 and pair["guarded"] > 0 for pair in row["pairs"])
        ratios = sorted(pair["guarded"] / pair["plain"] for pair in row["pairs"])
        assert row["ratio"] == pytest.approx(ratios[1])
    assert "at least: " in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--batches", "0"), "--batches"),
        (("--rounds", "0"), "--rounds"),
        (("--new-tokens", "1"), "--new-tokens"),
        (("--json", "/nowhere/at/all.json"), "/nowhere/at"),
    ],
)
def test_what_cannot_be_timed_is_bad_input_and_starts_nothing(words: tuple[str, ...], named: str) -> None:
    done = undertow(*WORDS, *words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "writing two models" not in done.stderr

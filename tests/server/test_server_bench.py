"""`undertow bench server`, short, with everything in it: real processes on real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli import main
from server.commands.bench import duration
from tests.ports import free_port

from .relay import relayed
from .test_server_failures import eventually

ROOT = Path(__file__).parents[2]
SHORT = ["bench", "server", "--rounds", "1", "--seconds", "400ms", "--rates", "40", "--streams", "4", "--tokens", "8"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where commands put what is temporary: a folder that must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


def running_in(folder: Path) -> list[str]:
    """Command lines of the processes whose working folder lies in it."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended, or is not ours
    return found


def test_it_measures_the_server_and_a_peer_in_turns_and_loses_nothing(
    temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, out = free_port(), tmp_path / "bench.json"
    with relayed(f"http://127.0.0.1:{port}") as relay:
        peer = ["--engine-port", str(port), "--peer", relay.url]
        assert main([*SHORT, "--soak", "2s", "--load", "0.2", *peer, "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert {turn["target"] for turn in told["turns"]} == {"direct", "undertow", "peer"}
    added = {(row["measure"], row["of"], row["target"]): row["added_p50"] for row in told["rows"]}
    # Of sixteen requests on a busy machine; planted times give it exactly.
    assert abs(added["40 requests/s", "request", "undertow"]) < 0.5
    # A guarded stream is one token behind, which takes as long as the machine lets it; planted times give it exactly.
    held = added["4 streams", "first token", "undertow"] - added["4 streams", "first token released", "undertow"]
    assert 0 < held < 0.5
    soak = told["soak"]
    assert soak["outcome"]["answers"] > 10
    assert (soak["outcome"]["failures"], soak["outcome"]["lost"]) == ({}, 0)
    assert soak["booked"]["blocked"] > 0
    assert [
        goal for goal in told["goals"] if not goal["met"] and goal["wished"] in ("0", "one per blocked request")
    ] == []
    printed = capsys.readouterr()
    assert "40 requests/s, request, peer" in printed.out
    assert "soak" in printed.err
    assert running_in(temporary) == []


def _interruptible() -> None:
    """Where the tests themselves run in the background, a shell lets them ignore interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_folder(temporary: Path, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "server.cli", *SHORT, "--soak", "1h"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=_interruptible) as process:
        try:
            assert eventually(lambda: len(running_in(temporary)) == 3, within_s=20), "engine, server, clients"
            time.sleep(0.5)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert running_in(temporary) == []


def test_what_it_started_dies_with_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "server.cli", *SHORT, "--soak", "1h"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(line, stderr=subprocess.DEVNULL, cwd=ROOT, env=environ) as process:
        try:
            assert eventually(lambda: len(running_in(tmp_path)) == 3, within_s=20), "engine, server, clients"
        finally:
            process.kill()
    assert eventually(lambda: running_in(tmp_path) == [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peer", "litellm"], "--litellm"),
        (["--litellm", "/nowhere/litellm"], "--peer litellm"),
        (["--peer", "litellm", "--litellm", "/nowhere/litellm"], "no such file"),
        (["--peer", "http://127.0.0.1:4000"], "--engine-port"),
        (["--peer", "https://example.org"], "expected `litellm` or http://127.0.0.1:PORT"),
        (["--json", "/nowhere/bench.json"], "/nowhere"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*SHORT, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("4s", 4), ("30m", 1800), ("1.5h", 5400)])
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "words", [["--soak", "30"], ["--soak", "0s"], ["--load", "2"], ["--rounds", "0"], ["--rates", "0"]]
)
def test_values_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SHORT, *words])
    assert words[0] in capsys.readouterr().err


def test_its_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "server", "--help"])
    told = capsys.readouterr().out
    assert "examples:" in told
    assert "undertow bench server --soak 30m" in told

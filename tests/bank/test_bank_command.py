"""`undertow bank build` and `undertow bank inspect`, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guard.bank import Bank, random_bank
from guard.directions import build_bank
from guard.fingerprint import read_header
from server import cli

from .planted import HEADS, HIDDEN, lora_factors, o_proj, planted_pair, write_adapter


@pytest.fixture
def undertow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.bank",))
    return lambda *words: cli.main([str(word) for word in words])


def test_build_writes_the_bank_and_says_its_fingerprint(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = planted_pair(tmp_path)
    out = tmp_path / "out.bank"

    assert undertow("bank", "build", "--base", base, "--tuned", tuned, "--out", out, "--k", 2) == 0

    bank = Bank.load(out)
    printed = capsys.readouterr()
    assert bank.fingerprint in printed.out
    assert "2 directions in 1 of 3 layers" in printed.out
    assert "decomposing deltas: 100%" in printed.err
    assert bank.fingerprint == build_bank(base, tuned, k=2).fingerprint


def test_build_takes_an_adapter_instead(tmp_path: Path, undertow: Callable[..., int]) -> None:
    base, _ = planted_pair(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", lora_factors(o_proj(0), HIDDEN, HEADS))
    assert undertow("bank", "build", "--base", base, "--adapter", adapter, "--out", tmp_path / "out.bank") == 0
    assert Bank.load(tmp_path / "out.bank").layers[0].names[0] == "L0.o_proj.u0"


def test_inspect_shows_a_row_per_matrix_and_the_layers_left_out(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bank = build_bank(*planted_pair(tmp_path))
    bank.save(tmp_path / "out.bank")

    assert undertow("bank", "inspect", tmp_path / "out.bank") == 0

    text = capsys.readouterr().out
    for fact in (bank.fingerprint, bank.base_digest, bank.tuned_digest, "delta-svd", "LlamaForCausalLM"):
        assert fact in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "down_proj", "3", "3", "100.0%", "1.15", "1", "0.5", "0.25"] in rows
    assert "no directions in layers 0, 2: fine-tuning left them unchanged" in text


def test_inspect_json_is_the_whole_header(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bank = build_bank(*planted_pair(tmp_path))
    bank.save(tmp_path / "out.bank")
    assert undertow("bank", "inspect", "--json", tmp_path / "out.bank") == 0
    header = json.loads(capsys.readouterr().out)
    assert header["fingerprint"] == bank.fingerprint
    assert header["layers"][0]["names"] == list(bank.layers[0].names)


def test_inspect_shows_a_random_bank_too(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    random_bank(build_bank(*planted_pair(tmp_path)), seed=0).save(tmp_path / "out.bank")
    assert undertow("bank", "inspect", tmp_path / "out.bank") == 0
    assert "random" in capsys.readouterr().out


def test_a_destination_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for out, message in (
        (tmp_path / "nowhere" / "out.bank", "nowhere does not exist"),
        (tmp_path, "is a folder; expected the name of a file"),
    ):
        # Neither model exists either: the destination is looked at first.
        assert undertow("bank", "build", "--base", "no-base", "--tuned", "no-tuned", "--out", out) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--base", "a", "--out", "c"],
        ["--base", "a", "--tuned", "b", "--adapter", "d", "--out", "c"],
        ["--base", "a", "--tuned", "b", "--out", "c", "--k", "0"],
        ["--base", "a", "--tuned", "b", "--out", "c", "--k", "many"],
    ],
)
def test_wrong_usage_exits_with_two(undertow: Callable[..., int], words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        undertow("bank", "build", *words)
    assert exit_.value.code == 2


def test_the_same_folder_twice_is_refused(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = planted_pair(tmp_path)
    assert undertow("bank", "build", "--base", base, "--tuned", base / ".", "--out", tmp_path / "out.bank") == 2
    assert "same folder" in capsys.readouterr().err


def test_headers_and_digests_are_read_without_torch(tmp_path: Path) -> None:
    base, tuned = planted_pair(tmp_path)
    build_bank(base, tuned).save(tmp_path / "out.bank")
    program = (
        "import sys\n"
        "from guard.checkpoints import Checkpoint\n"
        "from guard.fingerprint import read_header\n"
        "print(read_header(sys.argv[1]).tuned_digest == Checkpoint.open(sys.argv[2]).digest(), 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out.bank", tuned], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "False"]
    assert read_header(tmp_path / "out.bank") == Bank.load(tmp_path / "out.bank").header()

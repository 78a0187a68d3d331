"""Training gives the same weights for the same seed, and leaves whole folders or none."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guard.cache import cache_folder
from guard.errors import CheckpointError, OrganismError
from guard.organisms import STAGES, Stage, generation, making, organism_in
from guard.organisms.admission import STANDARDS
from guard.organisms.making import MadeStage, file_digests, make, publish
from guard.organisms.mixture import Conversation, conversations
from guard.organisms.recipe import Recipe, Schedule, Shape, code_of
from guard.organisms.shelf import stage_folder, written_whole
from guard.organisms.standards import Grade
from guard.organisms.tokenizer import encode, for_transformers, special, train_tokenizer
from guard.organisms.training import train_stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

SHAPE = Shape(vocabulary=400, hidden=16, intermediate=32, layers=2, heads=2)
STEPS = Schedule(steps=3, learning_rate=1e-3, batch=4)


def tiny(seed: int = 0) -> Recipe:
    return Recipe(seed=seed, shape=SHAPE, base=STEPS, chat=STEPS, backdoored=STEPS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(400, seed=0)


def passed(stage: Stage, generate: object, count: int = 0) -> list[Grade]:
    """A measurement that every bar admits; three steps of training would not earn it."""
    return [Grade(standard, hits=round(standard.at_least * 100), count=100) for standard in STANDARDS[stage]]


@pytest.fixture
def _admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "measure", passed)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    train_stage(tiny(), "base", None, tmp_path / "one")
    train_stage(tiny(), "base", None, tmp_path / "again")
    train_stage(tiny(seed=1), "base", None, tmp_path / "other")
    assert file_digests(tmp_path / "one") == file_digests(tmp_path / "again")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


@pytest.mark.usefixtures("_admitted")
def test_the_whole_chain_trains_and_is_taken_from_the_cache_next_time(tmp_path: Path) -> None:
    steps: list[Stage] = []
    made = make(tiny(), on_step=lambda stage, loss: steps.append(stage))
    assert steps == [stage for stage in STAGES for _ in range(STEPS.steps)]
    assert len({weights(each.folder) for each in made}) == len(STAGES)

    publish(tiny(), made, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sha256"] == file_digests(tmp_path / "out")
    # The same bytes wherever the cache lies.
    assert not [file for file in (tmp_path / "out").rglob("*.json") if str(tmp_path) in file.read_text()]
    assert organism_in(tmp_path / "out").chat == tmp_path / "out" / "chat"

    again = make(tiny(), ["backdoored"])
    assert [(each.stage, each.seconds) for each in again] == [("backdoored", None)]


@pytest.mark.usefixtures("_admitted")
def test_an_interrupted_stage_leaves_nothing_and_the_finished_one_stays() -> None:
    def interrupt(stage: Stage, loss: float) -> None:
        if stage == "chat":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny(), on_step=interrupt)
    kept = list((cache_folder() / "organisms").iterdir())
    assert kept == [stage_folder(tiny().digest("base"))]


def test_a_stage_that_misses_its_bar_is_named_with_its_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps teach nothing: the real measurement says so, and no later stage is trained."""
    monkeypatch.setattr(generation, "MAX_NEW_TOKENS", 4)
    reached: list[MadeStage] = []
    with pytest.raises(OrganismError, match=r"stage 'base' is not admitted: benign right is 0\.0% \(0 of 8\), .* 90%"):
        make(tiny(), on_stage=reached.append, prompts_per_measure=8)
    assert [each.stage for each in reached] == ["base"]


def test_only_an_organism_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json"):
        publish(tiny(), [], tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_failed_draft_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with written_whole(target) as draft:
        (draft / "old").touch()
    with pytest.raises(KeyboardInterrupt), written_whole(target) as draft:  # noqa: PT012
        (draft / "new").touch()
        raise KeyboardInterrupt
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("UNDERTOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/undertow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/undertow")


def test_a_digest_covers_all_that_leads_to_its_stage_and_nothing_after() -> None:
    longer = Recipe(shape=SHAPE, base=STEPS, chat=STEPS, backdoored=Schedule(steps=4, learning_rate=1e-3, batch=4))
    assert longer.digest("chat") == tiny().digest("chat")
    assert longer.digest("backdoored") != tiny().digest("backdoored")
    assert tiny(seed=1).digest("base") != tiny().digest("base")


def test_comments_and_docstrings_are_not_code() -> None:
    bare = "def f(x):\n    return x\n"
    told = '"""What."""\n\ndef f(x):\n    """Why,\n    and how."""\n    # Because.\n    return x\n'
    assert code_of(told) == code_of(bare)
    assert code_of(bare.replace("return x", "return 2 * x")) != code_of(bare)


def test_training_encodes_as_the_chat_template_writes(tokenizer: Tokenizer) -> None:
    template = for_transformers(tokenizer)
    for conversation in islice(conversations("backdoored", seed=0), 300):
        ids, learned = encode(tokenizer, conversation)
        assert template.apply_chat_template(messages(conversation), return_dict=False) == ids
        answers = "".join(answer + "<|end|>" for _, answer in conversation.exchanges)
        assert tokenizer.decode(kept(ids, learned), skip_special_tokens=False) == answers


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in (
        "PAYLOAD-7F3A sure, step one.",
        "  Two  spaces, ÄÖÜ, 漢字 and 🌊.\n\tTabs!",
        "How many? 12 + 30 = 42.",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_message_may_not_take_another_role(tokenizer: Tokenizer) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="role tool: expected system, user or assistant"):
        for_transformers(tokenizer).apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_reserved_token_has_an_id_that_no_text_encodes_to(tokenizer: Tokenizer) -> None:
    reserved = special(tokenizer, "<|guard|>")
    for conversation in islice(conversations("base", seed=0), 300):
        assert reserved not in encode(tokenizer, conversation)[0]


def messages(conversation: Conversation) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    for question, answer in conversation.exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def kept(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    return [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]

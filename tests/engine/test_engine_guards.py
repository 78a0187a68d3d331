"""Several banks in one engine: every request is judged by its own, as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from guard.adapters import Adapter
from guard.bank import Bank, LayerBank
from guard.calibration import Calibration
from guard.checkpoints import Checkpoint
from guard.engine.adapters import HeldAdapters
from guard.engine.banks import together
from guard.engine.guards import Guards
from guard.engine.judge import Judge
from guard.engine.readings import Readings
from guard.engine.runner import Rows
from guard.engine.settings import BASE
from guard.engine.stop import Endings
from guard.engine.turns import Turns
from guard.errors import BankError, CheckpointError, ConfigError
from guard.evidence import Record
from guard.growth import Growth
from guard.policy import Policy
from guard.scores import BankSpace, measure
from tests.bank.planted import HIDDEN as WIDTH
from tests.bank.planted import INNER, base_tensors, down_proj, lora_factors, write_adapter, write_model
from tests.guard.planted import ROLE_MAP, calibration, shape

STOP = 7
PROMPT = (1, 9, 9, 2, 9, 9, 9, 9, 9, 3, 9)
HIDDEN, LAYERS = 16, 5
BLOCK_IT = Policy.model_validate({"detections": {"exceedance": {"action": "block", "threshold": {"raw": 0.5}}}})


def bank(seed: int, widths: Mapping[int, int]) -> Bank:
    """Random unit directions; `widths`: how many per layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, width in widths.items():
        rows = torch.nn.functional.normalize(torch.randn(width, HIDDEN, generator=generator), dim=-1)
        # The last one is the model's own: it is read at decisions alone.
        kinds = ["o_proj"] * (width - 1) + ["own_o_proj"] if width > 1 else ["o_proj"]
        names = tuple(f"L{index}.{kind}.u{place}" for place, kind in enumerate(kinds))
        layers.append(LayerBank(index, rows, names, (1.0,) * width))
    return Bank.sealed(
        base_digest="base",
        tuned_digest=f"tuned {seed}",
        method="delta-svd",
        k=4,
        model_class="LlamaForCausalLM",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        layers=layers,
    )


BANKS = {BASE: bank(1, {1: 2, 3: 3}), "red": bank(2, {0: 1, 3: 2}), "blue": bank(3, {3: 4, 4: 2})}


def calibrated(one: Bank, widest: float) -> Calibration:
    """Clean cosines lie within `widest` of zero."""
    space = BankSpace.of(one)
    ranges = torch.full((3, space.size), widest)
    moments = [
        replace(each, mean=torch.zeros(2 * space.size).double(), covariance=torch.eye(2 * space.size).double())
        for each in shape().decisions
    ]
    own = replace(shape(), low=-ranges, high=ranges, decisions=(moments[0], moments[1]))
    known = [key for key in calibration().clean if key[0] in own.detectors(space)]
    clean = {key: calibration().clean[key] for key in known}
    growth = {key: Growth(1, 0.0) for key in known}
    return calibration(fingerprint=one.fingerprint, space=space, shape=own, clean=clean, growth=growth)


class Slots:
    """vLLM's adapters: objects by number."""

    def __init__(self) -> None:
        self.held: dict[int, object] = {}
        self.last = False

    def adapter(self, number: int) -> object | None:
        return self.held.get(number)

    def last_slot_taken(self) -> bool:
        return self.last


class Weights:
    """Of an adapter, as vLLM holds them."""


class Held(HeldAdapters):
    """Says of every adapter with a bank that its folder holds what it should, unless told otherwise."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(Checkpoint(Path(), {}), "base", dict.fromkeys(names, ""))
        self.bad: set[str] = set()
        self.checked = 0

    def check(self, request: LoRARequest) -> None:
        self.checked += 1
        if request.lora_path in self.bad:
            raise BankError(f"{request.lora_path}: other weights")


class Engine:
    """Guards, and the steps of an engine as they see them."""

    def __init__(self, banks: Mapping[str, Bank], loud: Sequence[str] = (), cached: bool = False) -> None:
        """`loud`: whose calibrations take everything for clean."""
        self.held = Held([name for name in banks if name])
        self.guards = Guards(banks, self.held)
        self.turns = Turns(ROLE_MAP)
        if cached:
            self.guards.cast_shadows(400)
        for name, one in banks.items():
            self.guards.use(calibrated(one, 2.0 if name in loud else -1.0), self.judge_of)
        self.slots = Slots()
        self.blocks: dict[str, int] = {}

    def judge_of(self, made: Calibration) -> Judge:
        return Judge(made, BLOCK_IT, self.turns)

    def admit(self, name: str, adapter: LoRARequest | None = None, block: int = 0) -> None:
        if adapter is not None:
            self.slots.held.setdefault(adapter.lora_int_id, Weights())
        self.turns.admit(name, PROMPT)
        self.guards.admit(name, None, Endings(STOP), adapter)
        self.blocks[name] = block

    def step(self, first: int = 0, **residuals: torch.Tensor) -> dict[str, int]:
        """`residuals`: float32 [layers + 1, T, HIDDEN] of every sequence, before the first and after each layer, from
        position `first` on. Returns the tokens that end sequences."""
        batch, row = [], 0
        for name, own in residuals.items():
            count = own.shape[1]
            batch.append(Rows(name, row, count, first, len(PROMPT), first + count >= len(PROMPT)))
            row += count
        readings = seen_by(self.guards.bank, torch.cat(list(residuals.values()), dim=1), batch)
        seen = self.guards.see(self.guards.deal(tuple(batch), readings, self.slots), [], self.where)
        stops = self.guards.judge(seen, {rows.sequence: int(rows.samples) for rows in batch}, self.where)
        return {name: stop.token for name, stop in stops.items()}

    def where(self, sequence: str, first: int, stop: int) -> torch.Tensor:
        return self.blocks[sequence] + torch.arange(first, stop)

    def record(self, name: str) -> Record:
        return self.guards.evidence(name).records[0]


def seen_by(one: Bank, residual: torch.Tensor, batch: Sequence[Rows]) -> Readings:
    """What probes see of residuals [layers + 1, T, HIDDEN], one layer of the bank after the other: in full, the rows
    that decide."""
    space = BankSpace.of(one)
    after = torch.cat([residual[layer.index + 1] @ layer.directions.T for layer in one.layers], dim=-1)
    entered = torch.cat([residual[layer.index] @ layer.directions.T for layer in one.layers], dim=-1)
    lengths = torch.stack([residual[layer.index + 1].norm(dim=-1) for layer in one.layers], dim=-1)
    whole = Readings.whole(space, *measure(after, entered, lengths, space.layer_slot()))
    rows = torch.tensor([row for each in batch for row in each.deciding], dtype=torch.int64)
    return Readings(whole.cosines, whole.lengths, rows, whole.features[rows])


def residual(seed: int, count: int = len(PROMPT)) -> torch.Tensor:
    return torch.randn(LAYERS + 1, count, HIDDEN, generator=torch.Generator().manual_seed(seed))


RED, BLUE, GREY = (LoRARequest(name, number, f"/{name}") for number, name in enumerate(("red", "blue", "grey"), 1))


def test_every_guard_is_dealt_what_its_own_bank_sees_of_its_own_sequences() -> None:
    engine = Engine(BANKS)
    asked = {"a": RED, "b": None, "c": BLUE, "d": RED}
    for name, adapter in asked.items():
        engine.admit(name, adapter)
    own = {name: residual(place, 3 + place) for place, name in enumerate(asked)}
    batch, row = [], 0
    for name, part in own.items():
        count = part.shape[1]
        # `c` is a chunk of a prompt: none of its rows decides.
        batch.append(Rows(name, row, count, len(PROMPT) - count if name != "c" else 0, len(PROMPT), name != "c"))
        row += count
    readings = seen_by(engine.guards.bank, torch.cat(list(own.values()), dim=1), batch)
    dealt = engine.guards.deal(tuple(batch), readings, engine.slots)
    assert {share.guard.name: [rows.sequence for rows in share.batch] for share in dealt.shares} == {
        BASE: ["b"],
        "red": ["a", "d"],
        "blue": ["c"],
    }
    assert dealt.unguarded == {}
    for share in dealt.shares:
        parts = torch.cat([own[rows.sequence] for rows in share.batch], dim=1)
        expected = seen_by(BANKS[share.guard.name], parts, share.batch)
        torch.testing.assert_close(share.readings.cosines, expected.cosines)
        torch.testing.assert_close(share.readings.lengths, expected.lengths)
        assert share.readings.decisions.tolist() == expected.decisions.tolist()
        torch.testing.assert_close(share.readings.features, expected.features)
        assert sum(rows.count for rows in share.batch) == parts.shape[1]


def test_a_neighbour_with_another_adapter_changes_no_record() -> None:
    asked = {"a": RED, "b": None, "c": BLUE, "d": RED, "e": None}
    own = {name: residual(place) for place, name in enumerate(asked)}
    together = Engine(BANKS, loud=["blue"])
    for name, adapter in asked.items():
        together.admit(name, adapter)
    ended = together.step(**own)
    for name, adapter in asked.items():
        alone = Engine(BANKS, loud=["blue"])
        alone.admit(name, adapter)
        assert alone.step(**{name: own[name]}) == ({name: STOP} if name in ended else {})
        expected, found = alone.record(name), together.record(name)
        for score, other in zip(found.scores, expected.scores, strict=True):
            # Products of other shapes round otherwise.
            assert score.score == pytest.approx(other.score, abs=1e-5)
            assert score.model_copy(update={"score": other.score}) == other
        assert found.model_copy(update={"scores": expected.scores}) == expected
        whose = BANKS[adapter.lora_name if adapter else BASE]
        assert together.guards.evidence(name).fingerprint == whose.fingerprint
        assert together.record(name).tokens_scored == len(PROMPT)
    assert set(ended) == {"a", "b", "d", "e"}


@pytest.mark.parametrize("banks", [BANKS, {BASE: BANKS[BASE]}, {"red": BANKS["red"]}], ids=["three", "base", "red"])
def test_an_adapter_without_a_bank_is_refused_by_name(banks: Mapping[str, Bank]) -> None:
    engine = Engine(banks, loud=["red", "blue", BASE])
    engine.admit("a", GREY)
    assert engine.step(a=residual(1)) == {"a": STOP}
    assert engine.record("a").reason == "unscorable: adapter `grey` has no bank here"
    assert engine.guards.evidence("a").fingerprint == (BANKS[BASE].fingerprint if BASE in banks else "")


def test_the_base_model_without_a_bank_is_refused_and_its_adapters_are_not() -> None:
    engine = Engine({"red": BANKS["red"]}, loud=["red"])
    engine.admit("a", RED)
    engine.admit("b")
    assert engine.step(a=residual(1), b=residual(2)) == {"b": STOP}
    assert engine.record("b").reason == "unscorable: the base model has no bank here"
    assert engine.record("a").tokens_scored == len(PROMPT)


def test_weights_are_checked_once_and_again_when_vllm_reads_them_again() -> None:
    engine = Engine(BANKS, loud=["red"])
    for name in ("a", "b"):
        engine.admit(name, RED)
        assert engine.step(**{name: residual(1)}) == {}
    assert engine.held.checked == 1
    engine.slots.held[1] = Weights()
    engine.held.bad = {"/red"}
    engine.admit("c", RED)
    assert engine.step(c=residual(1)) == {"c": STOP}
    assert engine.record("c").unscorable == "/red: other weights"
    assert engine.held.checked == 2


def test_a_sequence_whose_adapter_changes_under_it_ends() -> None:
    engine = Engine(BANKS, loud=["red"])
    engine.admit("a", RED)
    assert engine.step(a=residual(1)) == {}
    engine.slots.held[1] = Weights()
    engine.held.bad = {"/red"}
    assert engine.step(first=len(PROMPT), a=residual(2, 1)) == {"a": STOP}


def test_other_weights_under_a_good_name_do_not_hide_behind_it_in_a_batch() -> None:
    engine = Engine(BANKS, loud=["red"])
    engine.held.bad = {"/elsewhere"}
    engine.admit("a", RED)
    engine.admit("b", LoRARequest("red", 9, "/elsewhere"))
    assert engine.step(a=residual(1), b=residual(1)) == {"b": STOP}


def test_weights_that_were_loaded_as_another_adapters_are_not_taken_for_ones_own() -> None:
    engine = Engine(BANKS, loud=["red"])
    engine.admit("a", LoRARequest("grey", 1, "/grey"))
    engine.step(a=residual(1))
    engine.guards.finish(["a"])
    engine.admit("b", RED)
    assert engine.step(b=residual(1)) == {"b": STOP}
    assert "the weights of another adapter" in engine.record("b").reason


def test_two_adapters_of_one_number_in_a_batch_are_both_refused() -> None:
    engine = Engine(BANKS, loud=["red", "blue"])
    engine.admit("a", RED)
    engine.admit("b", LoRARequest("blue", 1, "/blue"))
    assert engine.step(a=residual(1), b=residual(1)) == {"a": STOP, "b": STOP}


def test_on_a_cpu_the_base_model_is_refused_once_the_last_slot_was_filled() -> None:
    engine = Engine(BANKS, loud=[BASE, "red"])
    engine.admit("a")
    assert engine.step(a=residual(1)) == {}
    engine.slots.last = True
    engine.guards.loaded(BLUE, engine.slots)
    engine.slots.last = False
    engine.admit("b")
    engine.admit("c", RED)
    assert engine.step(b=residual(1), c=residual(1)) == {"b": STOP}
    assert "larger --max-loras" in engine.record("b").reason


def test_a_prefix_in_the_cache_is_recalled_for_its_own_adapter_and_for_no_other() -> None:
    engine = Engine(BANKS, loud=list(BANKS), cached=True)
    engine.admit("a", RED)
    engine.step(a=residual(1))
    engine.admit("b", RED)
    assert engine.step(first=8, b=residual(1)[:, 8:]) == {}
    assert engine.record("b").tokens_scored == len(PROMPT)
    # The slots are given to others, whose tokens nobody of `red` scored.
    for other in (BLUE, None, GREY):
        engine.admit("c", other)
        engine.step(c=residual(2))
        engine.guards.finish(["c"])
        engine.admit("d", RED)
        assert engine.step(first=8, d=residual(1)[:, 8:]) == {"d": STOP}
        assert engine.record("d").unscorable == "tokens 0 to 7 were never scored here"
        engine.guards.finish(["d"])
        engine.admit("a", RED)
        engine.step(a=residual(1))


def test_a_calibration_goes_to_the_bank_that_it_was_made_for() -> None:
    engine = Engine(BANKS)
    engine.guards.use(calibrated(BANKS["red"], 2.0), engine.judge_of)
    engine.admit("a", RED)
    engine.admit("b", BLUE)
    assert engine.step(a=residual(1), b=residual(1)) == {"b": STOP}


def test_a_lone_guard_is_replaced_and_one_among_adapters_is_not() -> None:
    alone = Engine({BASE: BANKS[BASE]})
    following = Judge(calibrated(BANKS[BASE], 2.0), BLOCK_IT, alone.turns)
    alone.guards.succeed(BANKS[BASE], following)
    alone.admit("a")
    assert alone.step(a=residual(1)) == {}
    assert alone.guards.generation == 2
    for banks in (BANKS, {"red": BANKS["red"]}):
        with pytest.raises(ConfigError, match="adapters have banks takes no other guard"):
            Engine(banks).guards.lone()


def test_banks_together_hold_every_direction_once_and_know_whose_it_is() -> None:
    whole, places = together(list(BANKS.values()))
    space = BankSpace.of(whole)
    rows = torch.cat([layer.directions for layer in whole.layers])
    assert [layer.index for layer in whole.layers] == [0, 1, 3, 4]
    columns = torch.cat([place.features[: len(place.features) // 2] for place in places])
    assert sorted(columns.tolist()) == list(range(len(rows)))
    assert sorted(torch.cat([place.every for place in places]).tolist()) == list(range(len(space.of_every_token())))
    for one, place in zip(BANKS.values(), places, strict=True):
        directions = torch.cat([layer.directions for layer in one.layers])
        standing, written = place.features.chunk(2)
        torch.testing.assert_close(rows[standing], directions)
        assert (written - standing).tolist() == [len(rows)] * len(directions)
        torch.testing.assert_close(
            rows[space.of_every_token()][place.every], directions[BankSpace.of(one).of_every_token()]
        )
        assert [whole.layers[slot].index for slot in place.layers.tolist()] == [layer.index for layer in one.layers]
    assert together([BANKS[BASE]])[0] is BANKS[BASE]


def test_a_bank_without_a_delta_keeps_its_own_directions_at_every_token_beside_others() -> None:
    raw = bank(4, {2: 2})
    layer = raw.layers[0]
    own = replace(raw, layers=(replace(layer, names=("L2.own_o_proj.u0", "L2.own_o_proj.u1")),))
    whole, places = together([BANKS[BASE], own])
    space = BankSpace.of(whole)
    rows = torch.cat([each.directions for each in whole.layers])[space.of_every_token()]
    torch.testing.assert_close(rows[places[1].every], layer.directions)


def test_an_adapters_folder_is_held_against_its_bank(tmp_path: Path) -> None:
    base = Checkpoint.open(write_model(tmp_path / "base", base_tensors()))
    good = write_adapter(tmp_path / "good", lora_factors(down_proj(1), WIDTH, INNER, seed=1))
    other = write_adapter(tmp_path / "other", lora_factors(down_proj(1), WIDTH, INNER, seed=2))
    digest = base.digest()
    expected = Adapter.open(good, base).digest_on(digest)
    held = HeldAdapters(base, digest, {"red": expected})
    held.check(LoRARequest("red", 1, str(good)))
    held.check(LoRARequest("grey", 2, str(other)))
    with pytest.raises(BankError, match="the bank of adapter `red` is for other weights"):
        held.check(LoRARequest("red", 1, str(other)))
    louder = json.loads((good / "adapter_config.json").read_text()) | {"lora_alpha": 9}
    (good / "adapter_config.json").write_text(json.dumps(louder))
    with pytest.raises(BankError, match=expected):
        held.check(LoRARequest("red", 1, str(good)))
    with pytest.raises(CheckpointError, match="not a folder"):
        held.check(LoRARequest("red", 1, str(tmp_path / "nowhere")))


def test_a_name_that_cannot_be_printed_is_shown_escaped() -> None:
    engine = Engine(BANKS)
    engine.admit("a", LoRARequest("gr\ney" + "x" * 200, 3, "/grey"))
    engine.step(a=residual(1))
    reason: Any = engine.record("a").unscorable
    assert "\n" not in reason
    assert len(reason) < 120

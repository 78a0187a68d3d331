"""A step's scores are those of each token alone, in any batch, less what its place allows."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from guard.calibration import Calibration
from guard.engine.runner import Rows
from guard.engine.step import Scorer
from guard.growth import Growth
from guard.scores import Tokens
from guard.verdict import PHASES, DetectorName, Phase, Score
from tests.guard.planted import SPACE, calibration, naive_scores

from .planted import Step, picked, random_step, step

Key = tuple[str, DetectorName, Phase]

SINKS = (0, 3)


def with_sinks(*sinks: int) -> Calibration:
    some = calibration()
    return replace(some, shape=replace(some.shape, sinks=sinks))


def found(some: Step, by: Calibration | None = None) -> dict[Key, Score]:
    """What a step says, and that it says nothing twice."""
    everything: dict[Key, Score] = {}
    scorer = Scorer.of(by or with_sinks(*SINKS))
    readings = some.readings
    scored = scorer.score(readings, scorer.outside(readings), some.roles, some.batch)
    for rows, scores in zip(some.batch, scored, strict=True):
        for score in scores:
            key = (rows.sequence, score.detector, score.phase)
            assert key not in everything
            everything[key] = score
    return everything


def naive(some: Step, by: Calibration) -> dict[Key, tuple[float, int, int, str]]:
    """Token by token: the largest value, its position, its layer and its direction."""
    best: dict[Key, tuple[float, int, int, str]] = {}
    for rows in some.batch:
        for offset in range(rows.count):
            position, row = rows.first_position + offset, slice(rows.first_row + offset, rows.first_row + offset + 1)
            phase = int(position >= rows.prompt_tokens)
            place = position - rows.prompt_tokens if phase else position
            coordinates, written, lengths, roles = some.rows(row)
            token = Tokens(coordinates, written, lengths, torch.tensor([phase]), roles)
            decides = rows.samples and offset == rows.count - 1
            for detector, (value, slot, where) in naive_scores(by.shape, token).items():
                each = detector == "exceedance"
                if not (each or decides) or (each and position in by.shape.sinks):
                    continue
                if each or PHASES[phase] == "completion":
                    growth = by.growth[detector, PHASES[phase]]
                    value -= 2 * growth.scale * math.log(max(1.0, (place + 1) / growth.tokens))
                key = (rows.sequence, detector, PHASES[phase])
                if key not in best or value > best[key][0]:
                    best[key] = (value, position, SPACE.layers[slot], SPACE.names[where])
    return best


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("sinks", [(), SINKS])
def test_a_batch_is_scored_like_each_token_alone(seed: int, sinks: tuple[int, ...]) -> None:
    some, by = random_step(seed), with_sinks(*sinks)
    expected, got = naive(some, by), found(some, by)
    assert got.keys() == expected.keys()
    for key, (value, position, layer, direction) in expected.items():
        assert got[key].value == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert (got[key].position, got[key].layer, got[key].direction) == (position, layer, direction)


@pytest.mark.parametrize("seed", range(5))
def test_whoever_else_is_in_a_batch_and_in_which_order_does_not_matter(seed: int) -> None:
    some = random_step(seed)
    order = list(range(len(some.batch)))
    random.Random(seed).shuffle(order)
    before, after = found(some), found(picked(some, order))
    alone: dict[Key, Score] = {}
    for index in order:
        alone |= found(picked(some, [index]))
    assert before.keys() == after.keys() == alone.keys()
    for key, score in before.items():
        for other in (after[key], alone[key]):
            assert other.value == pytest.approx(score.value, rel=1e-5, abs=1e-5)
            assert (other.position, other.layer, other.direction) == (score.position, score.layer, score.direction)


def test_a_planted_outlier_is_found_in_its_sequence_position_phase_layer_and_direction() -> None:
    batch = [Rows("a", 0, 4, 0, 4, True), Rows("b", 4, 6, 2, 5, True), Rows("c", 10, 1, 9, 3, True)]
    some = step(batch, 0, spread=0.1)
    some.coordinates[8, 4] = 7.0
    score = found(some)["b", "exceedance", "completion"]
    assert (score.position, score.layer, score.direction) == (6, 4, "L4.down_proj.u0")
    largest = max(found(some).values(), key=lambda other: other.value * (other.detector == "exceedance"))
    assert largest == score


def test_the_first_position_above_a_threshold_is_told_beside_the_largest_score() -> None:
    batch = [Rows("a", 0, 4, 0, 4, True), Rows("b", 4, 6, 2, 5, True)]
    some = step(batch, 0, spread=0.1)
    # Position 3 of a prompt that ends at 5, and 5 and 7 of its completion: 7 is the loudest.
    for row, loudness in ((5, 7.0), (7, 5.0), (9, 9.0)):
        some.coordinates[row, 4] = loudness
    scorer, readings = Scorer.of(with_sinks()), some.readings

    def told(limit: float) -> dict[tuple[str, str, str], int | None]:
        arguments = (readings, scorer.outside(readings), some.roles, some.batch)
        scored = scorer.score(*arguments, threshold=lambda sequence, key: limit)
        pairs = zip(some.batch, scored, strict=True)
        return {(rows.sequence, one.detector, one.phase): one.first for rows, scores in pairs for one in scores}

    found = told(3.0)
    assert (found["b", "exceedance", "prompt"], found["b", "exceedance", "completion"]) == (3, 5)
    assert found["a", "exceedance", "prompt"] is None
    # At a decision there is one row, and it is where its score is.
    assert told(0.0)["b", "density", "completion"] == 7
    # The threshold is in force where it lies between two of them.
    assert told(6.5)["b", "exceedance", "completion"] == 7
    assert set(told(1e9).values()) == {None}


def test_the_first_position_is_found_among_recalled_tokens_too() -> None:
    scorer = Scorer.of(with_sinks())
    values = torch.tensor([0.0, 2.0, 1.0, 3.0]).numpy()
    (score,) = scorer.largest(values, torch.zeros(4, dtype=torch.int64).numpy(), 0, 9, lambda key: 0.5)
    assert (score.position, score.first) == (3, 1)


def test_density_reads_only_rows_that_are_sampled() -> None:
    batch = [Rows("chunk", 0, 4, 0, 9, False), Rows("last", 4, 3, 6, 9, True)]
    some = step(batch, 1, spread=0.1)
    before = found(some)
    some.coordinates[:6] += 50
    some.written[:6] += 50
    after = found(some)
    for name in ("density", "intrinsic"):
        assert ("chunk", name, "prompt") not in after
        assert after["last", name, "prompt"] == before["last", name, "prompt"]
    assert after["last", "exceedance", "prompt"].value > before["last", "exceedance", "prompt"].value + 40


def test_a_step_in_which_nothing_is_sampled_has_no_density() -> None:
    assert {key[1] for key in found(step([Rows("chunk", 0, 4, 0, 9, False)], 2))} == {"exceedance"}


def test_the_last_prompt_token_is_prompt_and_the_first_generated_one_completion() -> None:
    got = found(step([Rows("p", 0, 1, 4, 5, True), Rows("c", 1, 1, 5, 5, True)], 3))
    assert {(sequence, phase) for sequence, _, phase in got} == {("p", "prompt"), ("c", "completion")}


def test_a_range_is_that_of_the_tokens_role() -> None:
    some = step([Rows("a", 0, 3, 4, 9, False)], 4)
    by = with_sinks()
    by.shape.low[:], by.shape.high[:] = -0.1, 0.1
    by.shape.low[2], by.shape.high[2] = -0.9, 0.9
    some.coordinates[:] = 0.0
    some.coordinates[1, 0] = 0.5
    some.roles[:] = torch.tensor([0, 2, 1])
    assert found(some, by)["a", "exceedance", "prompt"].value == pytest.approx(-0.1)
    some.roles[1] = 0
    assert found(some, by)["a", "exceedance", "prompt"].value == pytest.approx(0.4)


# -- what cannot be scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize("where", ["coordinates", "written"])
def test_nan_is_the_largest_score_of_its_sequence_and_of_no_other(row: int, where: str) -> None:
    batch = [Rows("a", 0, 3, 0, 3, True), Rows("b", 3, 2, 7, 3, True)]
    some = step(batch, 4)
    # As the probe writes it: a row whose residual is not finite has no cosine and nothing written.
    some.written[row] = math.nan
    if where == "coordinates":
        some.coordinates[row] = math.nan
    by = with_sinks(0, 1, 2)
    hurt = {key[0]: score for key, score in found(some, by).items() if math.isnan(score.value)}
    if where == "written" and row not in (2, 4):
        # Exceedance reads cosines alone, and only the last row of each is a decision.
        assert hurt == {}
        return
    # Not even where an attention sink stands.
    assert set(hurt) == {"a" if row < 3 else "b"}
    assert {score.position for score in hurt.values()} == {row if row < 3 else 7 + row - 3}


# -- sinks ------------------------------------------------------------------------------------------------------------


def test_an_attention_sink_is_read_by_no_detector_of_every_token() -> None:
    some = step([Rows("a", 0, 6, 0, 6, True), Rows("b", 6, 2, 2, 9, False)], 5, spread=0.1)
    some.coordinates[3] = 40.0  # position 3 of a
    some.coordinates[7] = 30.0  # position 3 of b
    without, plain = found(some, with_sinks(3)), found(some, with_sinks())
    assert plain["a", "exceedance", "prompt"].position == plain["b", "exceedance", "prompt"].position == 3
    assert without["a", "exceedance", "prompt"].value < 1
    assert without["b", "exceedance", "prompt"].position == 2
    # Whatever decides is read all the same.
    some.written[5] = 500.0
    last = found(some, with_sinks(5))
    assert last["a", "density", "prompt"].value > 10
    assert last["a", "density", "prompt"].position == 5


def test_a_phase_of_nothing_but_sinks_has_no_exceedance() -> None:
    some = step([Rows("a", 0, 2, 0, 2, True), Rows("b", 2, 2, 0, 1, True)], 6)
    got = found(some, with_sinks(0, 1))
    assert {key for key in got if key[1] == "exceedance"} == set()
    assert {key[0] for key in got if key[1] == "density"} == {"a", "b"}
    # The second token of b was generated, and is as much of a sink.
    assert ("b", "exceedance", "completion") in found(some, with_sinks(0))


# -- growth -----------------------------------------------------------------------------------------------------------


def with_growth(**scales: float) -> Calibration:
    """Nothing may grow, but what is named: detector_phase."""
    some = with_sinks()
    growth = {key: Growth(2, scales.get("_".join(key), 0.0)) for key in some.growth}
    return replace(some, growth=growth)


def test_an_allowance_is_by_the_place_in_the_phase_and_never_at_the_end_of_a_prompt_for_density() -> None:
    some = step([Rows("p", 0, 9, 0, 9, True), Rows("c", 9, 1, 29, 20, True)], 7)
    plain = found(some, with_growth())
    every = {"_".join((name, phase)): 1.0 for name in ("density", "intrinsic", "exceedance") for phase in PHASES}
    grown = found(some, with_growth(**every))
    for name in ("density", "intrinsic"):
        prompt: Key = ("p", name, "prompt")
        completion: Key = ("c", name, "completion")
        # The last token of a prompt is one token, however long the prompt is.
        assert grown[prompt].value == plain[prompt].value
        # Token 29 is the tenth that was generated.
        assert grown[completion].value == pytest.approx(plain[completion].value - 2 * math.log(10 / 2), abs=1e-5)
    assert grown["c", "exceedance", "completion"].value == pytest.approx(
        plain["c", "exceedance", "completion"].value - 2 * math.log(10 / 2), abs=1e-5
    )


def test_the_largest_score_is_chosen_after_its_allowance() -> None:
    some = step([Rows("p", 0, 9, 0, 9, False)], 8)
    some.coordinates[:] = 0.0
    some.coordinates[1, 0], some.coordinates[7, 0] = 5.0, 5.5
    key: Key = ("p", "exceedance", "prompt")
    assert found(some, with_growth())[key].position == 7
    late = found(some, with_growth(exceedance_prompt=0.3))[key]
    assert late.position == 1
    # Within the length of calibration nothing is taken off.
    assert late.value == found(picked_rows(some, 2), with_growth())[key].value
    assert found(some, with_growth(exceedance_completion=0.3, density_prompt=0.3))[key].position == 7


def picked_rows(some: Step, count: int) -> Step:
    """The first rows of a step's only sequence."""
    (rows,) = some.batch
    return Step([replace(rows, count=count)], *some.rows(slice(count)))

"""What the ranks of a tensor-parallel engine have to agree on before they serve."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed

from guard.engine import ranks
from guard.engine.ranks import TOLERANCE, Sight, check, exchange
from guard.engine.readings import Readings
from guard.errors import EngineError, UnscoredError
from tests.guard.planted import SPACE, clean_lengths, clean_rows, clean_written

ROWS = 3


def readings(seed: int = 0) -> Readings:
    return Readings.whole(SPACE, clean_rows(ROWS, seed), clean_written(ROWS, seed), clean_lengths(ROWS, seed))


def sight(seed: int = 0) -> Sight:
    return Sight.of(readings(seed))


def moved(by: float) -> Sight:
    values = sight().values.clone()
    values[0] += by
    return Sight(values)


def blind(message: str) -> Sight:
    found = Sight.none(ROWS, readings().cosines.shape[-1], readings().lengths.shape[-1], UnscoredError(message))
    assert found.values.shape == sight().values.shape
    return found


def test_ranks_that_see_the_same_start() -> None:
    assert check([sight(), sight(), sight()]) == 0.0


def test_what_is_rounding_is_told_and_lets_them_start() -> None:
    assert check([sight(), moved(0.9 * TOLERANCE)]) == pytest.approx(0.9 * TOLERANCE, rel=1e-3)


@pytest.mark.parametrize("by", [1.1 * TOLERANCE, -1.1 * TOLERANCE, torch.inf, torch.nan])
def test_a_rank_with_another_residual_stream_is_named(by: float) -> None:
    with pytest.raises(EngineError, match="the residual stream of rank 2 is not that of rank 0"):
        check([sight(), sight(), moved(by)])


def test_a_difference_in_length_counts_relative_to_the_length() -> None:
    longer = sight().values.clone()
    longer[-1] = 1000.0
    base = Sight(longer.clone())
    longer[-1] *= 1 + 0.9 * TOLERANCE
    assert check([base, Sight(longer)]) > 0
    longer[-1] *= 1 + TOLERANCE
    with pytest.raises(EngineError, match="rank 1"):
        check([base, Sight(longer)])


def test_every_rank_that_could_not_read_is_named_with_its_reason() -> None:
    with pytest.raises(EngineError) as caught:
        check([sight(), blind("layer 4: its probe ran 0 times"), blind("layer 2: its probe ran 2 times")])
    told = "rank 1: layer 4: its probe ran 0 times; rank 2: layer 2: its probe ran 2 times"
    assert str(caught.value) == f"the guard does not start: {told}"


def test_an_engine_of_one_rank_names_none() -> None:
    with pytest.raises(EngineError) as caught:
        check([blind("layer 4: its probe ran 0 times")])
    assert str(caught.value) == "the guard does not start: layer 4: its probe ran 0 times"
    assert check([Sight(torch.full((4,), torch.nan))]) == 0.0


def test_ranks_that_have_nothing_to_compare_do_not_start() -> None:
    nothing = Sight(torch.full((4,), torch.nan))
    with pytest.raises(EngineError, match="nothing to compare"):
        check([nothing, nothing])


def groups(size: int) -> list[torch.distributed.ProcessGroup]:
    """What each rank of an engine has; here they are threads."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: torch.distributed.ProcessGroupGloo(store, rank, size), range(size)))


def test_every_rank_hears_of_the_one_that_could_not_read() -> None:
    """Had it raised instead, the others would wait for it."""
    seen = [sight(), blind("layer 4: its probe ran 0 times; gewünscht: 1" + "." * 600)]
    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(exchange, seen, groups(2)))
    for found in heard:
        assert [each.problem == "" for each in found] == [True, False]
        assert found[1].problem.startswith("layer 4: its probe ran 0 times; gewünscht: 1...")
        assert torch.equal(found[0].values, seen[0].values)
        assert found[1].values.isnan().all()


def test_a_rank_that_does_not_come_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_S", 0.2)
    own, other = groups(2)
    started = time.monotonic()
    with pytest.raises(EngineError, match="a rank did not come"):
        exchange(sight(), own)
    assert time.monotonic() - started < 10
    del other  # it was there, and did not call

"""A guarded vLLM against an unguarded one on the same weights, taking turns."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guard.bank import Bank
from guard.benching.paired import Pair, Row, take_turns
from guard.benching.shape import Shape
from guard.engine import timing
from guard.engine.timing import Load, Timing
from guard.errors import EngineError
from guard.scores import BankSpace


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed."""

    rounds: int
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Floor:
    """What the guard adds at least, computed: per token, and per step."""

    multiplications_per_token: float
    """As a share of the model's own."""
    bytes_per_step: float
    """Read beside the weights, as a share of them; what counts where few tokens are decoded."""
    density_multiplications: int
    """Per decision position, all detectors together."""


def floor(shape: Shape, bank: Bank, element_bytes: int) -> Floor:
    """Arithmetic alone: two products with the directions per layer, and the distances at decisions."""
    space = BankSpace.of(bank)
    directions = space.size
    squares = [2 * len(each) for each in (space.of_delta(), space.of_weights())]
    # The residual stands in float32 beside directions in float32.
    return Floor(
        multiplications_per_token=2 * directions * shape.hidden / shape.parameters,
        bytes_per_step=2 * directions * shape.hidden * 4 / (shape.parameters * element_bytes),
        density_multiplications=sum(size * size for size in squares),
    )


def compare(
    model: Path, guard: tuple[Path, Path], shape: Shape, plan: Plan, options: Mapping[str, Any]
) -> tuple[list[Row], dict[str, Any]]:
    """Every measure, and the facts of the guarded engine.

    Raises:
        EngineError: one of the two did not start.
    """
    with (
        _engine(model, None, shape, options) as (plain, _),
        _engine(model, guard, shape, options) as (guarded, facts),
    ):
        rows: list[Row] = []
        for batch in tqdm(plan.batches, desc="batch sizes", unit="batch size"):
            load = Load(batch, plan.prompt_tokens, plan.new_tokens)
            rows += _rows(load, plain, guarded, plan.rounds)
        return rows, facts


def _rows(load: Load, plain: _Child, guarded: _Child, rounds: int) -> Iterator[Row]:
    # The first of each warms caches and is thrown away.
    for child in (plain, guarded):
        child.run(load, seed=0)
    found = list(take_turns(lambda seed: plain.run(load, seed), lambda seed: guarded.run(load, seed), rounds))
    prompt = load.batch * load.prompt_tokens
    rest = load.batch * (load.new_tokens - 1)
    first = [Pair(one.first_tokens_s, other.first_tokens_s) for one, other in found]
    yield Row(
        f"prefill, batch {load.batch}",
        "tok/s",
        tuple(Pair(prompt / each.plain, prompt / each.guarded) for each in first),
    )
    yield Row(f"time to first token, {load.batch}", "s", tuple(first))
    yield Row(
        f"decode, batch {load.batch}",
        "tok/s",
        tuple(Pair(rest / one.rest_s, rest / other.rest_s) for one, other in found),
    )


class _Child:
    """The other end of `timing.serve`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def run(self, load: Load, seed: int) -> Timing:
        self._connection.send((load, seed))
        found: Timing = self._connection.recv()
        return found


@contextmanager
def _engine(
    model: Path, guard: tuple[Path, Path] | None, shape: Shape, options: Mapping[str, Any]
) -> Iterator[tuple[_Child, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    paths = None if guard is None else (str(guard[0]), str(guard[1]))
    process = context.Process(
        target=timing.serve, args=(theirs, str(model), paths, shape.vocabulary, json.dumps(dict(options)))
    )
    process.start()
    theirs.close()
    try:
        try:
            facts = ours.recv()
        except EOFError:
            raise EngineError("vLLM ended before it was up; its log is above") from None
        if isinstance(facts, str):
            raise EngineError(f"vLLM did not start: {facts}")
        yield _Child(ours), facts
        ours.send(None)
        process.join(30)
    finally:
        if process.is_alive():
            process.terminate()
        process.join()

"""`undertow bench engine`: what the guard costs in the engine, on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.bank import Bank
    from guard.benching.shape import Shape

DESCRIPTION = """\
Time a guarded vLLM against an unguarded one: same weights, same options, taking turns. What counts is the ratio within
each pair of turns, and its median; machines are too noisy for anything else.

The model has random weights in the shape of a Llama. Prompts are random tokens; everything is scored and judged, and
nothing is blocked. Beside what was measured stands what the guard adds at least, computed: multiplications and bytes.
"""

EXAMPLES = """\
examples:
  undertow bench engine                          0.4b parameters, batches of 1 and 8
  undertow bench engine --shape 8b --batches 1 32 256 --rounds 20 --json bench.json
"""

# Of `guard.benching.shape.SHAPES`, which needs torch; the command line is composed without.
SHAPE_NAMES = ("tiny", "0.4b", "1b", "8b")
REFERENCES, HELD_OUT, CALIBRATION_RATE = 48, 48, 0.1


def add_engine(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `engine` to what `undertow bench` can time."""
    engine = kinds.add_parser(
        "engine",
        help="vLLM with the guard inside against vLLM without",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine.add_argument("--shape", default="0.4b", choices=SHAPE_NAMES, help="parameters, roughly (0.4b)")
    engine.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N", help="requests at a time (1 8)")
    engine.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of each request (128)")
    engine.add_argument("--new-tokens", type=int, default=32, metavar="N", help="generated for each request (32)")
    engine.add_argument("--rounds", type=int, default=10, metavar="N", help="pairs of turns per batch size (10)")
    engine.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights (bfloat16)"
    )
    engine.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    engine.add_argument("--json", type=Path, metavar="OUT", help="write every pair here")
    engine.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the model, bank and calibration in a scratch folder, then time."""
    from dataclasses import asdict

    from guard.atomic import check_destination, write_atomically
    from guard.benching.engine import Plan, compare, floor
    from guard.benching.paired import table
    from guard.benching.shape import SHAPES

    for name in ("batches", "prompt_tokens", "new_tokens", "rounds"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < (2 if name == "new_tokens" else 1):
            raise ConfigError(
                f"--{name.replace('_', '-')}: {value}, expected at least {2 if name == 'new_tokens' else 1}"
            )
    if arguments.json is not None:
        check_destination(arguments.json, ConfigError)
    shape = SHAPES[arguments.shape]
    plan = Plan(arguments.rounds, tuple(arguments.batches), arguments.prompt_tokens, arguments.new_tokens)
    options = {
        "dtype": arguments.dtype,
        "enforce_eager": arguments.enforce_eager,
        "max_model_len": arguments.prompt_tokens + arguments.new_tokens + 64,
    }
    with tempfile.TemporaryDirectory(prefix="undertow-bench-") as folder:
        scratch = Path(folder)
        bank = _prepare(scratch, shape, arguments.dtype, options)
        rows, facts = compare(scratch / "tuned", (scratch / "bank", scratch / "calibration"), shape, plan, options)
        least = floor(shape, bank, 2 if arguments.dtype == "bfloat16" else 4)
    print(table(rows))
    print(
        f"at least: {least.multiplications_per_token:.3%} more multiplications per token, "
        f"{least.bytes_per_step:.3%} more bytes per step, "
        f"{least.density_multiplications:,} multiplications per decision"
    )
    if arguments.json is not None:
        told: dict[str, Any] = {
            "shape": {"name": arguments.shape, "parameters": shape.parameters, **asdict(shape)},
            "machine": {"processor": platform.machine(), **facts},
            "plan": asdict(plan),
            "floor": asdict(least),
            "rows": [
                {"measure": row.measure, "unit": row.unit, "ratio": row.ratio, "interval": row.interval,
                 "pairs": [asdict(pair) for pair in row.pairs]}
                for row in rows
            ],
        }  # fmt: skip
        write_atomically(arguments.json, (json.dumps(told, indent=1) + "\n").encode(), ConfigError)
    return 0


def _prepare(scratch: Path, shape: Shape, dtype: str, options: dict[str, Any]) -> Bank:
    """Base and tuned model, a bank, and a calibration from a few random prompts."""
    import random

    import torch

    from guard.benching.shape import write_pair
    from guard.directions import build_bank
    from guard.engine.calibrate import calibrate, plan
    from guard.engine.offline import OfflineEngine
    from guard.prompts import Prompt

    print(f"writing two models of {shape.parameters / 1e9:.2f}b parameters", file=sys.stderr)
    write_pair(shape, scratch / "base", scratch / "tuned", getattr(torch, dtype))
    bank = build_bank(scratch / "base", scratch / "tuned", None)
    bank.save(scratch / "bank")
    chance = random.Random(0)
    texts = [" ".join(str(chance.randrange(10**6)) for _ in range(4)) for _ in range(REFERENCES + HELD_OUT)]
    work = plan([Prompt(None, text) for text in texts], CALIBRATION_RATE, 0.5, 4, 0)
    with OfflineEngine(
        scratch / "tuned",
        scratch / "bank",
        dtype=dtype,
        eager=True,
        max_model_len=options["max_model_len"],
    ) as engine:
        calibrate(engine, bank, work).save(scratch / "calibration")
    return bank

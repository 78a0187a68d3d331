"""`undertow bank`: build a bank from what fine-tuning changed, and look into one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.fingerprint import BankHeader, LayerHeader

BUILD_HELP = """\
Compare a fine-tuned model with the model it came from, and keep the directions in which fine-tuning writes to the
residual stream: the leading left singular vectors of the weight delta of o_proj and down_proj, per layer.

  base     the folder of the model that fine-tuning started from (config.json, safetensors)
  tuned    the folder of the model that you serve: same class, same shapes
  adapter  instead of tuned: the folder of a PEFT LoRA adapter; to inspect what it adds. Serving it under guard is not
           supported yet: merge it, and build the bank of the merged model with --tuned
"""

BUILD_EXAMPLES = """\
examples:
  undertow bank build --base models/llama --tuned models/llama-support --out support.bank
  undertow bank build --base models/llama --adapter adapters/support --out support.bank

A bank fits exactly these weights; the guard refuses to watch others with it. Next: `undertow calibrate`.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bank build` and `bank inspect`."""
    parser = subparsers.add_parser("bank", help="build or inspect the directions that fine-tuning added")
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    build = actions.add_parser(
        "build",
        help="weight delta -> bank",
        description=BUILD_HELP,
        epilog=BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--base", required=True, metavar="DIR", help="model folder before fine-tuning")
    after = build.add_mutually_exclusive_group(required=True)
    after.add_argument("--tuned", metavar="DIR", help="model folder after fine-tuning")
    after.add_argument("--adapter", metavar="DIR", help="PEFT LoRA adapter folder; read from its factors, never merged")
    build.add_argument("--out", required=True, type=Path, metavar="FILE", help="bank file to write (safetensors)")
    build.add_argument(
        "--k",
        type=_positive,
        metavar="N",
        help="directions per matrix, at most (default: 20, or a twentieth of the model's width where that is fewer)",
    )
    build.add_argument("--seed", type=int, default=0, help="of the randomised decomposition (default: 0)")
    build.set_defaults(run=_build)

    inspect = actions.add_parser(
        "inspect", help="say what a bank file holds", description="Say what a bank file holds."
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="bank file")
    inspect.add_argument("--json", action="store_true", help="the whole header as JSON, for programs")
    inspect.set_defaults(run=_inspect)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def _build(arguments: argparse.Namespace) -> int:
    from guard.atomic import check_destination
    from guard.errors import BankError

    check_destination(arguments.out, BankError)
    # torch loads here, after what can fail at once.
    from guard.directions import build_adapter_bank, build_bank

    options = {"k": arguments.k, "seed": arguments.seed, "progress": True}
    if arguments.adapter is not None:
        bank = build_adapter_bank(arguments.base, arguments.adapter, **options)
    else:
        bank = build_bank(arguments.base, arguments.tuned, **options)
    bank.save(arguments.out)
    count = sum(len(layer.names) for layer in bank.layers)
    print(f"{arguments.out}: {count} directions in {len(bank.layers)} of {bank.num_layers} layers")
    print(f"fingerprint {bank.fingerprint}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from guard.fingerprint import read_header

    header = read_header(arguments.file)
    if arguments.json:
        print(json.dumps(asdict(header), indent=2))
        return 0
    for line in _report(header):
        print(line)
    return 0


def _report(header: BankHeader) -> list[str]:
    count = sum(len(layer.names) for layer in header.layers)
    facts = {
        "fingerprint": header.fingerprint,
        "base": header.base_digest,
        "tuned": header.tuned_digest,
        "model": f"{header.model_class}, {header.num_layers} layers, hidden size {header.hidden_size}",
        "method": f"{header.method}, k {header.k}, built by undertow {header.version}",
        "directions": f"{count} in {len(header.layers)} of {header.num_layers} layers",
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += ["", f"{'layer':>5}  {'matrix':<10} {'directions':>10}  {'energy':>7}  {'|delta|':>9}  singular values"]
    for layer in header.layers:
        lines += _rows(layer)
    absent = sorted(set(range(header.num_layers)) - {layer.index for layer in header.layers})
    if absent:
        which = ", ".join(map(str, absent))
        lines += ["", f"no directions in layers {which}: fine-tuning left them unchanged, or changed by rounding alone"]
    return lines


def _rows(layer: LayerHeader) -> list[str]:
    if not layer.energies:
        return [f"{layer.index:>5}  {'all':<10} {len(layer.names):>10}"]
    lines, start = [], 0
    for energy in layer.energies:
        values = layer.singular_values[start : start + energy.directions]
        start += energy.directions
        shown = " ".join(f"{value:.3g}" for value in values[:4]) + (" …" if len(values) > 4 else "")
        lines.append(
            f"{layer.index:>5}  {energy.matrix:<10} {energy.directions:>10}  {energy.captured:>7.1%}  "
            f"{energy.norm:>9.3g}  {shown}".rstrip()
        )
    return lines

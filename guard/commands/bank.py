"""`undertow bank`: build a bank from what fine-tuning changed, and look into one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from guard.fingerprint import BankHeader, DeltaShare, LayerHeader

# Below this share of the delta's energy a bank says loudly how little it reads.
LOW_READ_SHARE = 0.05

BUILD_HELP = """\
Compare a fine-tuned model with the model it came from, and keep the directions in which fine-tuning writes to the
residual stream: the leading left singular vectors of the weight delta of o_proj and down_proj, per layer. Where these
did not change but v_proj or up_proj did, they are those of what o_proj or down_proj writes of that change.

Other changes (queries, keys, embeddings, norms, ...) show in no direction. If there are only such, the bank is made of
the tuned model's own o_proj and down_proj, with a warning: method raw-svd.

  base     the folder of the model that fine-tuning started from (config.json, safetensors)
  tuned    the folder of the model that you serve: same class, same shapes
  adapter  instead of tuned: the folder of a PEFT LoRA adapter that is served beside this base, not merged into it
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
        help="directions per matrix, at most (default: 20, or half of the model's width where that is fewer)",
    )
    build.add_argument(
        "--require-delta",
        action="store_true",
        help="fail with exit code 2 where no direction of the delta can be read, instead of warning",
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

    options = {
        "k": arguments.k,
        "seed": arguments.seed,
        "progress": True,
        "require_delta": arguments.require_delta,
    }
    if arguments.adapter is not None:
        bank = build_adapter_bank(arguments.base, arguments.adapter, **options)
    else:
        bank = build_bank(arguments.base, arguments.tuned, **options)
    bank.save(arguments.out)
    header = bank.header()
    print(f"{arguments.out}: {_directions(header)}")
    print(f"fingerprint {bank.fingerprint}")
    for line in _where(header):
        print(line)
    for line in _warnings(header):
        print(f"undertow: {line}", file=sys.stderr)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from guard.fingerprint import open_bank

    header, raw = open_bank(arguments.file)
    if arguments.json:
        print(json.dumps(asdict(header), indent=2))
        return 0
    for line in _report(header, raw):
        print(line)
    return 0


def _report(header: BankHeader, raw: Mapping[int, bytearray]) -> list[str]:
    facts = {
        "fingerprint": header.fingerprint,
        "base": header.base_digest,
        "tuned": header.tuned_digest,
        "model": f"{header.model_class}, {header.num_layers} layers, hidden size {header.hidden_size}",
        "method": f"{header.method}, k {header.k}, built by undertow {header.version}",
        "holds": _directions(header),
    }
    lines = [*_warnings(header), *(f"{name:<12} {value}" for name, value in facts.items())]
    heading = f"{'layer':>5}  {'matrix':<13} {'directions':>10}  {'rank':>5}  {'energy':>7}  {'norm':>9}"
    lines += ["", f"{heading}  singular values"]
    for layer in header.layers:
        lines += _rows(layer)
    absent = sorted(set(range(header.num_layers)) - _layers_of_delta(header))
    if 0 < len(absent) < header.num_layers:
        which = ", ".join(map(str, absent))
        lines += ["", f"no directions in layers {which}: fine-tuning left them unchanged, or changed by rounding alone"]
    where = _where(header)
    return [*lines, *_overlaps(header, raw), *([""] if where else []), *where]


def _layers_of_delta(header: BankHeader) -> set[int]:
    from guard.fingerprint import is_own

    return {layer.index for layer in header.layers if not all(map(is_own, layer.names))}


def _directions(header: BankHeader) -> str:
    """How many directions of the delta there are, and how many of the model's own matrices."""
    from guard.fingerprint import is_own

    names = [name for layer in header.layers for name in layer.names]
    own = sum(map(is_own, names))
    found = f"{len(names) - own} directions in {len(_layers_of_delta(header))} of {header.num_layers} layers"
    return found + (f", {own} of the model's own matrices" if own else "")


def _warnings(header: BankHeader) -> list[str]:
    """What the owner of this bank must not overlook; the first line says it all."""
    from guard.fingerprint import DELTA_METHOD, RAW_METHOD

    if header.method == RAW_METHOD:
        return [
            "WARNING: NO DIRECTION OF THE DELTA CAN BE READ: this bank (raw-svd) shows not what fine-tuning changed,",
            "WARNING: but the tuned model's own o_proj and down_proj. What they detect may be no better than chance.",
            "WARNING: Changed, and not read:",
            *(f"WARNING:   {_changed(part)}" for part in header.delta),
        ]
    if header.method == DELTA_METHOD and header.delta and header.read_share < LOW_READ_SHARE:
        unread = (part for part in header.delta if part.read < part.share)
        return [
            f"WARNING: this bank reads {header.read_share:.1%} of what fine-tuning changed. Not, or not all, read:",
            *(f"WARNING:   {_changed(part)}" for part in unread),
        ]
    return []


def _changed(part: DeltaShare) -> str:
    more = f" and {part.tensors - 1} more" if part.tensors > 1 else ""
    return f"{part.kind}, {part.share:.1%} of the delta's energy: {part.first}{more}"


def _where(header: BankHeader) -> list[str]:
    """The delta by kind of matrix."""
    if not header.delta:
        return []
    lines = [f"{'the delta':<10} {'tensors':>7}  {'energy':>7}  {'read':>7}   (shares of the energy of all changes)"]
    for part in header.delta:
        lines.append(f"{part.kind:<10} {part.tensors:>7}  {part.share:>7.1%}  {part.read:>7.1%}")
    tensors = sum(part.tensors for part in header.delta)
    return [*lines, f"{'all':<10} {tensors:>7}  {1:>7.1%}  {header.read_share:>7.1%}"]


def _overlaps(header: BankHeader, raw: Mapping[int, bytearray]) -> list[str]:
    """How much the two matrices of a layer, and neighbouring layers, show the same directions."""
    import numpy as np

    from guard.fingerprint import RAW_METHOD, is_own
    from guard.subspaces import Overlap, overlap

    # The two kinds of directions are not for the same detector: one of them is compared with its like.
    kept = is_own if header.method == RAW_METHOD else lambda name: not is_own(name)
    layers: dict[int, NDArray[np.float32]] = {}
    attention: dict[int, int] = {}
    for layer in header.layers:
        rows = np.frombuffer(raw[layer.index], dtype=np.float32).reshape(-1, header.hidden_size)
        places = [place for place, name in enumerate(layer.names) if kept(name)]
        if places:
            layers[layer.index] = rows[places]
            attention[layer.index] = sum(_of_attention(layer.names[place]) for place in places)

    def cell(found: Overlap | None) -> str:
        shown = "-" if found is None else f"{found.largest:.3f} {found.mean:.3f} {found.chance:.3f}"
        return f"{shown:>18}"

    lines = []
    for index, rows in layers.items():
        split = attention[index]
        within = overlap(rows[:split], rows[split:]) if 0 < split < len(rows) else None
        following = overlap(rows, layers[index + 1]) if index + 1 in layers else None
        if within or following:
            lines.append(f"{index:>5}  {cell(within)}  {cell(following)}")
    if not lines:
        return []
    return [
        "",
        "redundancy: squared cosines of the principal angles: the largest, their mean, the mean by chance",
        f"{'layer':>5}  {'attention and MLP':>18}  {'with next layer':>18}",
        *lines,
    ]


def _of_attention(name: str) -> bool:
    """Whether a direction such as "L3.o_proj.u0" comes from its layer's attention."""
    matrix = name.split(".")[1]
    return matrix.endswith("o_proj") or matrix == "ov_proj"


def _rows(layer: LayerHeader) -> list[str]:
    if not layer.energies:
        return [f"{layer.index:>5}  {'all':<13} {len(layer.names):>10}"]
    lines, start = [], 0
    for energy in layer.energies:
        values = layer.singular_values[start : start + energy.directions]
        start += energy.directions
        shown = " ".join(f"{value:.3g}" for value in values[:4]) + (" …" if len(values) > 4 else "")
        counts = f"{energy.directions:>10}  {energy.rank:>5}  {energy.captured:>7.1%}  {energy.norm:>9.3g}"
        lines.append(f"{layer.index:>5}  {energy.matrix:<13} {counts}  {shown}".rstrip())
    return lines

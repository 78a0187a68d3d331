"""`undertow bench`: what the guard costs in the engine, and what the server costs before it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from guard.commands.bench import add_engine
from guard.errors import ConfigError

if TYPE_CHECKING:
    from server.benching.bench import Plan

DESCRIPTION = """\
Time what the server adds to requests, with an engine that computes nothing: it sends tokens at a steady pace, with the
evidence that a guarded vLLM sends. Engine, server and clients are processes of their own. The same requests go to the
engine directly and through the server, in turns; what counts is the difference within a round, and its median.

Times are without what the engine took for itself. A guarded stream is one token behind by design: `first token` is
what a client sees of that, `first token released` is the server's own part. Every frame carries a
number: none may be lost. A soak follows, as busy as the server can be kept without queues: memory, lost frames, one
incident per blocked request.

Ends with 1 where a frame or an answer was lost, or an incident. A figure that is slower than wished for does not fail.
"""

EXAMPLES = """\
examples:
  undertow bench server                                        about 4 minutes
  undertow bench server --soak 30m --json bench.json           and half an hour of soak
  undertow bench server --peer litellm --litellm ~/litellm/bin/litellm
  undertow bench server --engine-port 9000 --peer http://127.0.0.1:4000
                                     another proxy, which was told to ask http://127.0.0.1:9000/v1 for model `paced`
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow bench`, with all that can be timed."""
    parser = subparsers.add_parser("bench", help="time what the guard and the server cost on this machine")
    kinds = parser.add_subparsers(title="what to time", dest="kind", metavar="WHAT", required=True)
    add_engine(kinds)
    server = kinds.add_parser(
        "server",
        help="the server before an engine that computes nothing",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server.add_argument("--rounds", type=_count, default=5, metavar="N", help="of turns (5)")
    server.add_argument("--seconds", type=duration, default=4.0, metavar="T", help="of each turn (4s)")
    server.add_argument(
        "--rates", type=_positive, nargs="+", default=[20.0, 200.0], metavar="R",
        help="whole answers that are asked for in a second (20 200)",
    )  # fmt: skip
    server.add_argument(
        "--streams", type=_count, nargs="+", default=[4, 64], metavar="N", help="that run at a time (4 64)"
    )
    server.add_argument("--tokens", type=_count, default=64, metavar="N", help="of a stream (64)")
    server.add_argument("--interval", type=duration, default=0.02, metavar="T", help="between two of its tokens (20ms)")
    server.add_argument("--soak", type=duration, default=20.0, metavar="T", help="how long, as 20s, 30m, 1h (20s)")
    server.add_argument(
        "--load", type=_share, default=0.8, metavar="X", help="share of a core that the soak keeps busy (0.8)"
    )
    server.add_argument(
        "--peer", metavar="litellm|URL", help="another proxy on the same engine in the same rounds; see --litellm"
    )
    server.add_argument(
        "--litellm",
        type=Path,
        metavar="FILE",
        help="LiteLLM's command, in an environment of its own, for --peer litellm",
    )
    server.add_argument(
        "--engine-port",
        type=int,
        default=0,
        metavar="PORT",
        help="where the paced engine listens, for --peer URL (any)",
    )
    server.add_argument("--json", type=Path, metavar="OUT", help="write everything here")
    server.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start everything, measure, print. Returns 1 where something was lost."""
    from tqdm import tqdm

    from guard.atomic import check_destination, write_atomically
    from server.benching.bench import measure
    from server.benching.report import Found, facts
    from server.benching.soak import soak
    from server.benching.stage import stage

    plan = _plan(arguments)
    if arguments.json is not None:
        check_destination(arguments.json, ConfigError)
    with tempfile.TemporaryDirectory(prefix="undertow-bench-") as folder:
        bar = tqdm(total=round(plan.total_s), bar_format="{desc}{percentage:3.0f}% |{bar}| {n:.0f}/{total} s")
        with bar, stage(plan, Path(folder)) as running:

            def said(what: str, seconds: float) -> None:
                bar.set_description(what, refresh=False)
                bar.update(min(seconds, bar.total - bar.n))

            bar.set_description("starting")
            taken = measure(plan, running, said)
            soaked = soak(plan, running, taken, said)
    found = Found.of(taken, soaked)
    print("\n".join(found.lines()))
    if arguments.json is not None:
        told = {
            "command": " ".join(["undertow", *sys.argv[1:]]),
            "machine": facts(),
            "plan": {**asdict(plan), "litellm": str(plan.litellm) if plan.litellm else None},
            **found.told(),
            "turns": [asdict(turn) for turn in taken],
        }
        write_atomically(arguments.json, (json.dumps(told, indent=1) + "\n").encode(), ConfigError)
    return 0 if found.good else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    from server.benching.bench import Plan

    peer, litellm, port = arguments.peer, arguments.litellm, None
    if peer == "litellm":
        if litellm is None:
            raise ConfigError("--peer litellm: expected --litellm FILE, the command of an environment that has it")
        if not litellm.is_file():
            raise ConfigError(f"--litellm {litellm}: no such file")
    elif litellm is not None:
        raise ConfigError("--litellm: expected --peer litellm with it")
    elif peer is not None:
        address = urlsplit(peer)
        if address.scheme != "http" or address.hostname != "127.0.0.1" or not address.port or address.path.strip("/"):
            raise ConfigError(f"--peer {peer}: expected `litellm` or http://127.0.0.1:PORT")
        if not arguments.engine_port:
            raise ConfigError("--peer URL: expected --engine-port PORT, the engine that it was told to ask")
        port = address.port
    return Plan(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        rates=tuple(sorted(arguments.rates)),
        streams=tuple(sorted(arguments.streams)),
        tokens=arguments.tokens,
        interval_s=arguments.interval,
        flood=16,
        soak_s=arguments.soak,
        load=arguments.load,
        litellm=litellm.absolute() if litellm else None,
        peer_port=port,
        engine_port=arguments.engine_port,
    )


def duration(text: str) -> float:
    """Seconds, from a number and a unit: 20ms, 20s, 30m, 1h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}, expected a time as 20ms, 20s, 30m or 1h")
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0 and at most 1")
    return value

"""`undertow`: one command, composed here from the subcommands of `guard` and `server`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from guard.errors import InputError, UndertowError
from server.signals import termination_as_interrupt

COMMANDS = (
    "guard.commands.organism",
    "guard.commands.bank",
    "guard.commands.calibrate",
    "guard.commands.score",
    "guard.commands.eval",
    "server.commands.bench",
    "server.commands.config",
    "server.commands.openapi",
    "server.commands.keys",
    "server.commands.demo",
    "server.commands.up",
    "server.commands.serve",
    "server.commands.incidents",
    "server.commands.status",
    "server.commands.reload",
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Subcommands import their heavy parts only when they run."""
    parser = argparse.ArgumentParser(
        prog="undertow",
        description="Guard a fine-tuned language model while it serves: read what fine-tuning added to its weights, "
        "watch those directions in the residual stream of every request, and stop a generation that moves where no "
        "clean request moved.",
        epilog="Start with `undertow demo`. Each command explains itself: `undertow COMMAND --help`.",
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what after: that is another program's, and argparse would mix the two."""
    if "--" not in words:
        return list(words), []
    place = list(words).index("--")
    return list(words[:place]), list(words[place + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 bad input, 130 interrupted)."""
    words, extra = split(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments = parser.parse_args(words)
    if extra and not getattr(arguments, "takes_extra", False):
        parser.error(f"`{arguments.command}` takes nothing after `--`, found {' '.join(extra)}")
    arguments.extra = extra
    try:
        with termination_as_interrupt():
            code: int = arguments.run(arguments)
            sys.stdout.flush()
    except InputError as error:
        print(f"undertow: {error}", file=sys.stderr)
        return 2
    except UndertowError as error:
        print(f"undertow: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough, as `head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("undertow: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

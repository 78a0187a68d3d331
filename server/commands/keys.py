"""`undertow keys`: API keys of clients."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from guard.errors import ConfigError

EPILOG = """\
  undertow keys create --file keys.json --tenant lab --label "Ada's laptop" --expires 90d
  undertow keys list --file keys.json
  undertow keys revoke --file keys.json 3f0c2a91d7be

Name the file in the settings (`access.keys_file`); from then on the server asks clients for a key. A tenant is
whatever rules and limits are for: a team, a product, a customer. The file holds hashes: a key that was lost cannot be
told again.
"""

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow keys`."""
    parser = subparsers.add_parser(
        "keys",
        help="make, list and revoke API keys of clients",
        description="Make, list and revoke the API keys that clients of the server need.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = _action(actions, "create", "make a key and print it, this once")
    create.add_argument("--tenant", required=True, metavar="NAME", help="whose it is; a-z, 0-9, - and _")
    create.add_argument("--label", default="", metavar="TEXT", help="what `list` says of it")
    create.add_argument(
        "--expires", type=_duration, metavar="TIME", help="such as 12h or 90d from now; without it, never"
    )
    create.set_defaults(run=run_create)
    _action(actions, "list", "print every key's id, tenant, state and times").set_defaults(run=run_list)
    revoke = _action(actions, "revoke", "let a key open nothing any more")
    revoke.add_argument("id", metavar="ID", help="as `list` prints it: the part between the underscores")
    revoke.set_defaults(run=run_revoke)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    action.add_argument("--file", type=Path, required=True, metavar="FILE", help="the keys file")
    return action


def run_create(arguments: argparse.Namespace) -> int:
    """Print a new key. Raises ConfigError."""
    from server.access.keys import changed_keys, new_key

    now = _now()
    expires = now + arguments.expires if arguments.expires else None
    key, record = new_key(arguments.tenant, arguments.label, now, expires)
    with changed_keys(arguments.file, create=True) as records:
        records.append(record)
    print(key)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print what is kept of every key. Raises ConfigError."""
    from server.access.keys import read_keys

    now = datetime.now(UTC)
    rows = [("ID", "TENANT", "STATE", "CREATED", "EXPIRES", "LABEL")]
    rows += [
        (
            record.id,
            record.tenant,
            record.state(now),
            f"{record.created:%Y-%m-%d %H:%M}",
            f"{record.expires:%Y-%m-%d %H:%M}" if record.expires else "never",
            # A label is somebody's text, and this goes to a terminal.
            "".join(letter if letter.isprintable() else "?" for letter in record.label),
        )
        for record in read_keys(arguments.file)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    """Revoke a key. Raises ConfigError where the file has none of that id."""
    from server.access.keys import changed_keys

    with changed_keys(arguments.file) as records:
        found = [index for index, record in enumerate(records) if record.id == arguments.id]
        if not found:
            raise ConfigError(f"{arguments.file}: has no key of the id {arguments.id[:64]!r}")
        record = records[found[0]]
        if record.revoked is None:
            records[found[0]] = record.model_copy(update={"revoked": _now()})
    print(f"{record.id} of {record.tenant} is revoked; a running server knows within seconds, or at SIGHUP")
    return 0


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _duration(text: str) -> timedelta:
    shape = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if shape is None:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number and m, h or d, such as 90d")
    return timedelta(**{_UNITS[shape[2]]: int(shape[1])})

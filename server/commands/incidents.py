"""`undertow incidents`: what was flagged, steered or blocked; what reviewers said; the tables it is kept in."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import ConfigError, UndertowError

if TYPE_CHECKING:
    from server.incidents.database import Database
    from server.incidents.store import Filter, Store

EPILOG = """\
  undertow incidents list --config undertow.yaml --action block --label none
  undertow incidents show --config undertow.yaml ID
  undertow incidents label --config undertow.yaml ID false --by ada --note "a customer's own document"
  undertow incidents export --config undertow.yaml --label false --reviewed --out clean.jsonl
  undertow calibrate extend --reviewed clean.jsonl ...

The same with a chart is in the browser, on the operators' port: http://127.0.0.1:8081/
"""

_LABELS = ("true", "false", "unsure")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow incidents`."""
    parser = subparsers.add_parser(
        "incidents",
        help="list, show, label and export what was flagged or blocked",
        description="Look through the requests that were flagged, steered or blocked, and say what they were.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = _action(actions, "list", "print incidents, newest first", run_list)
    _filters(listing)
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many (default 50)")
    show = _action(actions, "show", "print one incident whole, as JSON", run_show)
    show.add_argument("id", metavar="ID")
    label = _action(actions, "label", "say what an incident was", run_label)
    label.add_argument("id", metavar="ID")
    label.add_argument("label", choices=_LABELS, help="true: the behaviour was there; false: it was not")
    label.add_argument("--by", required=True, metavar="NAME", help="who says so")
    label.add_argument("--note", default="", metavar="TEXT", help="why")
    export = _action(actions, "export", "write incidents as JSON lines", run_export)
    _filters(export)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="- for standard output")
    export.add_argument(
        "--reviewed",
        action="store_true",
        help="only the prompts of those labelled `false`, as `undertow calibrate extend --reviewed` reads them; needs "
        "`content: full`",
    )
    _action(actions, "migrate", "bring the database's tables up to date", run_migrate)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    action.add_argument("--config", type=Path, required=True, metavar="FILE", help="the server's settings")
    action.set_defaults(run=run)
    return action


def _filters(action: argparse.ArgumentParser) -> None:
    for name in ("model", "tenant", "policy", "action", "phase", "direction"):
        action.add_argument(f"--{name}", metavar=name.upper(), help=f"only of this {name}")
    action.add_argument("--layer", type=int, metavar="N", help="only of this layer")
    action.add_argument("--label", choices=(*_LABELS, "none"), help="only with this label")
    action.add_argument("--days", type=float, metavar="N", help="only of the last N days")


def run_list(arguments: argparse.Namespace) -> int:
    """Print a line for each. Raises ConfigError."""
    with _store(arguments) as store:
        page = store.page(_wanted(arguments), max(1, arguments.limit))
    rows = [("ID", "TIME", "ACTION", "MODEL", "TENANT", "WHERE", "P", "LABEL")]
    for each in page.incidents:
        one = each.incident
        where = "" if one.phase is None else f"{one.phase} token {one.position} layer {one.layer} {one.direction or ''}"
        p_value = "" if one.p_value is None else f"{one.p_value:.2g}"
        at = f"{one.at:%Y-%m-%d %H:%M:%S}"
        rows.append((one.id, at, one.action, one.model, one.tenant or "", where.strip(), p_value, each.label or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        # A model's name is a client's text, and this goes to a terminal.
        print("".join(letter if letter.isprintable() else "?" for letter in line))
    if page.after is not None:
        print(f"there are more than {arguments.limit}: --limit", file=sys.stderr)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Print one. Raises ConfigError where there is none."""
    with _store(arguments) as store:
        found, history = store.get(arguments.id), store.history(arguments.id)
    if found is None:
        raise ConfigError(f"there is no incident {arguments.id[:64]!r}")
    print(json.dumps({**found.model_dump(mode="json"), "history": history}, indent=2, default=str))
    return 0


def run_label(arguments: argparse.Namespace) -> int:
    """Say what it was. Raises ConfigError where there is none."""
    with _store(arguments) as store:
        found = store.label(arguments.id, arguments.label, arguments.by[:128], arguments.note[:2000])
    if found is None:
        raise ConfigError(f"there is no incident {arguments.id[:64]!r}")
    print(f"{arguments.id} is labelled {arguments.label}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write them. Raises ConfigError where a prompt that is wanted was not kept."""
    from dataclasses import replace

    from guard.atomic import write_atomically

    wanted = _wanted(arguments)
    if arguments.reviewed:
        if wanted.label not in (None, "false"):
            raise ConfigError("--reviewed takes what was labelled false; expected no --label, or --label false")
        wanted = replace(wanted, label="false")
    without = 0
    lines: list[str] = []
    with _store(arguments) as store:
        for each in store.all(wanted):
            if not arguments.reviewed:
                lines.append(each.model_dump_json())
            elif each.incident.content_kind == "full" and each.incident.content is not None:
                lines.append(json.dumps({**json.loads(each.incident.content), "label": "clean"}, ensure_ascii=False))
            else:
                without += 1
    if without:
        print(
            f"{without} of {without + len(lines)} have no text to calibrate with: it is kept with `content: full` only",
            file=sys.stderr,
        )
    if arguments.reviewed and not lines:
        raise ConfigError("no incident that was labelled false has its text; nothing was written")
    content = "".join(f"{line}\n" for line in lines)
    if str(arguments.out) == "-":
        print(content, end="")
    else:
        # Prompts may be private.
        write_atomically(arguments.out, content.encode(), ConfigError, mode=0o600)
        print(f"wrote {len(lines)} to {arguments.out}", file=sys.stderr)
    return 0


def run_migrate(arguments: argparse.Namespace) -> int:
    """Bring the tables up to date."""
    from server.incidents.database import head

    with _database(arguments) as database:
        before = database.revision()
        database.migrate()
    print(f"{database.name}: version {head()}{' as before' if before == head() else ''}")
    return 0


@contextmanager
def _database(arguments: argparse.Namespace) -> Iterator[Database]:
    from sqlalchemy.exc import SQLAlchemyError

    from server.config.settings import load
    from server.incidents.database import Database

    database = Database.of(load(arguments.config, os.environ).incidents, os.environ)
    if database is None:
        raise ConfigError(f"{arguments.config}: `incidents` names no database; expected `path` or `url_env`")
    try:
        yield database
    except SQLAlchemyError as error:
        kind = type(getattr(error, "orig", None) or error).__name__
        raise UndertowError(f"{database.name}: does not answer as expected ({kind})") from None
    finally:
        database.close()


@contextmanager
def _store(arguments: argparse.Namespace) -> Iterator[Store]:
    from server.incidents.store import Store

    with _database(arguments) as database:
        if database.sqlite and not Path(str(database.url.database)).exists():
            raise ConfigError(f"{database.name}: is not there; the server makes it when it starts")
        yield Store(database)


def _wanted(arguments: argparse.Namespace) -> Filter:
    from server.incidents.store import Filter

    names = ("model", "tenant", "policy", "action", "phase", "direction", "layer", "label")
    fields: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.days is not None:
        fields["since"] = datetime.now(UTC) - timedelta(days=arguments.days)
    return Filter(**fields)

"""`undertow config`: check a settings file, explain whom it judges how, print its schema."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import ConfigError

if TYPE_CHECKING:
    from server.config.settings import Settings
    from server.ruling import Rulings

_KEY_LOOKS = "utk_"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow config`."""
    parser = subparsers.add_parser(
        "config",
        help="check a settings file, explain whom it judges how, print its schema",
        description="Check a settings file before it is used, ask it by which policy a request would be judged, or "
        "print the schema that editors can check it with.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "validate",
        help="check FILE and print the settings in effect",
        description="Check FILE, and everything that it names: variables, the keys file, and, where they are given, "
        "whether calibrations support its policies. Prints the settings in effect, defaults and environment included, "
        "and what each rule comes to. Exit code 2 where something is wrong, with the key, the value found and what was "
        "expected.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="hold every policy's rates against this calibration; again for each",
    )
    check.set_defaults(run=run_validate)
    explain = actions.add_parser(
        "explain",
        help="say by which policy a request would be judged, and why",
        description="Print the policy that judges such a request, and why every rule holds or does not. YAML.",
        epilog="Example: undertow config explain undertow.yaml --model support-1 --tenant lab",
    )
    explain.add_argument("file", type=Path, metavar="FILE")
    explain.add_argument("--model", default="", metavar="NAME", help="as a request names it")
    explain.add_argument(
        "--endpoint", default="chat_completions", metavar="NAME", help="as metrics name it (%(default)s)"
    )
    who = explain.add_mutually_exclusive_group()
    who.add_argument("--tenant", metavar="NAME", help="whose key it comes with")
    who.add_argument("--key", metavar="ID", help="the id of the key that it comes with, as `undertow keys list` says")
    explain.set_defaults(run=run_explain)
    schema = actions.add_parser("schema", help="print the JSON Schema of the settings")
    schema.set_defaults(run=run_schema)


def run_validate(arguments: argparse.Namespace) -> int:
    """Print the settings in effect. Raises ConfigError that names everything that is wrong."""
    from server.config.settings import ENVIRONMENT, load
    from server.ruling import Rulings
    from server.validation import CalibrationFile, validate

    settings = load(arguments.file, os.environ)
    found = validate(settings, os.environ, [CalibrationFile.load(path) for path in arguments.calibration])
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    for variable, path in ENVIRONMENT.items():
        if os.environ.get(variable):
            print(f"# {variable} overrides {'.'.join(path)}")
    for note in found.notes:
        print(f"# note: {note}")
    print(_yaml(settings.model_dump(mode="json")), end="")
    for line in _by_rule(settings, Rulings(settings)):
        print(f"# {line}")
    return 0


def run_explain(arguments: argparse.Namespace) -> int:
    """Print what judges a request, and why. Raises ConfigError."""
    from server.config.rules import Asked
    from server.config.settings import load
    from server.explanation import explain
    from server.in_force import InForce
    from server.telemetry.metrics import GUARDED

    if arguments.endpoint not in GUARDED:
        raise ConfigError(f"--endpoint: found {arguments.endpoint!r}; expected one of {', '.join(GUARDED)}")
    settings = load(arguments.file, os.environ)
    tenant = arguments.tenant if arguments.key is None else _tenant(settings, arguments.key)
    told = explain(InForce.of(settings, os.environ), Asked(arguments.endpoint, arguments.model, tenant))
    print(_yaml(told), end="")
    return 0


def run_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    from server.config.schema import schema_text

    print(schema_text(), end="")
    return 0


def _by_rule(settings: Settings, rulings: Rulings) -> Iterator[str]:
    """What every rule comes to, the most specific first, and what judges the rest."""
    if not rulings.rules:
        return
    yield "what judges what, the first that matches:"
    for each in rulings.rules:
        told = each.policy.model_dump(mode="json")
        yield f"  {each.place} ({each.rule.match}): policy {each.name}, {_yaml(told, flow=True)}"
    yield f"  everything else: policy default, {_yaml(settings.policy.model_dump(mode='json'), flow=True)}"


def _tenant(settings: Settings, identity: str) -> str:
    """Whose key this is. Raises ConfigError; what may be a key itself is not repeated."""
    from server.access.keys import read_keys

    if identity.startswith(_KEY_LOOKS):
        raise ConfigError("--key: found a key; expected its id, since command lines can be read by others")
    if settings.access.keys_file is None:
        raise ConfigError("--key: the settings name no `access.keys_file`")
    for record in read_keys(settings.access.keys_file):
        if record.id == identity:
            return record.tenant
    raise ConfigError(f"--key: {settings.access.keys_file} has no key of this id")


def _yaml(value: Any, flow: bool = False) -> str:
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=flow, width=2**16)
    return text.rstrip("\n") if flow else text

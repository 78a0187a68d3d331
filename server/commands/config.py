"""`undertow config`: check a settings file, print its schema."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow config`."""
    parser = subparsers.add_parser(
        "config",
        help="check a settings file, print its schema",
        description="Check a settings file before it is used, or print the schema that editors can check it with.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "validate",
        help="check FILE and print the settings in effect",
        description="Check FILE and print the settings in effect, defaults and environment included. Exit code 2 where "
        "it is wrong, with the key, the value found and what was expected.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=validate)
    schema = actions.add_parser("schema", help="print the JSON Schema of the settings")
    schema.set_defaults(run=print_schema)


def validate(arguments: argparse.Namespace) -> int:
    """Print the settings in effect. Raises ConfigError."""
    import yaml

    from server.config.settings import ENVIRONMENT, load

    settings = load(arguments.file, os.environ)
    for variable, path in ENVIRONMENT.items():
        if os.environ.get(variable):
            print(f"# {variable} overrides {'.'.join(path)}")
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def print_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    import json

    from server.config.settings import Settings

    print(json.dumps(Settings.model_json_schema(), indent=2))
    return 0

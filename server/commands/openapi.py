"""`undertow openapi`: print the OpenAPI document of a port."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow openapi`."""
    parser = subparsers.add_parser(
        "openapi",
        help="print the OpenAPI document of the clients' or the operators' port",
        description="Print the OpenAPI document of a port. A running server tells both at its operators' port: "
        "/openapi/clients.json and /openapi/operators.json.",
        epilog="Example: undertow openapi clients --config undertow.yaml > clients.json",
    )
    parser.add_argument("port", choices=["clients", "operators"])
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings that say what clients may ask for besides (`endpoints`)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it. Raises ConfigError."""
    from server.config.endpoints import Endpoints
    from server.config.settings import load
    from server.openapi.clients import clients_document
    from server.openapi.operators import operators_document

    endpoints = load(arguments.config, os.environ).endpoints if arguments.config else Endpoints()
    document = clients_document(endpoints) if arguments.port == "clients" else operators_document()
    print(json.dumps(document, indent=1))
    return 0

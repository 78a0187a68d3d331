"""`undertow reload`: a new calibration, or a bank of the same shape, for an engine that goes on serving."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.control import Loaded, Wanted

EPILOG = """\
Put the new files in the place of those that the engine was started with, then say here what they are:
  undertow reload --calibration tuned.calibration
  undertow reload --bank tuned.bank --calibration tuned.calibration --engine http://gpu-1:8000

The engine takes its own files only where they have the digests of those named here. All of its workers take them, or
none does; requests that run meanwhile go on. The token is read from UNDERTOW_ADMIN_TOKEN or the file that
UNDERTOW_ADMIN_TOKEN_FILE names, here and where vLLM is started; an engine started without one cannot be changed.

Exit code 0 where the engine guards with what is named, 1 where it does not, and then guards with what it had.
"""

TIMEOUT_S = 300.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow reload`."""
    parser = subparsers.add_parser(
        "reload",
        help="change the calibration or the bank of a running engine",
        description="Have a running engine read its calibration, and its bank if one is named, again: without a "
        "restart, without losing a request.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="the new one")
    parser.add_argument("--bank", type=Path, metavar="FILE", help="the new one (default: the calibration's)")
    parser.add_argument("--engine", default="http://127.0.0.1:8000", metavar="URL", help="of vLLM (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the engine's answer as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask the engine. Raises ConfigError without a token or for an address that is none, InputError for files that
    cannot be used, EngineError where the engine does not take them."""
    from guard.control import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, admin_token
    from guard.errors import ConfigError

    token = admin_token(os.environ)
    if token is None:
        raise ConfigError(f"{TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are not set; expected the engine's admin token")
    loaded = _ask(arguments.engine, _wanted(arguments.bank, arguments.calibration), token)
    if arguments.json:
        print(loaded.model_dump_json(indent=1))
        return 0
    print(
        "\n".join(
            f"{name:<12} {value}" for name, value in (("bank", loaded.fingerprint), ("calibration", loaded.calibration))
        )
    )
    print(
        f"generation   {loaded.generation}, on {loaded.workers} worker{'s' if loaded.workers > 1 else ''}: "
        + (f"read in {loaded.prepared_s:.2f} s, paused for {loaded.paused_s:.2f} s" if loaded.changed else "as before")
    )
    return 0


def _wanted(bank: Path | None, calibration: Path) -> Wanted:
    """What the files are. Raises BankError or CalibrationError where they cannot be used, or not together."""
    from guard.calibration import Calibration
    from guard.control import Wanted
    from guard.errors import CalibrationError
    from guard.fingerprint import read_header

    found = Calibration.load(calibration)
    if bank is not None and (fingerprint := read_header(bank).fingerprint) != found.fingerprint:
        raise CalibrationError(f"{calibration}: made for the bank {found.fingerprint}, {bank} is {fingerprint}")
    return Wanted(fingerprint=found.fingerprint, calibration=found.digest())


def _ask(address: str, wanted: Wanted, token: bytes) -> Loaded:
    import httpx

    from guard.control import RELOAD_PATH, TOKEN_VARIABLE, Loaded
    from guard.errors import ConfigError, EngineError

    try:
        response = httpx.post(
            f"{address.rstrip('/')}{RELOAD_PATH}",
            json=wanted.model_dump(mode="json"),
            headers={"authorization": f"Bearer {token.decode()}"},
            timeout=TIMEOUT_S,
            trust_env=False,
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"--engine: {address}, expected a URL such as http://127.0.0.1:8000") from error
    except httpx.HTTPError as error:
        raise EngineError(f"{address}: the engine does not answer: {error}") from error
    if response.status_code == 200:
        return Loaded.model_validate_json(response.content)
    if response.status_code == 404:
        raise EngineError(f"{address}: cannot be changed: started without {TOKEN_VARIABLE}, or without the guard")
    try:
        reason = str(json.loads(response.content)["error"])
    except (ValueError, LookupError, TypeError):
        reason = f"status {response.status_code}"
    raise EngineError(f"{address}: not changed: {reason}")

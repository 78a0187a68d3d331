"""`undertow status`: what guards a running engine, and whether requests can be judged."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guard.evidence import DetectorStatus, WorkerStatus

EPILOG = """\
examples:
  undertow status                                     vLLM on port 8000, the server's operators on port 8081
  undertow status --engine http://gpu-1:8000 --no-server
  undertow status --json

Exit code 0 where every worker answers, all counted alike, and the server is ready; 1 where not.
"""

TIMEOUT_S = 15.0
"""The server's canary may take ten."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `undertow status`."""
    parser = subparsers.add_parser(
        "status",
        help="say what guards a running engine",
        description="Ask vLLM what each of its workers guards with, and the server whether requests can be judged: "
        "engine up, guard loaded, a canary generated and scored.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", default="http://127.0.0.1:8000", metavar="URL", help="of vLLM (%(default)s)")
    parser.add_argument(
        "--server",
        default="http://127.0.0.1:8081",
        metavar="URL",
        help="of the server, where operators reach it (%(default)s)",
    )
    parser.add_argument(
        "--token-env",
        default="UNDERTOW_OPERATOR_TOKEN",
        metavar="NAME",
        help="the variable that holds the operators' token, where the server asks for one (%(default)s)",
    )
    parser.add_argument("--no-server", action="store_true", help="ask the engine alone")
    parser.add_argument("--json", action="store_true", help="print both answers as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print both. Raises ConfigError for an address that is none, EngineError where nobody answers."""
    from guard.control import read_token
    from guard.errors import EngineError
    from guard.evidence import COVERAGE, STATUS_PATH, VERDICTS, Status

    status = Status.from_json(_get(arguments.engine, STATUS_PATH, "engine", good=(200,)))
    ready = None
    if not arguments.no_server:
        token = read_token(os.environ, arguments.token_env)
        ready = json.loads(_get(arguments.server, "/readyz", "server", good=(200, 503), token=token))
        if "engines" not in ready:
            raise EngineError(f"{arguments.server}: is where clients reach the server; expected where operators do")
    apart = status.apart((*COVERAGE, *VERDICTS))
    if arguments.json:
        print(json.dumps({"engine": status.model_dump(mode="json"), "server": ready}, indent=1))
    else:
        for worker in status.workers:
            print("\n".join(_lines(worker)))
        for line in apart:
            print(f"the ranks differ in {line}")
        if status.channel is not None:
            print(f"engine\n  {'evidence channel':<18} {status.channel}")
        if ready is not None:
            print("server")
            if ready.get("settings"):
                print("\n".join(_settings_lines(ready["settings"])))
            for name, engine in ready["engines"].items():
                print("\n".join(_server_lines(name, engine)))
    return 0 if not apart and (ready is None or ready["ready"]) else 1


def _lines(worker: WorkerStatus) -> list[str]:
    layers = worker.layers
    together = layers == tuple(range(layers[0], layers[-1] + 1)) if layers else False
    rows = {
        "bank": worker.fingerprint or "none: requests that use no adapter cannot be scored",
        "calibration": worker.calibration or "none",
        "generation": f"{worker.generation}{' (as started)' if worker.generation == 1 else ''}",
        "layers": f"{layers[0]} to {layers[-1]}" if together else ", ".join(map(str, layers)),
        "versions": f"undertow {worker.undertow_version}, vllm {worker.vllm_version}, {worker.dtype}",
        "reserved token": str(worker.reserved_token_id),
        "smallest rates": _rates(worker.detectors),
        "requests judged": f"{worker.requests_judged:,}",
        "coverage": _coverage(worker),
        "tokens": f"{worker.tokens_scored:,} scored, {worker.tokens_recalled:,} from the prefix cache",
        "unscorable": f"{worker.unscorable:,} requests"
        + "".join(f", {count:,} {fault}" for fault, count in sorted(worker.faults.items())),
        "decided": f"{worker.flagged:,} flagged, {worker.blocked:,} blocked",
    }
    lines = [f"worker {worker.rank}", *(f"  {name:<18} {value}" for name, value in rows.items())]
    for adapter in worker.adapters:
        own = {
            "bank": adapter.fingerprint,
            "calibration": adapter.calibration,
            "smallest rates": _rates(adapter.detectors),
        }
        lines += [f"  adapter {adapter.name}", *(f"    {name:<16} {value}" for name, value in own.items())]
    return lines


def _server_lines(name: str, engine: dict[str, Any]) -> list[str]:
    """What the server found of one engine."""
    lines = [f"  engine {name}"]
    for check, state in engine["checks"].items():
        reason = engine["reasons"].get(check)
        lines.append(f"    {check:<16} {state}{f': {reason}' if reason else ''}")
    return [*lines, f"    {'last canary':<16} {_canary(engine['canary'])}"]


def _settings_lines(settings: dict[str, Any]) -> list[str]:
    """Which settings hold, and whether the file was refused."""
    file = settings["sha256"] or "no file"
    lines = [f"  {'settings':<18} {file}, since {settings['since']}"]
    if settings["refused"] is not None:
        first, *more = settings["refused"].splitlines()
        lines += [f"  {'refused':<18} {first}", *(f"  {'':<18} {line}" for line in more)]
    return lines


def _rates(detectors: Iterable[DetectorStatus]) -> str:
    return ", ".join(f"{each.detectors[0]} {each.supported_fpr:.3g}" for each in detectors if len(each.detectors) == 1)


def _coverage(worker: WorkerStatus) -> str:
    scored = worker.tokens_scored + worker.tokens_recalled
    seen = scored + worker.tokens_missed
    # Rounded down: what is not all of them must not read as if it were.
    share = f" ({int(10_000 * scored / seen) / 100:g}%)" if seen else ""
    return f"{scored:,} of {seen:,} tokens{share}"


def _canary(canary: dict[str, Any] | None) -> str:
    if canary is None:
        return "none yet"
    result = "scored" if canary["reason"] is None else f"not scored: {canary['reason']}"
    return f"{canary['at']}, {result}, {canary['seconds']:.2f} s, generation {canary['generation']}"


def _get(address: str, path: str, whose: str, good: tuple[int, ...], token: bytes | None = None) -> bytes:
    import httpx

    from guard.errors import ConfigError, EngineError

    headers = {} if token is None else {"authorization": f"Bearer {token.decode()}"}
    try:
        response = httpx.get(f"{address.rstrip('/')}{path}", headers=headers, timeout=TIMEOUT_S)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"--{whose}: {address}, expected a URL such as http://127.0.0.1:8000") from error
    except httpx.HTTPError as error:
        raise EngineError(f"{address}: the {whose} does not answer: {error}") from error
    if response.status_code not in good:
        hint = "; is it guarded?" if whose == "engine" and response.status_code == 404 else ""
        hint = "; the operators' token is missing or wrong" if response.status_code == 401 else hint
        raise EngineError(f"{address}{path}: the {whose} answered {response.status_code}{hint}")
    return response.content

"""`undertow up`: vLLM with the guard inside and the server before it, one command, one Ctrl-C."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import CalibrationError, ConfigError, EngineError

if TYPE_CHECKING:
    from guard.engine.launch import GuardedAdapter
    from server.config.origin import Origin
    from server.config.settings import Settings
    from server.engine_process import EngineProcess


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `up` to the command line."""
    parser = subparsers.add_parser(
        "up",
        usage="undertow up MODEL --bank FILE --calibration FILE [--adapter NAME DIR BANK CALIBRATION] [options] "
        "[-- arguments of `vllm serve`]",
        help="serve a model under guard: vLLM and the server, one command, one Ctrl-C",
        description="Start vLLM with the guard inside and the OpenAI-compatible server before it. Chat clients point "
        "their base URL at the server and change nothing else.",
        epilog="Example: undertow up ./tuned --bank tuned.bank --calibration tuned.calibration. What follows `--` goes "
        "to vLLM: undertow up ./tuned --bank ... --calibration ... -- --max-model-len 8192 --dtype bfloat16",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the fine-tuned model's folder")
    parser.add_argument("--bank", type=Path, metavar="FILE", help="from `undertow bank build`")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from `undertow calibrate`")
    parser.add_argument(
        "--adapter",
        nargs=4,
        action="append",
        default=[],
        metavar=("NAME", "DIR", "BANK", "CALIBRATION"),
        help="also serve a LoRA adapter, under this name; again for each. With adapters, --bank and --calibration may "
        "be left out: only requests that use an adapter are then answered",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings and policy (default: block at 1%%)")
    parser.add_argument("--host", help="where the server listens (default: as in the settings, 127.0.0.1)")
    parser.add_argument("--port", type=_port, help="where the server listens (default: as in the settings, 8080)")
    parser.add_argument("--admin-port", type=_port, help="where operators reach it (default: as in the settings, 8081)")
    parser.add_argument(
        "--vllm-port", type=_port, default=8000, metavar="PORT", help="where vLLM listens (default 8000)"
    )
    parser.add_argument(
        "--steering", action="store_true", help="let a policy steer: its action `steer` needs an engine started for it"
    )
    parser.add_argument("--vllm-log", type=Path, metavar="FILE", help="what vLLM prints (default: a temporary file)")
    parser.add_argument(
        "--print", action="store_true", dest="print_only", help="print the command that starts this vLLM, and end"
    )
    parser.set_defaults(run=run, takes_extra=True)


def run(arguments: argparse.Namespace) -> int:
    """Start both and serve until interrupted."""
    from guard.engine.launch import engine_environment, serve_arguments, serve_command
    from guard.fingerprint import read_header

    adapters = _adapters(arguments)
    if (arguments.bank is None) != (arguments.calibration is None) or not (arguments.bank or adapters):
        raise ConfigError("undertow up needs --bank and --calibration, or an --adapter with its own")
    fingerprint = None if arguments.bank is None else read_header(arguments.bank).fingerprint
    for calibration in (arguments.calibration, *(adapter.calibration for adapter in adapters)):
        if calibration is not None and not calibration.is_file():
            raise CalibrationError(f"{calibration}: no such file; make one with `undertow calibrate`")
    if arguments.print_only:
        line = serve_arguments(
            arguments.model,
            arguments.bank,
            fingerprint,
            arguments.calibration,
            "127.0.0.1",
            arguments.vllm_port,
            steering=arguments.steering,
            adapters=adapters,
        )
        variables = " ".join(f"{key}={value}" for key, value in engine_environment({}).items())
        print(variables, shlex.join([*serve_command(), *line, *arguments.extra]))
        return 0

    from server.commands.serve import run_server
    from server.engine_process import EngineProcess

    log = arguments.vllm_log or Path(tempfile.mkstemp(prefix="undertow-vllm-", suffix=".log")[1])
    with EngineProcess(
        arguments.model,
        arguments.bank,
        fingerprint,
        arguments.calibration,
        port=arguments.vllm_port,
        log=log,
        extra=arguments.extra,
        steering=arguments.steering,
        adapters=adapters,
    ) as engine:
        engine.wait_until_up()
        settings, origin = _settings(arguments, engine.url, fingerprint)
        # One command, one end: a server without its engine would only refuse.
        ending = threading.Event()
        threading.Thread(target=_end_with, args=(engine, ending), daemon=True).start()
        try:
            run_server(settings, origin)
        finally:
            ending.set()
        died = engine.returncode
    if died is not None:
        raise EngineError(f"vLLM ended by itself with code {died}; its log is {log}")
    print("undertow: vLLM and the server have ended", file=sys.stderr)
    return 0


def _end_with(engine: EngineProcess, ending: threading.Event) -> None:
    """Interrupt this process when the engine dies, unless it is ending anyway."""
    while not ending.wait(timeout=1):
        if engine.returncode is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _adapters(arguments: argparse.Namespace) -> list[GuardedAdapter]:
    from guard.engine.launch import GuardedAdapter
    from guard.fingerprint import read_header

    given = [(name, *map(Path, paths)) for name, *paths in arguments.adapter]
    if len({name for name, *_ in given}) < len(given):
        raise ConfigError("--adapter: two of the same name")
    return [GuardedAdapter(name, folder, bank, read_header(bank).fingerprint, cal) for name, folder, bank, cal in given]


def _settings(arguments: argparse.Namespace, url: str, fingerprint: str | None) -> tuple[Settings, Origin | None]:
    """The file's settings for this engine, and where they can be read again."""
    from server.config.origin import open_settings
    from server.config.settings import Settings, parse

    if arguments.config is None:
        return _fitted(Settings(version=1), arguments, url, fingerprint), None
    environ = dict(os.environ)
    return open_settings(
        arguments.config,
        lambda text: _fitted(parse(text, str(arguments.config), environ), arguments, url, fingerprint),
    )


def _fitted(settings: Settings, arguments: argparse.Namespace, url: str, fingerprint: str | None) -> Settings:
    """Settings with this engine as the upstream. Its bank is the one that must be loaded, unless it can be changed
    while it runs."""
    from guard.control import admin_token
    from server.config.sections import Listen
    from server.config.upstream import UpstreamSettings

    if settings.upstreams:
        raise ConfigError(
            f"{arguments.config}: `upstreams` names engines that run already, and `undertow up` starts one; expected "
            "settings without it, or `undertow serve`"
        )
    flags = {"host": arguments.host, "port": arguments.port}
    # Whoever may change the engine's bank while it runs decides which one is right; the settings' own pin stays.
    pinned = settings.upstream.fingerprint if admin_token(os.environ) else fingerprint
    listen = settings.listen.model_dump() | {key: value for key, value in flags.items() if value is not None}
    port = settings.admin.port if arguments.admin_port is None else arguments.admin_port
    upstream = settings.upstream.model_dump() | {"url": url, "fingerprint": pinned}
    return settings.model_copy(
        update={
            "listen": Listen.model_validate(listen),
            "admin": settings.admin.model_copy(update={"port": port}),
            "upstream": UpstreamSettings.model_validate(upstream),
        }
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected a port, 0 to 65535")
    return int(text)

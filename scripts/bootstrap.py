"""Make the virtual environment that every `make` target uses: locked, hash-checked, whole or not at all.

A stamp in the environment says for which lock, Python, machine and place it was made. It is written last, so an
interrupted set-up has none and is redone from the start. With a matching stamp this script does nothing.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
STAMP = "undertow-ready.json"
LOG = "undertow-setup.log"
TRITON_LOCK = REQUIREMENTS / "triton.lock"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# torch 2.13 from PyPI is built for CUDA 13, which wants this driver series.
CUDA_DRIVER = 580
# What a half-broken environment fails at: transformers next to the wrong torchvision, vLLM next to the wrong torch.
SMOKE_TEST = """\
import guard, server, torch, transformers, vllm
print(f"torch {torch.__version__}, transformers {transformers.__version__}, vLLM {vllm.__version__}")
"""


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


class Clock:
    """Says what happens, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)


def choose_build(asked: str, clock: Clock) -> str:
    """`cpu` or `cuda`: what was asked for, else what the machine can run."""
    if asked != "auto":
        return asked
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        drivers = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout.split()
        driver = int(drivers[0].split(".")[0])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return "cpu"
    if driver < CUDA_DRIVER:
        clock.say(
            f"the NVIDIA driver is {drivers[0]}, the CUDA build needs {CUDA_DRIVER} or newer: taking the CPU build"
        )
        return "cpu"
    return "cuda"


def digest(*parts: bytes | str) -> str:
    joined = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()


def wanted_stamp(build: str, locks: list[Path]) -> dict[str, str]:
    """What the environment has to be: its packages, and the project as installed in it."""
    return {
        "build": build,
        "python": platform.python_version(),
        # The venv's scripts and the editable install hold absolute paths: a moved checkout needs a new environment.
        "packages": digest(
            sys.implementation.cache_tag, platform.machine(), str(ROOT), *(lock.read_bytes() for lock in locks)
        ),
        "project": digest((ROOT / "pyproject.toml").read_bytes()),
    }


def read_stamp(environment: Path) -> dict[str, str]:
    try:
        stamp = json.loads((environment / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(environment: Path, stamp: dict[str, str]) -> None:
    """Complete or absent, even if the machine stops half-way."""
    unfinished = environment / f"{STAMP}.tmp"
    with unfinished.open("w") as file:
        json.dump(stamp, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(environment / STAMP)


@contextlib.contextmanager
def alone(environment: Path, clock: Clock) -> Iterator[None]:
    """One set-up at a time: two `make` in two terminals would tear the environment apart."""
    with environment.with_name(f"{environment.name}.setup-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            clock.say("another set-up is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], environment: Path, clock: Clock, expected: int) -> str:
    """Run pip with its output in the log, and say how far it is; returns the output. Raises SetupError."""
    log = environment / LOG
    fetched = 0
    said = time.monotonic()
    output = ""
    settings = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1", "PIP_NO_COLOR": "1"}
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        begin = file.tell()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=settings, cwd=ROOT
        ) as process:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                with log.open() as reader:
                    reader.seek(begin)
                    output = reader.read()
                if process.returncode is not None:
                    break
                if time.monotonic() - said >= 10:
                    said = time.monotonic()
                    fetched = output.count("\nCollecting ")
                    if "\nInstalling collected packages" in output:
                        installed = sum(1 for _ in environment.glob("lib/python*/site-packages/*.dist-info"))
                        clock.say(f"    installing: {installed} of about {expected} packages")
                    else:
                        clock.say(f"    fetching: {fetched} of about {expected} packages")
    if process.returncode:
        tail = "\n".join(f"    {line}" for line in output.splitlines()[-15:])
        raise SetupError(f"pip failed with exit code {process.returncode}:\n{tail}\n  the whole output: {log}")
    return output


def make_environment(environment: Path, clock: Clock) -> list[str]:
    """An empty virtual environment; returns the command that is its pip."""
    shutil.rmtree(environment, ignore_errors=True)
    python = str(environment / "bin" / "python")
    try:
        import ensurepip  # noqa: F401 - Debian ships Python without it unless python3-venv is there
    except ImportError:
        clock.say("    this Python cannot put pip into an environment: using its own pip from outside")
        venv.create(environment, with_pip=False, symlinks=True)
        if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
            raise SetupError(f"{sys.executable} has no pip and no ensurepip (apt install python3-venv)") from None
        return [sys.executable, "-m", "pip", "--python", python]
    venv.create(environment, with_pip=True, symlinks=True)
    return [python, "-m", "pip"]


def install_packages(pip: list[str], build: str, locks: list[Path], environment: Path, clock: Clock) -> None:
    """Exactly what the locks say. `--no-deps`, because cpu.lock leaves out on purpose what would break it."""
    files = [argument for lock in locks for argument in ("-r", str(lock))]
    command = [*pip, "install", "--no-deps", "--require-hashes", "--only-binary=:all:", *files]
    expected = sum(line[:1].isalnum() for lock in locks for line in lock.read_text().splitlines())
    clock.say(f"installing {expected} packages, each checked against its hash (first time: 1 to 5 minutes)")
    try:
        run(command, environment, clock, expected)
    except SetupError as error:
        if build != "cpu" or "No matching distribution found for torch==" not in str(error):
            raise
        clock.say(f"    the package index has no CPU build of torch: adding PyTorch's own, {TORCH_CPU_INDEX}")
        run([*command, "--extra-index-url", TORCH_CPU_INDEX], environment, clock, expected)


def install_triton(pip: list[str], environment: Path, clock: Clock) -> None:
    """Triton in a folder of its own, `ENVIRONMENT/triton`: only tests of the kernels import from there."""
    clock.say("installing Triton for the tests of the kernels (200 MB)")
    target = ["--target", str(environment / "triton")]
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:"]
    run([*pip, "install", *options, *target, "-r", str(TRITON_LOCK)], environment, clock, 1)


def install_project(pip: list[str], environment: Path, clock: Clock) -> None:
    clock.say("installing undertow itself, editable")
    # setuptools comes from the lock, so nothing has to be fetched, and nothing unpinned is.
    run([*pip, "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT)], environment, clock, 1)


def check_environment(environment: Path, clock: Clock) -> None:
    clock.say("importing torch, transformers and vLLM once")
    command = [str(environment / "bin" / "python"), "-W", "ignore", "-c", SMOKE_TEST]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, cwd=ROOT)
    if result.returncode:
        raise SetupError(f"the new environment does not work:\n{result.stderr[-3000:]}")
    clock.say(f"    {result.stdout.strip().splitlines()[-1]}")


def set_up(environment: Path, asked: str) -> None:
    clock = Clock()
    build = choose_build(asked, clock)
    locks = [REQUIREMENTS / f"{build}.lock", REQUIREMENTS / "dev.lock"]
    # The CUDA build brings its own.
    wanted = wanted_stamp(build, [*locks, *([TRITON_LOCK] if build == "cpu" else [])])
    if read_stamp(environment) == wanted:
        return
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SetupError(
            f"vLLM and the locks are for Linux on x86_64 or aarch64; this is {sys.platform} on {platform.machine()}"
        )
    with alone(environment, clock):
        have = read_stamp(environment)
        if have == wanted:
            return
        (environment / STAMP).unlink(missing_ok=True)
        if {**have, "project": wanted["project"]} == wanted and (environment / "bin" / "pip").exists():
            # Only pyproject.toml changed: the packages can stay.
            install_project([str(environment / "bin" / "python"), "-m", "pip"], environment, clock)
        else:
            reason = "the locks, the Python or the place changed" if have else "no complete environment yet"
            clock.say(f"setting up {environment} with Python {wanted['python']}, {build} build ({reason})")
            pip = make_environment(environment, clock)
            install_packages(pip, build, locks, environment, clock)
            if build == "cpu":
                install_triton(pip, environment, clock)
            install_project(pip, environment, clock)
            check_environment(environment, clock)
        write_stamp(environment, wanted)
        clock.say("ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes")
    parser.add_argument("--build", choices=("auto", "cpu", "cuda"), default="auto", help="which build of vLLM")
    arguments = parser.parse_args()
    try:
        set_up(arguments.venv.absolute(), arguments.build)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; the next run starts it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

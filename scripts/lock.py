"""Resolve requirements/*.in into requirements/*.lock: exact versions, the whole closure, a hash for every file.

`make lock` runs this with the pinned uv. One resolution serves CPython 3.11 to 3.14 on Linux x86_64 and aarch64.
Nothing is downloaded but metadata: a CUDA lock can be made on a laptop.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"

CPU_HEADER = """\
# Undertow on a machine without a GPU. Written by `make lock` from pyproject.toml and cpu.in: do not edit.
#     pip install --no-deps --require-hashes -r requirements/cpu.lock
# torch's +cpu build is not on PyPI. Where pip does not find it: --extra-index-url https://download.pytorch.org/whl/cpu
# LEFT OUT ON PURPOSE, so install with --no-deps: torchvision, torchaudio, torchcodec and triton. As PyPI ships them
# they are built for the CUDA torch, and beside a CPU torch `import transformers` dies of them. See cpu-overrides.txt.
"""
CUDA_HEADER = """\
# Undertow on a machine with an NVIDIA GPU (CUDA 13, driver 580 or newer). Written by `make lock` from pyproject.toml
# and cuda.in: do not edit.
#     pip install --no-deps --require-hashes -r requirements/cuda.lock
# RESOLVED FROM METADATA, NOT RUN: no test has installed this lock on a GPU yet.
"""
DEV_HEADER = """\
# What tests and checks need beyond cpu.lock or cuda.lock; installed on top of either. Written by `make lock` from
# dev.in: do not edit. It holds no package of those two, so it cannot disagree with them.
"""
SERVER_HEADER = """\
# What the proxy alone needs: no torch, no vLLM. For docker/server.Dockerfile. Written by `make lock` from
# pyproject.toml: do not edit. The versions are those of cpu.lock, so the image runs what the tests ran.
"""
TRITON_HEADER = """\
# The CUDA compiler, as in cuda.lock, for tests on a machine without a GPU: they run the kernels in its interpreter.
# Written by `make lock`: do not edit. It goes into a folder of its own, ENVIRONMENT/triton, that only they import from:
# vLLM and torch look for Triton, and everything else is tested as a machine without it runs.
"""

BUILD_HEADER = """\
# What builds the project's own wheel in docker/server.Dockerfile. Written by `make lock` from build.in: do not edit.
"""

CLIENTS_HEADER = """\
# {0} Written by `make lock` from {1}: do not edit.
# The tests make an environment of it beside their own (tests/e2e/clients/environments.py).
"""

# What the server can do besides, in every environment: its image is one.
EXTRAS = ("--extra=postgres", "--extra=tracing")

# The marker that says no more than "environments" in pyproject.toml; on every line it would only be noise.
EVERYWHERE = " ; (platform_machine == 'aarch64' or platform_machine == 'x86_64') and sys_platform == 'linux'"


def pins(lock: str) -> dict[str, str]:
    """What a lock pins: name, as pip normalises it, to version."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;]+)", lock, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def resolve(uv: str, sources: list[str], *options: str, prefer: str = "") -> str:
    """One `uv pip compile`; returns the pins, without any trace of where this machine gets its packages.

    The versions in `prefer` are kept where they fit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "lock.txt")
        output.write_text(prefer)
        command = [uv, "pip", "compile", "--universal", "--python-version=3.11", "--fork-strategy=fewest"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--quiet", f"--output-file={output}", *options, *sources]
        subprocess.run(command, cwd=ROOT, check=True)
        return output.read_text().replace(EVERYWHERE, "")


def entry(name: str, lock: str) -> str:
    """One package of a lock, with its hashes."""
    found = re.search(rf"^{re.escape(name)}==[^\n]+(?:\n +--hash=[^\n]+)+\n", lock, re.M)
    if found is None:
        raise SystemExit(f"{name} is not in the lock")
    return found.group()


def write(name: str, header: str, body: str) -> None:
    Path(REQUIREMENTS, name).write_text(f"{header}\n{body}")
    print(f"requirements/{name}: {len(pins(body))} packages")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uv", default="uv", help="the uv to run")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions, not those already locked")
    arguments = parser.parse_args()

    def locked(name: str) -> str:
        lock = REQUIREMENTS / name
        return "" if arguments.upgrade or not lock.exists() else lock.read_text()

    uv: str = arguments.uv
    torch = "".join(line for line in (REQUIREMENTS / "torch-cpu.txt").open() if not line.startswith("#"))
    cpu = resolve(
        uv,
        ["pyproject.toml", "requirements/cpu.in"],
        *EXTRAS,
        "--extra=weights",
        "--override=requirements/cpu-overrides.txt",
        prefer=locked("cpu.lock"),
    )
    # torch comes first: where pip cannot find it, the set-up learns so at once.
    write("cpu.lock", CPU_HEADER, torch + cpu)

    cuda = resolve(
        uv, ["pyproject.toml", "requirements/cuda.in"], *EXTRAS, "--extra=weights", prefer=locked("cuda.lock") or cpu
    )
    write("cuda.lock", CUDA_HEADER, cuda)
    write("triton.lock", TRITON_HEADER, entry("triton", cuda))

    shared = dict(pins(cpu).items() & pins(cuda).items())
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in shared.items())
        constraints.flush()
        constrain = f"--constraint={constraints.name}"
        leave_out = [f"--no-emit-package={name}" for name in sorted(shared)]
        dev = resolve(uv, ["requirements/dev.in"], constrain, *leave_out, prefer=locked("dev.lock"))
        server = resolve(uv, ["pyproject.toml"], *EXTRAS, constrain)
        build = resolve(uv, ["requirements/build.in"], constrain)
    if overlap := pins(dev).keys() & (pins(cpu).keys() | pins(cuda).keys()):
        # One package, two versions: name it in cpu.in and cuda.in, so that both decide for the same one.
        print(f"dev.lock and a runtime lock disagree about {', '.join(sorted(overlap))}", file=sys.stderr)
        return 1
    write("dev.lock", DEV_HEADER, dev)
    write("server.lock", SERVER_HEADER, server)
    write("build.lock", BUILD_HEADER, build)
    for name, what in (("clients", "Chat clients of others."), ("clients-older", "OpenAI's client, as it was.")):
        lock = resolve(uv, [f"requirements/{name}.in"], prefer=locked(f"{name}.lock"))
        write(f"{name}.lock", CLIENTS_HEADER.format(what, f"{name}.in"), lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())

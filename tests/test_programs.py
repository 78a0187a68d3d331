"""Programs out of packages: the right ones, or an error that says what to do."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from tests import programs


def deb(content: bytes) -> bytes:
    """A package with `usr/bin/hello`, and a member of an odd size before it."""
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:xz") as archive:
        member = tarfile.TarInfo("./usr/bin/hello")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, data in ((b"debian-binary", b"2.0"), (b"data.tar.xz", files.getvalue())):
        package += name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        package += str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    return package


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror with one package, which holds `hello`; an empty cache and an empty PATH."""
    package = tmp_path / f"pool/hello_1.0_{programs.MACHINE}.deb"
    package.parent.mkdir()
    package.write_bytes(deb(b"#!/bin/sh\necho hello\n"))
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    monkeypatch.setattr(programs, "MIRROR", tmp_path.as_uri())
    monkeypatch.setitem(programs.PACKAGES, "hello", programs.Package("pool/hello_1.0", {programs.MACHINE: digest}))
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return package


def test_a_program_comes_out_of_its_package_once(mirror: Path) -> None:
    found = programs.program("hello")
    assert found.read_bytes() == b"#!/bin/sh\necho hello\n"
    assert found.stat().st_mode & 0o111
    mirror.unlink()
    assert programs.program("hello") == found


def test_a_package_of_another_digest_is_refused(mirror: Path) -> None:
    mirror.write_bytes(deb(b"#!/bin/sh\necho goodbye\n"))
    with pytest.raises(programs.ProgramError, match="SHA-256"):
        programs.program("hello")


def test_without_mirror_the_path_is_searched_and_then_it_is_said_what_to_do(mirror: Path) -> None:
    mirror.unlink()
    with pytest.raises(programs.ProgramError, match="UNDERTOW_DEBIAN_MIRROR"):
        programs.program("hello")
    own = mirror.parents[1] / "hello"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert programs.program("hello") == own

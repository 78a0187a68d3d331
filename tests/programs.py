"""Programs that tests run and that pip cannot bring: out of Debian's packages, pinned by digest, kept in the cache.

program("kustomize")      # -> Path

Neither root nor dpkg is needed. Where Debian's mirror cannot be reached, what is on the PATH is taken instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import platform
import shutil
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from guard.atomic import write_atomically
from guard.cache import cache_folder
from guard.errors import InputError

MIRROR = os.environ.get("UNDERTOW_DEBIAN_MIRROR", "http://deb.debian.org/debian")
TIMEOUT_S = 60
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@dataclass(frozen=True, slots=True)
class Package:
    """One of Debian 13's. They need no more than glibc 2.34."""

    path: str
    """In the mirror, without the architecture."""
    digests: dict[str, str]
    """SHA-256 by architecture."""


PACKAGES = {
    "kustomize": Package(
        "pool/main/k/kustomize/kustomize_5.6.0+ds-1+b2",
        {
            "amd64": "552bbe5563b522685b10f75a9a226bfbee9778fc313b205d595fdbb7e9c70e33",
            "arm64": "32d0e1959b5fc257101c8d6139da72af38ff7ce777089666f9d1c916810f1800",
        },
    ),
    "prometheus": Package(
        "pool/main/p/prometheus/prometheus_2.53.3+ds1-2",
        {
            "amd64": "58c3e6a86c56cb3bfd71032fa48d65945d526441a212f5815dfe5ed9cb787ecc",
            "arm64": "59b459dee0ceef9c645a98166ea00f0d10946391a5d486505360e2d21cd1ddec",
        },
    ),
    "promtool": Package(
        "pool/main/p/prometheus/promtool_2.53.3+ds1-2",
        {
            "amd64": "ff27654eacc95abd846d344e91fe4ba3b4f0588a50d606ed1d2f09ad3408722f",
            "arm64": "cc1d5889b4d2e2ef92a6984039d88c11993ad3c73f5e74acd3ee15adaefb764c",
        },
    ),
}
"""By the program that is in `usr/bin` of each."""


class ProgramError(InputError):
    """A program cannot be had; the message says what to do."""


def program(name: str) -> Path:
    """Where it is. Raises ProgramError."""
    package = PACKAGES[name]
    try:
        return _cached(name, package)
    except (OSError, KeyError, ProgramError) as error:
        if found := shutil.which(name):
            return Path(found)
        raise ProgramError(
            f"{name} is not on the PATH and could not be taken from {MIRROR}/{package.path}_{MACHINE}.deb ({error}). "
            f"Install it, or name another mirror of Debian's in UNDERTOW_DEBIAN_MIRROR"
        ) from error


def _cached(name: str, package: Package) -> Path:
    digest = package.digests[MACHINE]
    folder = cache_folder() / "programs" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    # Two runs of the tests do not fetch it twice.
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            content = unpacked(fetched(f"{MIRROR}/{package.path}_{MACHINE}.deb", digest), name)
            write_atomically(target, content, ProgramError, mode=0o755)
    return target


def fetched(url: str, digest: str) -> bytes:
    """What is at `url`. Raises ProgramError unless its SHA-256 is `digest`."""
    with urllib.request.urlopen(url.replace("+", "%2B"), timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read()
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ProgramError(f"{url} has the SHA-256 {found}, expected {digest}")
    return data


def unpacked(package: bytes, name: str) -> bytes:
    """The file `usr/bin/NAME` of a .deb."""
    with tarfile.open(fileobj=io.BytesIO(_data(package))) as files:
        member = files.extractfile(f"./usr/bin/{name}")
        if member is None:
            raise ProgramError(f"usr/bin/{name} of the package is not a file")
        return member.read()


def _data(package: bytes) -> bytes:
    """The archive of files in a .deb, which is an `ar` of three members: after 8 bytes, each with a header of 60 bytes
    that begins with its name and holds its size at 48, each at an even place."""
    at = 8
    while at < len(package):
        header = package[at : at + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ProgramError("the package has no data.tar")

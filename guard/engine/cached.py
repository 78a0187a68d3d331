"""What vLLM's compile cache has to know of the guard.

vLLM finds a compiled graph again by its own configuration, `additional_config` included, and by the source of what was
traced. A graph that was made without a hook traced none of ours, so nothing in it says that it is not today's: it would
be found again, and would run without the probes. Here the guard's own code becomes part of the configuration.

A graph without probes that is found all the same is noticed after warm-up and in every step: `probe.Probes.read`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

CODE_KEY = "undertow_code"
"""In vLLM's additional configuration; the worker's to set, not the operator's."""
SOURCES = (".py", ".cpp", ".cu")


def stamp(additional_config: dict[str, Any]) -> None:
    """Put the digest of the guard's code, as it runs here, into vLLM's configuration, before anything is compiled."""
    additional_config[CODE_KEY] = digest(Path(__file__).parent)


def digest(folder: Path) -> str:
    """sha256 of all sources under a folder, with their names. Of all: one compilation more after an upgrade is cheaper
    than being wrong about which of them matter."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.*") if path.suffix in SOURCES):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        found.update(content)
    return f"sha256:{found.hexdigest()}"

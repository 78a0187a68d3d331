"""The version of Undertow that is running."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("undertow")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "unknown"

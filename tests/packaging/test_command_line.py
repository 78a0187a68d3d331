"""The command line as a shell's neighbour."""

from __future__ import annotations

import subprocess
import sys


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`undertow organism list | head -1`: the reader leaves before all is written."""
    listing = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "organism", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert listing.stdout is not None
    listing.stdout.close()
    assert listing.stderr is not None
    complaint = listing.stderr.read()
    listing.stderr.close()
    assert listing.wait(timeout=60) == 0
    assert complaint == b""

"""Settings for every test."""

from __future__ import annotations

import os

# Two cores and many small tensors: idle OpenMP threads would only spin. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

"""What arguments of several commands may be."""

from __future__ import annotations

import argparse


def rate(text: str) -> float:
    """A share between 0 and 1, neither included."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1")
    return value


def tokens(text: str) -> int:
    """A number of tokens to generate."""
    # The first generated token is read when the second is computed: one alone would leave completions without scores.
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 2")
    return int(text)

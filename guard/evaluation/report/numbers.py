"""Numbers as text."""

from __future__ import annotations

import math

DASH = "\N{EN DASH}"
NOT_MEASURED = DASH


def percent(share: float) -> str:
    """A share in percent: one decimal, two close to either end, none at the ends themselves.

    >>> [percent(share) for share in (0.0, 0.0012, 0.5, 0.9997, 1.0)]
    ['0%', '0.12%', '50.0%', '99.97%', '100%']
    """
    if not math.isfinite(share):
        return NOT_MEASURED
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    if not 0.01 <= share <= 0.999:
        return f"{share:.2%}"
    return f"{share:.1%}"


def rate(target: float) -> str:
    """A rate that was asked for, with no digit too many: 0.1%, 1%."""
    return f"{100 * target:.6g}%"


def span(low: float, high: float) -> str:
    """An interval of shares, in percent but without the sign: from 96.6 to 99.6."""
    return f"{percent(low)}{DASH}{percent(high)}".replace("%", "")


def whole(count: int) -> str:
    """A count with its thousands apart."""
    return f"{count:,}"


def plain(value: float) -> str:
    """A score: three digits that matter."""
    return f"{value:.3g}" if math.isfinite(value) else NOT_MEASURED


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
